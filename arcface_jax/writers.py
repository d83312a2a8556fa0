"""Where the numbers of a run go besides metrics.jsonl: CSV, TensorBoard, Weights & Biases."""

import csv
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from arcface_jax.errors import ConfigError

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
        part = self.path.with_suffix(".csv.part")
        self._file = part.open("w", newline="")
        self._lines = csv.DictWriter(self._file, self._names)
        self._lines.writeheader()
        self._lines.writerows(lines)
        self._file.flush()
        part.replace(self.path)


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
                "pip install 'arcface-jax[wandb]'"
            ) from error
        self.path = workdir / "wandb"
        known = workdir / "wandb_id"
        if not known.exists():
            known.write_text(uuid.uuid4().hex[:12])
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
