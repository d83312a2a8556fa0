"""Where numbers go while training: metrics.jsonl, other writers, the terminal; and the clock."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from arcface_jax import distributed, storage
from arcface_jax.writers import Csv, TensorBoard, Wandb, Writer

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
        path, first = workdir / METRICS, distributed.is_first()
        self._workdir = workdir
        with storage.in_words(workdir, workdir):
            self._kept = (
                [line for line in read(path) if line["step"] <= start] if path.exists() else []
            )
            # In one move, so that a run that is killed here keeps its history.
            if first:
                kept = "".join(json.dumps(line) + "\n" for line in self._kept)
                storage.write_whole(path, kept)
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
        with storage.in_words(self._workdir, self._workdir / METRICS):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        for writer in self._writers:
            with storage.in_words(self._workdir, writer.path):
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
                all_of_them.enter_context(storage.in_words(self._workdir, writer.path))
                all_of_them.callback(writer.close)
            all_of_them.enter_context(storage.in_words(self._workdir, self._workdir / METRICS))
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


class Terminal:
    """A progress bar, or plain lines where the output is not a terminal."""

    def __init__(self, *, total_steps: int, start: int):
        self._console = Console(file=sys.stderr, quiet=not distributed.is_first())
        self._total = total_steps
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task(
                "train", total=total_steps, completed=start, status="compiling"
            )
            self._bar.start()

    def advance(self) -> None:
        """A step was handed to the devices."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def show(self, step: int, values: dict[str, float]) -> None:
        """The numbers of a log step."""
        words = [f"loss {values['train/loss']:.3f}", f"acc {train_accuracy(values):.3f}"]
        if "perf/images_per_sec" in values:
            words.append(f"{values['perf/images_per_sec']:.0f} img/s")
            words.append(f"data wait {values['perf/data_wait_share']:.0%}")
        if self._bar is not None:
            self._bar.update(self._task, status="  ".join(words))
        else:
            left = ""
            if "perf/steps_per_sec" in values:
                seconds = (self._total - step) / values["perf/steps_per_sec"]
                left = f"  {int(seconds // 60)}:{int(seconds % 60):02d} left"
            self.say(f"step {step}/{self._total}  {'  '.join(words)}{left}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say_all(self, *texts: str | None) -> None:
        """A line for each text that there is."""
        for text in filter(None, texts):
            self.say(text)

    def close(self) -> None:
        """Takes the bar down."""
        if self._bar is not None:
            self._bar.stop()
