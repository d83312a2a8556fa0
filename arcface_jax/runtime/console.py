"""Progress of a run on the terminal: a bar, or plain lines if stderr is not a terminal."""

import math
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from arcface_jax.runtime import launch, streams
from arcface_jax.runtime.metrics import train_accuracy
from arcface_jax.runtime.text import shown


class Terminal:
    """A progress bar, or plain lines if the output is not a terminal."""

    def __init__(self, *, total_steps: int, start: int):
        self._console = Console(file=streams.plain(sys.stderr), quiet=not launch.is_first())
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
        """Advances the bar by one step."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Shows the metrics of a log step."""
        status = [f"loss {values['train/loss']:.3f}"]
        accuracy = train_accuracy(values)
        if not math.isnan(accuracy):
            status.append(f"acc {accuracy:.3f}")
        if "train/teacher_cosine" in values:
            status.append(f"teacher {values['train/teacher_cosine']:.3f}")
        if "perf/images_per_sec" in values:
            status.append(f"{values['perf/images_per_sec']:.0f} img/s")
            status.append(f"data wait {values['perf/data_wait_share']:.0%}")
        if self._bar is not None:
            self._bar.update(self._task, status="  ".join(status))
        else:
            left = ""
            if "perf/steps_per_sec" in values:
                seconds = (self._total - step) / values["perf/steps_per_sec"]
                left = f"  {int(seconds // 60)}:{int(seconds % 60):02d} left"
            self.print(f"step {step}/{self._total}  {'  '.join(status)}{left}")

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(shown(text), markup=False, highlight=False, emoji=False, soft_wrap=True)

    def print_all(self, *texts: str | None) -> None:
        """Prints a line for each text that is not None."""
        for text in filter(None, texts):
            self.print(text)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
