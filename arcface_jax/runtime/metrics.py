"""Write the metrics of a run: metrics.jsonl, TensorBoard, CSV, Weights & Biases."""

import csv
import hashlib
import math
import os
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from arcface_jax.errors import ConfigError, install
from arcface_jax.runtime import checksums, damaged, foreign, launch, strict_json
from arcface_jax.runtime.files import atomic, open_own, reporting_disk_errors, write_atomic
from arcface_jax.runtime.text import shown

METRICS = "metrics.jsonl"
# TensorBoard events are flushed to disk this often.
_FLUSH_SECONDS = 30.0


class MetricsFile:
    """WORKDIR/metrics.jsonl, one line per log step and evaluation, and other writers.

    Args:
      workdir: workdir of the run.
      start: step that the run resumes from; lines of later steps, which are trained again, are
        dropped.
      tensorboard: whether to write TensorBoard events too.
      csv: whether to write metrics.csv too.
      wandb: project of Weights & Biases to write to; none if empty.
      settings: settings of the run, for W&B.

    Only the first process of a run writes.
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
            lines, problem = _history(path, checksums.history(workdir, start), start=start)
            self._kept = [line for line in lines if line["step"] <= start]
            if first and problem:
                aside = ""
                if path.exists():
                    aside = f"; the whole file is kept as {damaged.keep_copy(path, workdir)}"
                damaged.warn([f"{problem}{aside}"])
            # Atomically, so that a run that is killed here keeps its history.
            if first:
                kept = "".join(strict_json.dumps(line) + "\n" for line in self._kept)
                write_atomic(path, kept)
            if first and tensorboard:
                self._writers.append(TensorBoard(workdir, start=start))
            if first and csv:
                self._writers.append(Csv(workdir, kept=self._kept))
            if first and wandb:
                self._writers.append(Wandb(workdir, project=wandb, settings=settings or {}))
            self._file = open_own(path if first else Path(os.devnull), "a")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line; it is on disk when this returns. NaN and infinity become null.

        Raises:
          CheckpointError: the line cannot be written.
        """
        with reporting_disk_errors(self._workdir, self._workdir / METRICS):
            self._file.write(strict_json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        for writer in self._writers:
            with reporting_disk_errors(self._workdir, writer.path):
                writer.write(step, values)

    def stored(self, prefix: str) -> dict[str, float]:
        """Returns the last values of names with this prefix, written before the run resumed."""
        return {
            name: value
            for line in self._kept
            for name, value in line.items()
            if name.startswith(prefix)
        }

    def has(self, step: int, prefix: str) -> bool:
        """Returns whether names with this prefix were written at a step before the run resumed."""
        return any(
            line["step"] == step and any(name.startswith(prefix) for name in line)
            for line in self._kept
        )

    def close(self) -> None:
        """Flushes and closes all writers, even if one of them fails."""
        with ExitStack() as writers:
            for writer in self._writers:
                writers.enter_context(reporting_disk_errors(self._workdir, writer.path))
                writers.callback(writer.close)
            writers.enter_context(reporting_disk_errors(self._workdir, self._workdir / METRICS))
            writers.callback(self._file.close)


def _history(
    path: Path, noted: tuple[int, str] | None, *, start: int
) -> tuple[list[dict[str, Any]], str | None]:
    """Reads metrics.jsonl up to the first damaged line; also returns what is wrong with the file.

    Args:
      path: path of the file; it may be missing.
      noted: bytes and BLAKE2b hash of the file's content up to step `start`, if known.
      start: the step that the run resumes from.
    """
    content = path.read_bytes() if path.exists() else b""
    lines, end = whole_lines(content)
    if start and not content:
        problem = "empty" if path.exists() else "missing"
        return [], f"{path} is {problem}: the metrics up to step {start} are lost"
    if end < len(content) and not _is_cut_line(content[end:]):
        return lines, f"{path} is damaged from line {len(lines) + 1} on, and is cut there"
    if end < len(content) and start and noted is None:
        return lines, f"{path} ends in an incomplete line, which is dropped"
    length, expected = noted or (0, hashlib.blake2b(b"").hexdigest())
    if end < length:
        return lines, f"{path} ends before step {start}: metrics after line {len(lines)} are lost"
    if hashlib.blake2b(content[:length]).hexdigest() != expected:
        return (
            lines,
            f"{path} differs from what was written up to step {start}: some values are wrong",
        )
    return lines, None


def _is_cut_line(rest: bytes) -> bool:
    """Returns whether this is the partial line of a process that was killed while writing."""
    return b"\n" not in rest


def whole_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Parses JSON Lines up to the first damaged line; also returns the length in bytes.

    Each line is an object with an integer "step"; null becomes NaN.
    """
    lines, end = [], 0
    for text in content.splitlines(keepends=True):
        try:
            line = foreign.parse_json(text, object_hook=_null_as_nan)
        except ValueError:
            break
        if not (isinstance(line, dict) and type(line.get("step")) is int):
            break
        lines.append(line)
        end += len(text)
    return lines, end


def read(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl up to the first damaged or truncated line."""
    return whole_lines(path.read_bytes())[0]


def _null_as_nan(line: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in line.items()}


def train_accuracy(values: Mapping[str, float]) -> float:
    """Returns the accuracy of a log step, among all classes or among those that Partial FC sampled.

    NaN if the run has no head.
    """
    name = "train/accuracy"
    return values[name] if name in values else values.get(f"{name}_sampled", math.nan)


class Writer(Protocol):
    """Receives each log step and evaluation."""

    path: Path
    """The file or folder to write."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step; may be called several times for one step."""
        ...

    def close(self) -> None:
        """Flushes and closes the writer."""
        ...


class TensorBoard:
    """WORKDIR/tensorboard; events already there from `start` + 1 on are discarded."""

    def __init__(self, workdir: Path, *, start: int):
        # Imported here, because reading a run's metrics does not need TensorBoard or protobuf.
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self._proto: Any = event_pb2  # its attributes are created at import
        self._scalar = scalar
        self.path = workdir / "tensorboard"
        self.path.mkdir(exist_ok=True)
        # Not SummaryWriter: a full disk kills its thread, and the run would wait for it forever.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._events = RecordWriter(str(self.path / name))
        self._flushed = 0.0
        self._add(0, file_version="brain.Event:2")
        begin = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._add(start + 1, session_log=begin)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one scalar for each value."""
        for name, value in values.items():
            self._add(step, summary=self._scalar(shown(name), value))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        self._events.close()

    def _add(self, step: int, **what: Any) -> None:
        event = self._proto.Event(wall_time=time.time(), step=step, **what)
        self._events.write(event.SerializeToString())


class Csv:
    """WORKDIR/metrics.csv: a row for each line of metrics.jsonl, a column for each name.

    Args:
      workdir: workdir of the run.
      kept: lines of metrics.jsonl that a resumed run keeps; the file starts with them.
    """

    def __init__(self, workdir: Path, *, kept: list[dict[str, float]]):
        self.path = workdir / "metrics.csv"
        self._names = ["step"]
        self._add_columns(kept)
        self._rewrite(kept)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a row; new names rewrite the file with added columns."""
        line = {"step": step, **values}
        if self._add_columns([line]):
            self._file.close()
            with open_own(self.path, "r", newline="") as file:
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
        """Rewrites the file atomically, so that a run killed here keeps its history."""
        with atomic(self.path, newline="") as file:
            whole = csv.DictWriter(file, self._names)
            whole.writeheader()
            whole.writerows(lines)
        self._file = open_own(self.path, "a", newline="")
        self._lines = csv.DictWriter(self._file, self._names)


class Wandb:
    """A run of Weights & Biases, resumed together with the workdir's run.

    Args:
      workdir: workdir of the run; its file wandb_id has W&B's id of the run.
      project: W&B project.
      settings: the configuration by dotted name, shown next to the curves.

    Raises:
      ConfigError: the package is not installed, or W&B refuses the run.
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
        if not (known.exists() and known.read_bytes().strip().isalnum()):
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
                f"logging.wandb {project}: {error}. Log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs at this step; W&B keeps its values of later steps."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finishes the W&B run once everything is uploaded."""
        self._run.finish()
