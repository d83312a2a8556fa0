"""Metrics of a run: metrics.jsonl, TensorBoard, CSV, Weights & Biases; and the step clock."""

import csv
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from arcface_jax.errors import ConfigError, install
from arcface_jax.runtime import launch
from arcface_jax.runtime.files import atomic, reporting_disk_errors, write_atomic

METRICS = "metrics.jsonl"


class MetricsFile:
    """WORKDIR/metrics.jsonl, and what is asked for beside it: an entry for each log step and
    evaluation.

    Args:
      workdir: of the run.
      start: the step that the run resumes from; what an undone continuation wrote behind it is
        dropped.
      tensorboard: whether to write TensorBoard events too.
      csv: whether to write metrics.csv too.
      wandb: project of Weights & Biases to write to; none if empty.
      settings: of the run, for W&B.

    Of the processes of a run the first alone writes.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start: int,
        tensorboard: bool,
        csv: bool = False,
        wandb: str = "",
        settings: Mapping[str, Any] | None = None,
    ):
        self._writers: list[Writer] = []
        path, first = workdir / METRICS, launch.is_first()
        self._workdir = workdir
        with reporting_disk_errors(workdir, workdir):
            self._kept = (
                [line for line in read(path) if line["step"] <= start] if path.exists() else []
            )
            # In one move, so that a run that is killed here keeps its history.
            if first:
                kept = "".join(json.dumps(line) + "\n" for line in self._kept)
                write_atomic(path, kept)
            if first and tensorboard:
                self._writers.append(TensorBoard(workdir, start=start))
            if first and csv:
                self._writers.append(Csv(workdir, kept=self._kept))
            if first and wandb:
                self._writers.append(Wandb(workdir, project=wandb, settings=settings or {}))
            self._file = (path if first else Path(os.devnull)).open("a")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line, which is on disk when this returns.

        Raises:
          CheckpointError: the disk does not take it.
        """
        with reporting_disk_errors(self._workdir, self._workdir / METRICS):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        for writer in self._writers:
            with reporting_disk_errors(self._workdir, writer.path):
                writer.write(step, values)

    def stored(self, prefix: str) -> dict[str, float]:
        """The last values, by names of that beginning, which the run wrote before it resumed."""
        return {
            name: value
            for line in self._kept
            for name, value in line.items()
            if name.startswith(prefix)
        }

    def has(self, step: int, prefix: str) -> bool:
        """Whether the run wrote names of that beginning at a step before it resumed."""
        return any(
            line["step"] == step and any(name.startswith(prefix) for name in line)
            for line in self._kept
        )

    def close(self) -> None:
        """Flushes and closes all, whether or not the disk takes the last of it."""
        with ExitStack() as all_of_them:
            for writer in self._writers:
                all_of_them.enter_context(reporting_disk_errors(self._workdir, writer.path))
                all_of_them.callback(writer.close)
            all_of_them.enter_context(reporting_disk_errors(self._workdir, self._workdir / METRICS))
            all_of_them.callback(self._file.close)


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; one that was cut off while being written is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def train_accuracy(values: Mapping[str, float]) -> float:
    """The accuracy of a log step: among all classes, or among those that Partial FC drew."""
    name = "train/accuracy"
    return values[name] if name in values else values[f"{name}_sampled"]


class Clock:
    """Training time, and its parts spent waiting for data and for the devices, without pauses."""

    def __init__(self, *, global_batch_size: int):
        self._batch = global_batch_size
        self.restart()

    def restart(self) -> None:
        """Forgets what was timed so far."""
        self._start, self._steps = time.perf_counter(), 0
        self._waited = self._blocked = self._paused = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around every wait for a batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Around every wait for the devices."""
        start = time.perf_counter()
        yield
        self._blocked += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training: compilation, evaluation, saving."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def count_step(self) -> None:
        """A step was trained."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """The metrics since the last reading, `perf/...`; empty if no step was timed."""
        seconds = time.perf_counter() - self._start - self._paused
        steps, waited, blocked = self._steps, self._waited, self._blocked
        self.restart()
        if not steps or seconds <= 0:
            return {}
        return {
            "perf/images_per_sec": steps * self._batch / seconds,
            "perf/steps_per_sec": steps / seconds,
            "perf/data_wait_ms": 1e3 * waited / steps,
            "perf/data_wait_share": waited / seconds,
            "perf/host_ms": 1e3 * (seconds - blocked) / steps,
        }


_EVENTS: Any = event_pb2  # which gets its names when it is imported
# TensorBoard's events are put on the disk so often.
_FLUSH_SECONDS = 30.0


class Writer(Protocol):
    """Takes each log step and evaluation."""

    path: Path
    """What is written."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of one step; several calls may name the same."""
        ...

    def close(self) -> None:
        """What was taken is where it belongs when this returns."""
        ...


class TensorBoard:
    """WORKDIR/tensorboard; events of `start` + 1 and later that it holds are taken back."""

    def __init__(self, workdir: Path, *, start: int):
        self.path = workdir / "tensorboard"
        self.path.mkdir(exist_ok=True)
        # Not the SummaryWriter, whose thread dies of a full disk and leaves the run waiting for it.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._events = RecordWriter(str(self.path / name))
        self._flushed = 0.0
        self._add(0, file_version="brain.Event:2")
        begin = _EVENTS.SessionLog(status=_EVENTS.SessionLog.START)
        self._add(start + 1, session_log=begin)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A scalar for each number."""
        for name, value in values.items():
            self._add(step, summary=scalar(name, value))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        self._events.close()

    def _add(self, step: int, **what: Any) -> None:
        event = _EVENTS.Event(wall_time=time.time(), step=step, **what)
        self._events.write(event.SerializeToString())


class Csv:
    """WORKDIR/metrics.csv: a line for each line of metrics.jsonl, a column for each name.

    Args:
      workdir: of the run.
      kept: the lines of metrics.jsonl that a resumed run keeps; the file begins with them.
    """

    def __init__(self, workdir: Path, *, kept: list[dict[str, float]]):
        self.path = workdir / "metrics.csv"
        self._names = ["step"]
        self._add_columns(kept)
        self._rewrite(kept)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line; where it has new names the file is written anew with their columns."""
        line = {"step": step, **values}
        if self._add_columns([line]):
            self._file.close()
            with self.path.open(newline="") as file:
                self._rewrite(list(csv.DictReader(file)))
        self._lines.writerow(line)
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _add_columns(self, lines: list[dict[str, float]]) -> bool:
        new = [name for name in dict.fromkeys(n for line in lines for n in line)]
        new = [name for name in new if name not in self._names]
        self._names += new
        return bool(new)

    def _rewrite(self, lines: list[Any]) -> None:
        """In one move, so that a run that is killed here keeps its history."""
        with atomic(self.path, newline="") as file:
            whole = csv.DictWriter(file, self._names)
            whole.writeheader()
            whole.writerows(lines)
        self._file = self.path.open("a", newline="")
        self._lines = csv.DictWriter(self._file, self._names)


class Wandb:
    """A run of Weights & Biases that goes on when the workdir's run does.

    Args:
      workdir: of the run; wandb_id in it holds the name that W&B knows the run by.
      project: of W&B.
      settings: the configuration by dotted name, shown beside the curves.

    Raises:
      ConfigError: the package is not installed, or W&B does not take the run.
    """

    def __init__(self, workdir: Path, *, project: str, settings: Mapping[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                f"logging.wandb {project}: this needs the package of Weights & Biases: "
                f"{install('wandb')}"
            ) from error
        self.path = workdir / "wandb"
        known = workdir / "wandb_id"
        if not known.exists():
            write_atomic(known, uuid.uuid4().hex[:12])
        try:
            self._run = wandb.init(
                project=project,
                id=known.read_text().strip(),
                name=workdir.name,
                dir=str(workdir),
                config=dict(settings),
                resume="allow",
            )
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            raise ConfigError(
                f"logging.wandb {project}: {error}. Log in with `wandb login`, or keep the numbers "
                "on this machine with the environment variable WANDB_MODE=offline"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logged at this step; those that W&B already has of later steps stay as they are."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run there, and waits until all is sent."""
        self._run.finish()
