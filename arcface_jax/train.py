"""Training, from a configuration to a trained and verified working directory."""

import dataclasses
import signal
from collections import deque
from collections.abc import Generator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from arcface_jax.config import Config, loading
from arcface_jax.data import opening, order, pipeline
from arcface_jax.data.pairs.opening import open_targets
from arcface_jax.data.pipeline import BadImage, BadImages
from arcface_jax.data.source import Source
from arcface_jax.errors import UserError
from arcface_jax.evaluation import collapse, verification
from arcface_jax.runtime import devices as meshes
from arcface_jax.runtime import launch, signals
from arcface_jax.runtime.console import Terminal
from arcface_jax.runtime.files import reporting_disk_errors
from arcface_jax.runtime.metrics import Clock, MetricsFile
from arcface_jax.runtime.profiling import Trace
from arcface_jax.training import (
    checkpoint,
    diagnostics,
    evaluators,
    finetune,
    manifest,
    messages,
    optim,
    step,
    validation,
)
from arcface_jax.training.diagnostics import Watch, slowest_host
from arcface_jax.training.evaluators import Result

# Steps that may be handed to the devices before the first of them is done: enough to keep them
# busy, and few enough that batches do not pile up in their memory.
_STEPS_AHEAD = 2
# Batches that are copied to the devices before the step that takes them.
_BATCHES_AHEAD = 2


class Outcome(NamedTuple):
    """What a call of `train` came to."""

    step: int
    results: dict[str, float]
    """`eval/NAME/accuracy` and so on of the last evaluation; `before/NAME/accuracy` and so on of
    the weights that a fine-tuned run began with; `baseline/...` where asked for."""
    files: list[Path]
    """What was written for people to look at."""
    stopped_by: signal.Signals | None
    """The signal that ended the run before its last step; everything is saved."""


def train(config: Config, init: finetune.Weights | None = None) -> Outcome:
    """Trains, or goes on where WORKDIR stopped.

    Args:
      config: the whole run.
      init: params and batch_stats to begin with, where `config.init_from` is not a workdir.

    Returns:
      The final state and evaluation. In WORKDIR: config.json, metrics.jsonl, tensorboard/,
      checkpoints/, eval/.

    Raises:
      UserError: configuration, data or workdir do not allow the run, the loss is no longer finite,
        or the disk does not take what is written.
    """
    with reporting_disk_errors(Path(config.workdir)):
        return _train(config, init)


def _train(config: Config, init: finetune.Weights | None) -> Outcome:
    # ---- Devices and data ------------------------------------------------------------------------
    devices = meshes.make(config.devices)
    validation.validate(config, num_devices=devices.size)
    source = opening.open_source(config.data, seed=config.seed)
    targets = open_targets(config)
    for target in targets:
        verification.check(target)  # better now than after the first epochs
    if config.checkpoint.best_metric:
        evaluators.check_metric(config, targets)
    images = order.make(len(source), config.data, seed=config.seed)
    per_epoch = images.steps_per_epoch
    total = per_epoch * config.schedule.epochs
    dataset = {"num_classes": source.num_classes, "num_images": len(source)}
    weights = finetune.weights(config, init)

    # ---- State: fresh, of other weights, or the newest checkpoint --------------------------------
    manager = checkpoint.open_workdir(config)
    state = step.init_state(config, num_classes=source.num_classes, mesh=devices, weights=weights)
    evaluate = evaluators.make(config, targets, devices)
    baselines = (
        evaluators.baselines(config, targets, evaluate, state)
        if config.evaluation.baselines
        else {}
    )
    began: list[Result] = []
    if weights:  # not on resuming
        centers = finetune.centers(config, state, source, mesh=devices)
        state = dataclasses.replace(state, centers=centers)
        began = evaluate(state)
    state = checkpoint.restore(manager, state, dataset) or state
    start = int(state.step)

    # ---- The step --------------------------------------------------------------------------------
    schedule = optim.make_schedule(
        config.schedule, base_rate=config.optimizer.learning_rate, steps_per_epoch=per_epoch
    )
    train_step = step.make_train_step(
        config, num_classes=source.num_classes, schedule=schedule, mesh=devices
    )

    # ---- Logging ---------------------------------------------------------------------------------
    log = MetricsFile(
        Path(config.workdir),
        start=start,
        tensorboard=config.logging.tensorboard,
        csv=config.logging.csv,
        wandb=config.logging.wandb,
        settings=loading.flatten(config),
    )
    terminal = Terminal(total_steps=total, start=start)
    clock = Clock(global_batch_size=config.data.global_batch_size)
    headline = messages.headline(config, dataset, devices, start=start, total=total)
    terminal.say_all(headline, manifest.write_summary(config, state, devices, first_lines=headline))
    trace = Trace(Path(config.workdir), config.logging.profile_steps)
    if baselines:
        log.write(start, baselines)
        terminal.say("before training  " + "  ".join(f"{k} {v:.4f}" for k, v in baselines.items()))

    before = log.stored("before/")
    if began:
        before = evaluators.metrics(began, "before")
        log.write(start, before)
        terminal.say(f"before training  {messages.in_words(began)}")

    by_chance = diagnostics.chance_loss(
        config.head,
        num_classes=source.num_classes,
        embedding_size=config.model.embedding_size,
        global_batch_size=config.data.global_batch_size,
        num_devices=devices.size,
    )
    if start == 0:
        log.write(0, {"train/chance_loss": by_chance})

    watch = Watch(
        num_classes=source.num_classes, by_chance=by_chance, steps=config.logging.stuck_steps
    )

    # ---- The loop --------------------------------------------------------------------------------
    results: list[Result] = []
    evaluate_at = _milestones(config.evaluation.every_epochs, per_epoch, total)
    save_at = _milestones(config.checkpoint.every_epochs, per_epoch, total)
    best_metric = config.checkpoint.best_metric
    if best_metric:
        save_at |= evaluate_at
    bad_images = BadImages(
        Path(config.workdir) / launch.own_name("bad_images.jsonl"),
        num_images=len(source),
        max_share=config.data.max_bad_share,
    )
    batches = _batches_on_devices(config, source, devices, start=start, stop=total)
    warned = False
    in_flight: deque = deque()
    done = start
    with signals.watched(config) as stop:
        try:
            # A signal came while this was evaluated, and the run before this one left it.
            if config.evaluation.targets and start in evaluate_at and not log.has(start, "eval/"):
                with suppress(signals.Left):
                    results = evaluate(state, stop.leave)
                    log.write(start, evaluators.metrics(results))
                    terminal.say(f"step {start}/{total}  {messages.in_words(results)}")
            while done < total and not launch.to_stop(stop, done):
                diagnostics.arm(config.logging)
                try:
                    with clock.waiting():
                        batch, bad = next(batches)
                    for image in bad_images.add(bad, step=done + 1):
                        terminal.say(messages.replaced(image))
                except UserError:
                    # Several processes save together, and the others know nothing of it.
                    if done > start and jax.process_count() == 1:  # what was trained so far is good
                        checkpoint.save(manager, state, dataset)
                    raise
                with clock.paused():
                    trace.before(done + 1)
                # The batch is there already: whatever else goes to or fro by itself is an error.
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, batch)
                done += 1
                if done == start + 1:  # it was compiled, which is not to be counted as training
                    jax.block_until_ready(metrics)
                    terminal.say_all(watch.labels(meshes.own_part(batch["label"])))
                    if start == 0:
                        terminal.say(
                            messages.first_loss(
                                float(metrics["train/loss"]), by_chance, bool(weights)
                            )
                        )
                    clock.restart()
                else:
                    clock.count_step()
                terminal.advance()
                in_flight.append(metrics)
                if len(in_flight) > _STEPS_AHEAD:
                    with clock.blocked():
                        jax.block_until_ready(in_flight.popleft())
                if done % config.logging.every_steps == 0 or done == total:
                    with clock.blocked():
                        values = {name: float(value) for name, value in metrics.items()}
                    values |= clock.read()
                    words = None
                    if "perf/host_ms" in values:  # on all hosts, or on none
                        slowest, words = slowest_host(values["perf/host_ms"])
                        values |= slowest
                    values["epoch"] = done / per_epoch
                    values["data/bad_images"] = len(bad_images)
                    log.write(done, values)
                    terminal.show(done, values)
                    checkpoint.check(manager)
                    terminal.say_all(
                        watch.skipped(done, values), watch.loss(done, values["train/loss"]), words
                    )
                    if not warned and (warned := messages.input_is_the_limit(values)):
                        terminal.say(messages.slow_input(values, config.data))
                    if values["train/skipped_in_row"] >= config.optimizer.stop_after_skipped:
                        checkpoint.save(manager, state, dataset)
                        norms = step.make_gradient_norms(
                            config, num_classes=source.num_classes, schedule=schedule, mesh=devices
                        )
                        names = map(source.where, images.images(*images.places(done - 1)).tolist())
                        raise diagnostics.report(config, list(names), state, norms, batch, values)
                    if values["train/invalid_labels"]:
                        checkpoint.save(manager, state, dataset)  # they took no part in it
                        raise messages.invalid_labels(values["train/invalid_labels"], done, dataset)
                if done in evaluate_at | save_at:
                    with clock.blocked():
                        jax.block_until_ready(metrics)  # or training would hide in the pause
                diagnostics.disarm()
                with clock.paused():
                    terminal.say_all(trace.after(done, metrics))
                    if done in evaluate_at:
                        try:
                            results = evaluate(state, stop.leave)
                        except signals.Left:
                            break
                        log.write(done, evaluators.metrics(results))
                        terminal.say(f"step {done}/{total}  {messages.in_words(results)}")
                        loss = float(metrics["train/loss"])
                        for result in evaluators.verifications(results):
                            if words := collapse.explain(result, loss=loss, chance_loss=by_chance):
                                terminal.say(words)
                    if done in save_at:
                        measured = best_metric and done in evaluate_at
                        score = (
                            {best_metric: evaluators.metrics(results)[best_metric]}
                            if measured
                            else None
                        )
                        checkpoint.save(manager, state, dataset, score)
            if stop:
                checkpoint.save(manager, state, dataset)
        finally:
            diagnostics.disarm()
            with ExitStack() as all_of_them:  # from the last line up, whichever fails
                all_of_them.callback(terminal.close)
                all_of_them.callback(log.close)
                all_of_them.callback(checkpoint.close, manager)
                all_of_them.callback(trace.close)
                all_of_them.callback(batches.close)

    # ---- What the run came to --------------------------------------------------------------------
    by = stop.signals[0] if stop else None
    if by:
        terminal.say(f"stopped by {by.name} at step {done}; the same command resumes here")
    elif not results:  # resumed behind the last step
        results = evaluate(state)
    files = evaluators.draw(config, targets, results) if launch.is_first() else []
    values = evaluators.metrics(results) | before | baselines
    return Outcome(done, values, files, by)


def _batches_on_devices(
    config: Config, source: Source, devices: Mesh, *, start: int, stop: int
) -> Generator[tuple[dict[str, jax.Array], tuple[BadImage, ...]]]:
    """The batches of steps start .. stop - 1, and the damaged images of each."""
    batches = pipeline.batches(
        source,
        config.data,
        seed=config.seed,
        start=start,
        stop=stop,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )

    def send(batch: pipeline.Batch) -> tuple[dict[str, jax.Array], tuple[BadImage, ...]]:
        parts = {"image": batch.images, "label": batch.labels}
        return meshes.to_devices(parts, devices), batch.bad

    with closing(batches):
        yield from meshes.ahead(batches, send, count=_BATCHES_AHEAD)


def _milestones(every_epochs: float, steps_per_epoch: int, total: int) -> set[int]:
    """The steps after which something periodic is due; the last is one of them."""
    interval = max(1, round(every_epochs * steps_per_epoch)) if every_epochs else total
    return {*range(interval, total, interval), total}
