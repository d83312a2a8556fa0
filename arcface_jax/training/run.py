"""A run while it trains: the work around each step, and closing everything at the end."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp

from arcface_jax.config import CheckpointConfig, Config, EvaluationConfig, ScheduleConfig
from arcface_jax.data.pipeline import BadImage, BadImages
from arcface_jax.errors import UserError
from arcface_jax.runtime import devices as meshes
from arcface_jax.runtime import signals
from arcface_jax.runtime.console import Terminal
from arcface_jax.runtime.metrics import MetricsFile
from arcface_jax.runtime.profiling import Clock, Trace
from arcface_jax.training import checkpoint, diagnostics, evaluators, messages
from arcface_jax.training.packing import Packing
from arcface_jax.training.step import Metrics, TrainState, TrainStep

Batch = dict[str, jax.Array]
Batches = Generator[tuple[Batch, tuple[BadImage, ...]]]

# Steps dispatched to the devices before the first of them is done: enough to keep the devices busy,
# and few enough that batches do not pile up in their memory.
_STEPS_AHEAD = 2


class Steps(NamedTuple):
    """The steps at which a run starts, ends, evaluates and saves."""

    start: int
    """Steps already done: 0, or the step of the checkpoint that the run resumes from."""
    total: int
    per_epoch: int
    evaluate_every: int
    """Steps between two evaluations; the last step is followed by one too."""
    save_every: int
    """Steps between two checkpoints; the last step is followed by one too."""
    save_evaluated: bool
    """Whether every evaluated state is saved."""

    def evaluates(self, step: int) -> bool:
        """Returns whether the state after `step` steps is evaluated."""
        return step == self.total or (step > 0 and step % self.evaluate_every == 0)

    def saves(self, step: int) -> bool:
        """Returns whether the state after `step` steps is saved."""
        periodic = step == self.total or (step > 0 and step % self.save_every == 0)
        return periodic or (self.save_evaluated and self.evaluates(step))


def plan_steps(
    schedule: ScheduleConfig,
    evaluation: EvaluationConfig,
    checkpoint: CheckpointConfig,
    *,
    start: int,
    per_epoch: int,
) -> Steps:
    """Returns the steps of a run that starts at step `start`, with `per_epoch` steps per epoch."""
    total = per_epoch * schedule.epochs

    def interval(every_epochs: float) -> int:
        return max(1, round(min(every_epochs * per_epoch, total))) if every_epochs else total

    return Steps(
        start,
        total,
        per_epoch,
        evaluate_every=interval(evaluation.every_epochs),
        save_every=interval(checkpoint.every_epochs),
        save_evaluated=bool(checkpoint.best_metric),
    )


@dataclass
class Run:
    """A run while it trains: the working objects and progress of the loop in `train`."""

    config: Config
    steps: Steps
    train_step: TrainStep
    packing: Packing
    evaluate: evaluators.Evaluate
    failure: Callable[[TrainState, Batch, dict[str, float]], UserError]
    """Returns the error to raise when steps are no longer finite, and writes a report."""
    manager: ocp.CheckpointManager
    dataset: checkpoint.Dataset
    batches: Batches
    bad_images: BadImages
    log: MetricsFile
    terminal: Terminal
    clock: Clock
    trace: Trace
    health: diagnostics.HealthMonitor
    chance_loss: float
    """Expected loss at initialization."""
    pretrained: bool
    """Whether the run starts from other than random weights."""

    invalid_before: int
    """Images with invalid labels up to `steps.start`, which an earlier start reported."""

    held: TrainState
    """The state as the train step stores it."""
    done: int
    """Steps dispatched; `held.step` may still be computed on the devices."""
    in_flight: deque[Metrics] = field(default_factory=deque)
    results: list[evaluators.Result] = field(default_factory=list)
    """Results of the last evaluation."""
    evaluated_at: int | None = None
    """Step of the last evaluation."""

    @property
    def state(self) -> TrainState:
        """The state with every array by its dotted name; a copy if the step packs it."""
        return self.packing.unpack(self.held)

    def next_batch(self) -> Batch:
        """Waits for the next batch, on the devices, and report its unreadable images.

        Raises:
          UserError: too many images cannot be read. The state so far is saved.
        """
        try:
            with self.clock.waiting():
                batch, bad = next(self.batches)
            for image in self.bad_images.add(bad, step=self.done + 1):
                self.terminal.print(messages.bad_image(image))
        except UserError:
            # Several processes save together, and the others do not know about this error.
            if self.done > self.steps.start and jax.process_count() == 1:
                self.save()
            raise
        return batch

    def finish_first_step(self, batch: Batch, metrics: Metrics) -> None:
        """Waits for the first step, whose compilation does not count as training time."""
        jax.block_until_ready(metrics)
        self.terminal.print_all(
            self.health.few_labels(meshes.own_part(batch["label"])),
            self.health.empty_images(meshes.own_part(batch["image"])),
        )
        if self.steps.start == 0:
            loss = float(metrics["train/loss"])
            self.terminal.print(
                messages.initial_loss(loss, self.chance_loss, pretrained=self.pretrained)
            )
        self.clock.restart()

    def limit_steps_ahead(self, metrics: Metrics) -> None:
        """Waits for an earlier step if too many are in flight."""
        self.in_flight.append(metrics)
        if len(self.in_flight) > _STEPS_AHEAD:
            with self.clock.blocked():
                jax.block_until_ready(self.in_flight.popleft())

    def log_step(self, metrics: Metrics) -> dict[str, float]:
        """Logs and shows the metrics of a step, with warnings about them; returns the values."""
        with self.clock.blocked():
            values = {name: float(value) for name, value in metrics.items()}
        values |= self.clock.read()
        straggler = None
        if "perf/host_ms" in values:  # on all hosts or on none
            slowest, straggler = diagnostics.slowest_host(values["perf/host_ms"])
            values |= slowest
        values["epoch"] = self.done / self.steps.per_epoch
        values["data/bad_images"] = len(self.bad_images)
        self.log.write(self.done, values)
        self.terminal.show(self.done, values)
        checkpoint.check(self.manager)
        self.terminal.print_all(
            self.health.skipped_steps(self.done, values),
            self.health.plateau(self.done, values["train/loss"]),
            straggler,
            self.health.slow_input(values, self.config.data),
        )
        return values

    def raise_if_failing(self, batch: Batch, values: dict[str, float]) -> None:
        """Ends the run, with a checkpoint, after too many non-finite steps or for invalid labels.

        The limit is `optimizer.stop_after_skipped`, or all steps of a shorter run.
        """
        limit = min(self.config.optimizer.stop_after_skipped, self.steps.total)
        if values["train/skipped_in_row"] >= limit:
            self.save()
            raise self.failure(self.held, batch, values)
        if invalid := values["train/invalid_labels"] - self.invalid_before:
            self.save()
            raise messages.invalid_labels(
                invalid, first=self.steps.start + 1, last=self.done, dataset=self.dataset
            )

    def raise_if_untrained(self) -> None:
        """Refuses the result of a complete run that never changed its weights."""
        skipped = int(self.state.counters["skipped_steps"])
        if 0 < self.done <= skipped:
            raise diagnostics.untrained_error(
                skipped, optimizer=self.config.optimizer, dtype=self.config.model.dtype
            )

    def evaluate_if_missing(self, stop: signals.Stop) -> None:
        """Repeats an evaluation that a signal interrupted before this run resumed."""
        missing = self.steps.evaluates(self.done) and not self.log.has(self.done, "eval/")
        if missing and self.config.evaluation.targets:
            self.evaluate_and_log(stop)

    def evaluate_and_log(self, stop: signals.Stop) -> None:
        """Evaluates the state on all verification sets.

        Raises:
          Interrupted: a signal came.
        """
        self.results = self.evaluate(self.state, stop.raise_if_stopped)
        self.evaluated_at = self.done
        if not self.results:  # without verification sets and evaluators
            return
        self.log.write(self.done, evaluators.metrics(self.results))
        self.terminal.print(
            f"step {self.done}/{self.steps.total}  {messages.accuracies(self.results)}"
        )

    def explain(self, metrics: Metrics) -> None:
        """Explains why a set is still at chance level, if one is."""
        loss = float(metrics["train/loss"])
        self.terminal.print_all(
            *(
                diagnostics.explain_chance_accuracy(result, loss=loss, chance_loss=self.chance_loss)
                for result in evaluators.verifications(self.results)
            )
        )

    def score(self) -> dict[str, float] | None:
        """Returns {checkpoint.best_metric: its value}, if this step was evaluated."""
        name = self.config.checkpoint.best_metric
        if not name or not self.steps.evaluates(self.done):
            return None
        return {name: evaluators.metrics(self.results)[name]}

    def save(self, score: dict[str, float] | None = None) -> None:
        """Saves the state with the score of this step's evaluation, from `score`."""
        checkpoint.save(self.manager, self.state, self.dataset, score)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Closes everything that the run holds open, however the block ends."""
        try:
            yield
        finally:
            diagnostics.disarm_watchdog()
            with ExitStack() as stack:  # closes in reverse order, even if one close() raises
                stack.callback(self.terminal.close)
                stack.callback(self.log.close)
                stack.callback(checkpoint.close, self.manager)
                stack.callback(self.trace.close)
                stack.callback(self.batches.close)
