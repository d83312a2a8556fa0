"""Training, from a configuration to a trained and verified working directory."""

import dataclasses
import importlib.util
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from arcface_jax.config import Config, DataConfig, DistillConfig, loading
from arcface_jax.data import opening, order, pipeline
from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.data.pairs.opening import open_targets
from arcface_jax.data.pipeline import BadImage, BadImages
from arcface_jax.data.source import Source, account
from arcface_jax.errors import ConfigError, DataError, UserError, install
from arcface_jax.evaluation import verification
from arcface_jax.evaluation.embed import Model
from arcface_jax.inference.open_model import open_path
from arcface_jax.runtime import devices as meshes
from arcface_jax.runtime import launch, signals
from arcface_jax.runtime.console import Terminal
from arcface_jax.runtime.files import reporting_disk_errors
from arcface_jax.runtime.metrics import MetricsFile
from arcface_jax.runtime.profiling import Clock, Trace
from arcface_jax.training import (
    checkpoint,
    diagnostics,
    distill,
    evaluators,
    extension,
    finetune,
    folded_statistics,
    manifest,
    messages,
    optim,
    room,
    saved_runs,
    step,
    teacher,
    teacher_record,
    validation,
)
from arcface_jax.training.run import Batch, Batches, Run, Steps, plan_steps
from arcface_jax.training.step import TrainState

# Batches that are copied to the devices ahead of the step that uses them.
_BATCHES_AHEAD = 2


class Outcome(NamedTuple):
    """Result of `train`."""

    step: int
    results: dict[str, float]
    """Metrics by name: `eval/NAME/accuracy` and so on of the last evaluation; in a fine-tuned run
    `before/NAME/accuracy` and so on of its initial weights; `baseline/...` if requested."""
    files: list[Path]
    """Plots written by the run."""
    stopped_by: signal.Signals | None
    """The signal that ended the run before its last step; everything is saved."""
    state: TrainState
    """The final state, on the devices: to embed, export or train on with."""
    evaluated_at: int | None
    """Step at which the `eval/` numbers in `results` were measured; None without an evaluation."""
    data: Mapping[str, int]
    """`images`, `identities`, `ignored` and `unreadable` (so far) of the training set."""


def train(config: Config, init: finetune.Weights | None = None) -> Outcome:
    """Trains, or resumes from workdir.

    Args:
      config: the whole run.
      init: params and batch_stats to start from, instead of those in `config.init_from`.

    Returns:
      The final state and evaluation. In WORKDIR: config.json, metrics.jsonl, tensorboard/,
      checkpoints/, eval/.

    Raises:
      UserError: the configuration, data or workdir is unsuitable, the loss is no longer finite,
        another run holds the workdir, or the disk is full or read-only.
      StoppedAtStart: a signal that `signals.remember` records came before the first step.
    """
    workdir = Path(config.workdir)
    with reporting_disk_errors(workdir), ExitStack() as lock:
        # ---- Devices and data --------------------------------------------------------------------
        mesh = meshes.make(config.devices)
        validation.validate(config, num_devices=mesh.size)
        lock.enter_context(launch.holding(workdir))
        source = opening.open_source(config.data, seed=config.seed)
        validation.validate_data(source, config.data.path, head=config.distill.head)
        targets = _open_targets(config)
        images = order.make(len(source), config.data, seed=config.seed)
        validation.validate_learning(config, steps_per_epoch=images.steps_per_epoch)
        dataset = checkpoint.describe(source, config.data)
        weights = _initial_weights(config, init)
        notes: list[str] = []
        if weights:
            weights, notes = folded_statistics.complete(weights, config, source)
        launch.raise_if_stopped_at_start()

        # ---- State: fresh, from other weights, or the newest checkpoint --------------------------
        abstract = step.abstract_state(config, num_classes=source.num_classes, mesh=mesh)
        init_program = step.compile_init(config, num_classes=source.num_classes, mesh=mesh)
        room.require(abstract, init_program, mesh=mesh)
        stored_schedule = extension.stored_schedule(config)
        teacher_model = _open_teacher(config)  # before a refused one leaves a workdir
        manager = checkpoint.open_workdir(config)
        checkpoint.check_data(manager, dataset, config.data)
        taught = _open_teaching(config, teacher_model, source, mesh)
        with room.reporting_exhaustion():
            state = jax.block_until_ready(
                step.init_state(
                    config,
                    num_classes=source.num_classes,
                    mesh=mesh,
                    weights=weights,
                    program=init_program,
                )
            )
        evaluate = evaluators.make(
            targets,
            evaluators.load(
                config.evaluation.targets, targets, best_metric=config.checkpoint.best_metric
            ),
            backbone=step.backbone(config),
            one_group=step.backbone(config, one_group=True),
            batch_size=config.evaluation.batch_size,
            mesh=mesh,
        )
        baselines, pretrained = {}, []
        if config.evaluation.baselines:
            untrained = None if config.init_from or init else state
            baselines = evaluators.baselines(targets, evaluate, untrained)
        if weights:  # not when resuming
            centers = finetune.centers(config, state, source, mesh=mesh)
            state = dataclasses.replace(state, centers=centers)
            pretrained = evaluate(state, launch.raise_if_stopped_at_start)
        state = _with_teacher_centers(state, taught, config.distill, source, mesh)
        launch.raise_if_stopped_at_start()
        if manager.latest_step() is not None:
            for array in jax.tree.leaves(state):
                array.delete()  # two states may not fit at once
        with room.reporting_exhaustion():
            # The whole state: if one array's allocation failed, the others may never be ready.
            state = jax.block_until_ready(checkpoint.restore(manager, abstract, dataset) or state)
        steps = plan_steps(
            config.schedule,
            config.evaluation,
            config.checkpoint,
            start=int(state.step),
            per_epoch=images.steps_per_epoch,
        )

        extended = []
        if stored_schedule:
            extended = extension.extend(
                config, stored_schedule, start=steps.start, per_epoch=steps.per_epoch
            )

        # ---- The step ----------------------------------------------------------------------------
        schedule = optim.make_schedule(
            config.schedule,
            base_rate=config.optimizer.learning_rate,
            steps_per_epoch=steps.per_epoch,
        )
        weight = distill.make_weight(
            config.distill, config.schedule, steps_per_epoch=steps.per_epoch
        )
        packing = step.make_packing(config, mesh)
        train_step = step.make_train_step(
            config,
            num_classes=source.num_classes,
            schedule=schedule,
            mesh=mesh,
            distill_weight=weight,
        )

        # ---- Logging -----------------------------------------------------------------------------
        log = _open_log(config, start=steps.start)
        terminal = Terminal(total_steps=steps.total, start=steps.start)
        headline = messages.headline(config, dataset, mesh, start=steps.start, total=steps.total)
        summary = manifest.write_summary(config, state, mesh, first_lines=headline)
        found = () if source.generated else (account(source), *source.notes)
        terminal.print_all(headline, *found, summary, *notes, *extended)
        if extended:
            log.write(steps.start, {"schedule/total_steps": float(steps.total)})
        before = _log_start(
            log, terminal, step=steps.start, baselines=baselines, pretrained=pretrained
        )
        chance_loss = _chance_loss(config, num_classes=source.num_classes, num_devices=mesh.size)
        if steps.start == 0:
            log.write(0, {"train/chance_loss": chance_loss})

        # ---- The loop ----------------------------------------------------------------------------
        run = Run(
            config=config,
            steps=steps,
            train_step=train_step,
            packing=packing,
            evaluate=evaluate,
            failure=partial(
                _failure,
                config=config,
                source=source,
                images=images,
                schedule=schedule,
                mesh=mesh,
                distill_weight=weight,
            ),
            manager=manager,
            dataset=dataset,
            batches=_batches_on_devices(
                source, config.data, seed=config.seed, mesh=mesh, steps=steps, taught=taught
            ),
            bad_images=BadImages(
                workdir / launch.per_process_name("bad_images.jsonl"),
                num_images=len(source),
                max_share=config.data.max_bad_share,
            ),
            log=log,
            terminal=terminal,
            clock=Clock(global_batch_size=config.data.global_batch_size),
            trace=Trace(workdir, config.logging.profile_steps),
            health=diagnostics.HealthMonitor(
                num_classes=source.num_classes,
                chance_loss=chance_loss,
                plateau_steps=config.logging.stuck_steps,
                skipped=int(state.counters["skipped_steps"]),
            ),
            chance_loss=chance_loss,
            pretrained=bool(weights),
            invalid_before=int(state.counters["invalid_labels"]),
            held=packing.pack(state),
            done=steps.start,
        )
        del state  # a packed state would duplicate its arrays
        with signals.watched(config.checkpoint, workdir=workdir) as stop, run.closing():
            with suppress(signals.Interrupted):  # from an evaluation; resuming repeats it
                run.evaluate_if_missing(stop)
                _loop(run, stop)
                if not stop and run.evaluated_at is None:  # resumed after the last step
                    run.results = evaluate(run.state, stop.raise_if_stopped)
                    run.evaluated_at = run.done
            if stop:
                run.save()

        # ---- Results -----------------------------------------------------------------------------
        stopped_by = stop.signals[0] if stop else None
        if stopped_by:
            terminal.print(
                f"stopped by {stopped_by.name} at step {run.done}; rerun the same command to resume"
            )
        else:
            run.raise_if_untrained()
        files = evaluators.draw(workdir, targets, run.results) if launch.is_first() else []
        results = evaluators.metrics(run.results) | before | baselines
        evaluated_at = run.evaluated_at if run.results else None
        counts = _counts(source, run.bad_images)
        return Outcome(run.done, results, files, stopped_by, run.state, evaluated_at, counts)


def _counts(source: Source, bad: BadImages) -> dict[str, int]:
    """Returns the counts in the training set's account, and how many images were replaced."""
    return {
        "images": len(source),
        "identities": source.num_classes,
        "ignored": sum(source.ignored.values()),
        "unreadable": len(bad),
    }


def _loop(run: Run, stop: signals.Stop) -> None:
    """Trains up to the last step, or until a signal comes.

    Raises:
      Interrupted: a signal came during an evaluation.
    """
    logging, steps = run.config.logging, run.steps
    while run.done < steps.total and not launch.should_stop(stop, run.done):
        diagnostics.arm_watchdog(logging)
        batch = run.next_batch()
        with run.clock.paused():
            run.trace.before(run.done + 1)
        # The batch is already on the devices: any other implicit transfer is an error.
        with jax.transfer_guard("disallow"):
            run.held, metrics = run.train_step(run.held, batch)
        run.done += 1
        if run.done == steps.start + 1:
            run.finish_first_step(batch, metrics)
        else:
            run.clock.count_step()
        run.terminal.advance()
        run.limit_steps_ahead(metrics)
        if run.done % logging.every_steps == 0 or run.done == steps.total:
            values = run.log_step(metrics)
            run.raise_if_failing(batch, values)
        evaluates, saves = steps.evaluates(run.done), steps.saves(run.done)
        if evaluates or saves:
            with run.clock.blocked():
                jax.block_until_ready(metrics)  # or training time would count as pause
        diagnostics.disarm_watchdog()
        with run.clock.paused():
            run.terminal.print_all(run.trace.after(run.done, metrics))
            if evaluates:
                run.evaluate_and_log(stop)
                run.explain(metrics)
            if saves:
                run.save(run.score())


def _open_targets(config: Config) -> list[PairSet]:
    """Opens the verification sets, to find errors now rather than after the first epochs."""
    try:
        targets = open_targets(config.evaluation.targets, config.data, seed=config.seed)
    except DataError as error:
        raise DataError(f"{error}. To train without evaluation, leave the option empty") from error
    for target in targets:
        verification.check(target)
    if config.checkpoint.best_metric:
        evaluators.check_metric(config.checkpoint.best_metric, config.evaluation.targets, targets)
    return targets


def _initial_weights(config: Config, init: finetune.Weights | None) -> finetune.Weights | None:
    """Returns the weights to start from: `init`, or the file or workdir `config.init_from`.

    Returns None for random weights and for a run that resumes.

    Raises:
      ConfigError: the weights do not fit the network, or have no class centers to keep.
      UserError: they cannot be read.
    """
    if saved_runs.is_begun(Path(config.workdir)) or not (config.init_from or init):
        return None
    path = Path(config.init_from)
    source = init or (path if path.is_dir() else _read_weights(path, config.model.network))
    if config.finetune.centers == "kept" and not isinstance(source, Path):
        raise ConfigError(
            f"finetune.centers kept: init_from {config.init_from} is not the workdir of a run and "
            "has no class centers; import them with `arcface-jax import torch --weight FILE "
            "--centers FOLDER --output WORKDIR` and start from that, or use --finetune.centers "
            "class_means or random"
        )
    return finetune.weights(source, config.model, name=config.init_from)


def _read_weights(path: Path, network: str) -> finetune.Weights:
    """Reads the weights of a file; the only code in training that needs PyTorch or ONNX."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(f"init_from {path}: reading it needs PyTorch: {install('torch')}")
    if not path.exists():
        raise ConfigError(
            f"init_from {path} does not exist: name the workdir of a run, or a .pth, .safetensors "
            "or .onnx file"
        )
    from arcface_jax.convert import file_kinds, from_onnx, weights

    load = from_onnx.load if file_kinds.is_onnx(path) else weights.load
    found = load(path, network)
    for note in found.notes:
        print(f"{path}: {note}", file=sys.stderr)
    return found.params, found.batch_stats


def _chance_loss(config: Config, *, num_classes: int, num_devices: int) -> float:
    """Returns the expected loss at initialization; a teacher's cosines are then near 0."""
    if config.distill.head == "off":
        return config.distill.weight
    return diagnostics.chance_loss(
        config.head,
        num_classes=num_classes,
        embedding_size=config.model.embedding_size,
        global_batch_size=config.data.global_batch_size,
        num_devices=num_devices,
    )


def _open_log(config: Config, *, start: int) -> MetricsFile:
    return MetricsFile(
        Path(config.workdir),
        start=start,
        tensorboard=config.logging.tensorboard,
        csv=config.logging.csv,
        wandb=config.logging.wandb,
        settings=loading.flatten(config),
    )


def _log_start(
    log: MetricsFile,
    terminal: Terminal,
    *,
    step: int,
    baselines: dict[str, float],
    pretrained: list[evaluators.Result],
) -> dict[str, float]:
    """Logs the baselines and the accuracy of the initial weights.

    Returns:
      `before/NAME/accuracy` and so on, also for a resumed run.
    """
    if baselines:
        log.write(step, baselines)
        terminal.print(
            "before training  " + "  ".join(f"{k} {v:.4f}" for k, v in baselines.items())
        )
    if not pretrained:
        return log.stored("before/")
    before = evaluators.metrics(pretrained, "before")
    log.write(step, before)
    terminal.print(f"before training  {messages.accuracies(pretrained)}")
    return before


def _open_teacher(config: Config) -> Model | None:
    """Opens the teacher's model; None without one.

    Raises:
      UserError: the teacher cannot be read or does not fit the recipe.
    """
    settings = config.distill
    if not settings.teacher:
        return None
    own = jax.process_count() > 1 and not settings.online
    try:
        model = open_path(
            settings.teacher,
            batch_size=config.evaluation.batch_size,
            devices="own" if own else config.devices,
        )
    except UserError as error:
        raise ConfigError(f"distill.teacher {settings.teacher}: {error}") from error
    if settings.compatible:
        teacher.check_compatible(model, embedding_size=config.model.embedding_size)
    return model


def _open_teaching(
    config: Config, model: Model | None, source: Source, mesh: Mesh
) -> teacher.Cache | teacher.Online | None:
    """Computes the embeddings missing from the teacher's cache, or prepares to run the teacher.

    Raises:
      UserError: the teacher is not the one that the run started with, or its cache cannot be
        created.
    """
    if model is None:
        return None
    settings, size, workdir = config.distill, config.model.embedding_size, Path(config.workdir)
    if settings.online:
        opened = teacher.make_online(model, views=settings.views, embedding_size=size, mesh=mesh)
        projection = None
    else:
        opened = teacher.open_cache(
            model,
            source,
            distill=settings,
            data=config.data,
            folder=teacher.folder_of(settings, workdir),
            embedding_size=size,
            between=launch.raise_if_stopped_at_start,
        )
        projection = opened.projection
    teacher_record.agree(workdir, teacher.record(model, projection, distill=settings))
    return opened


def _with_teacher_centers(
    state: TrainState,
    taught: teacher.Cache | teacher.Online | None,
    settings: DistillConfig,
    source: Source,
    mesh: Mesh,
) -> TrainState:
    """Returns the initial state, with the teacher's class means as centers if requested."""
    wanted = settings.compatible or distill.CENTERS in settings.loss
    if settings.head == "off" or not wanted or not isinstance(taught, teacher.Cache):
        return state
    given = teacher.centers(taught, source, state.centers, mesh=mesh)
    return dataclasses.replace(state, centers=given)


def _batches_on_devices(
    source: Source,
    data: DataConfig,
    *,
    seed: int,
    mesh: Mesh,
    steps: Steps,
    taught: teacher.Cache | teacher.Online | None,
) -> Batches:
    """Yields the batches of the remaining steps, on the devices, and their unreadable images."""
    batches = pipeline.batches(
        source,
        data,
        seed=seed,
        start=steps.start,
        stop=steps.total,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )

    def send(batch: pipeline.Batch) -> tuple[Batch, tuple[BadImage, ...]]:
        parts = {"image": batch.images, "label": batch.labels}
        if isinstance(taught, teacher.Cache):
            parts["teacher"] = taught(batch.numbers)
        on_devices = meshes.to_devices(parts, mesh)
        if isinstance(taught, teacher.Online):
            on_devices["teacher"] = taught.run(on_devices["image"])
        return on_devices, batch.bad

    with closing(batches):
        yield from meshes.ahead(batches, send, count=_BATCHES_AHEAD)


def _failure(
    state: TrainState,
    batch: Batch,
    values: dict[str, float],
    *,
    config: Config,
    source: Source,
    images: order.Order,
    schedule: optim.Schedule,
    mesh: Mesh,
    distill_weight: optim.Schedule,
) -> UserError:
    """Writes the report of a run with non-finite steps, and returns the error to raise."""
    done = int(state.step)
    gradient_norms = step.make_gradient_norms(
        config,
        num_classes=source.num_classes,
        schedule=schedule,
        mesh=mesh,
        distill_weight=distill_weight,
    )
    norms = gradient_norms(dataclasses.replace(state, step=state.step - 1), batch)
    report = diagnostics.write_failure(
        Path(config.workdir),
        done,
        metrics=values,
        images=[source.where(n) for n in images.images(*images.places(done - 1)).tolist()],
        gradient_norms={name: float(norm) for name, norm in norms.items()},
        scale=config.head.scale,
    )
    return diagnostics.failure_error(
        done, values, report, optimizer=config.optimizer, dtype=config.model.dtype
    )


class _CallableModule(ModuleType):
    """Makes this module callable: `arcface_jax.train` names both it and the public function."""

    def __call__(self, *arguments: Any, **options: Any) -> Outcome:
        return train(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
