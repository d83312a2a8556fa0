"""Where the numbers of a run go besides metrics.jsonl: CSV, TensorBoard, Weights & Biases."""

import csv
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from arcface_jax.errors import ConfigError


class Writer(Protocol):
    """Takes each log step and evaluation."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of one step; several calls may name the same."""
        ...

    def close(self) -> None:
        """What was taken is where it belongs when this returns."""
        ...


class TensorBoard:
    """WORKDIR/tensorboard; events of `start` + 1 and later that it holds are taken back."""

    def __init__(self, workdir: Path, *, start: int):
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A scalar for each number."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes."""
        self._events.close()


class Csv:
    """WORKDIR/metrics.csv: a line for each line of metrics.jsonl, a column for each name.

    Args:
      workdir: of the run.
      kept: the lines of metrics.jsonl that a resumed run keeps; the file begins with them.
    """

    def __init__(self, workdir: Path, *, kept: list[dict[str, float]]):
        self._path = workdir / "metrics.csv"
        self._names = ["step"]
        self._add_columns(kept)
        self._rewrite(kept)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line; where it has new names the file is written anew with their columns."""
        line = {"step": step, **values}
        if self._add_columns([line]):
            self._file.close()
            with self._path.open(newline="") as file:
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
        part = self._path.with_suffix(".csv.part")
        self._file = part.open("w", newline="")
        self._lines = csv.DictWriter(self._file, self._names)
        self._lines.writeheader()
        self._lines.writerows(lines)
        self._file.flush()
        part.replace(self._path)


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
