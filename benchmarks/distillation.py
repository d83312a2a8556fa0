"""Measure the gain from a teacher: lfw_tiny with and without one, at equal and doubled epochs.

Each run is a separate process whose workdir is kept, so the same command resumes after an
interruption without repeating work. Incomplete runs are left out of table and picture.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from arcface_jax.data.pairs.opening import open_file
from arcface_jax.errors import UserError
from arcface_jax.evaluation import verification
from arcface_jax.inference.open_model import open_path
from benchmarks import pages

BEGIN = "<!-- begin: python -m benchmarks distillation -->"
DOCS = Path(__file__).parents[1] / "docs"
EPOCHS = 5
_RESULT = "result.json"
_PICTURE = "![Accuracy after each epoch; dashed: ten epochs](images/distillation.png)"
_METRICS = ("accuracy", "tar@far=1e-2")
_NAMES = {
    "alone": "labels only",
    "taught": "labels and teacher",
    "compatible": "compatible, 128 numbers",
}


class Case(NamedTuple):
    """One run to make."""

    kind: str
    """alone, taught (the recipe with the teacher) or compatible."""
    seed: int
    epochs: int = EPOCHS

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.kind}_{self.seed}_{self.epochs}"

    @property
    def options(self) -> list[str]:
        """Options of `arcface-jax train`, except data and teacher."""
        recipe = "lfw_tiny" if self.kind == "alone" else "lfw_tiny_from_teacher"
        more = ["--distill.compatible", "--model.embedding-size", "128"]
        return [
            recipe,
            *("--seed", str(self.seed), "--schedule.epochs", str(self.epochs)),
            *("--evaluation.every-epochs", "1"),
            *(more if self.kind == "compatible" else []),
        ]


def cases(seeds: int) -> list[Case]:
    """Returns the runs, the most informative first."""
    first = [Case("taught", 0), Case("alone", 0), Case("compatible", 0)]
    others = [Case(kind, seed) for seed in range(1, seeds) for kind in ("taught", "alone")]
    longer = [Case(kind, 0, 2 * EPOCHS) for kind in ("taught", "alone")]
    return [*first, *others, *longer]


class Run(NamedTuple):
    """A complete run."""

    case: Case
    steps: tuple[int, ...]
    """Step of each evaluation."""
    accuracy: tuple[float, ...]
    """Accuracy on lfw_dev.bin at each evaluation."""
    tar: float
    """Final TAR at FAR 1e-2."""
    mixed: float | None
    """Accuracy with the teacher embedding the first image of each pair; None if the spaces
    differ."""


def train(case: Case, *, data: Path, teacher: Path, output: Path) -> None:
    """Trains, or resumes; does nothing if the run is complete.

    Raises:
      UserError: the run failed.
    """
    workdir = output / case.name
    if (workdir / _RESULT).is_file():
        return
    options = [*case.options, "--data.path", str(data), "--workdir", str(workdir)]
    if case.kind != "alone":
        options += ["--distill.teacher", str(teacher), "--distill.cache", str(output / "cache")]
    done = subprocess.run([sys.executable, "-m", "arcface_jax", "train", *options], check=False)
    if done.returncode:
        raise UserError(f"the run {workdir} ended with code {done.returncode}: see its output")
    mixed = None
    if case.kind == "compatible":
        mixed = _mixed_accuracy(workdir, data=data, teacher=teacher)
    (workdir / _RESULT).write_text(json.dumps({"mixed": mixed}) + "\n")


def _mixed_accuracy(workdir: Path, *, data: Path, teacher: Path) -> float:
    across = verification.across(open_path(workdir), enrolled=open_path(teacher))
    return verification.verify(across, open_file(str(data / "lfw_dev.bin"))).accuracy


def read(case: Case, output: Path) -> Run | None:
    """Reads a run's measurements; None if it is incomplete."""
    workdir = output / case.name
    if not (workdir / _RESULT).is_file():
        return None
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval/lfw_dev/accuracy" in line]
    accuracy, tar = (f"eval/lfw_dev/{name}" for name in _METRICS)
    return Run(
        case,
        tuple(line["step"] for line in evaluated),
        tuple(line[accuracy] for line in evaluated),
        evaluated[-1][tar],
        json.loads((workdir / _RESULT).read_text())["mixed"],
    )


def table(runs: list[Run]) -> str:
    """Returns the Markdown table: a line for each kind and length, with means and single seeds."""
    lines = [
        "| training | epochs | seeds | accuracy | TAR at FAR 1e-2 | accuracy against the teacher |",
        "|---|---|---|---|---|---|",
    ]
    for kind, epochs in dict.fromkeys((run.case.kind, run.case.epochs) for run in runs):
        same = [run for run in runs if (run.case.kind, run.case.epochs) == (kind, epochs)]
        mixed = same[0].mixed
        lines.append(
            f"| {_NAMES[kind]} | {epochs} | {len(same)} | {_each(same, 'accuracy')} | "
            f"{_each(same, 'tar')} | {'' if mixed is None else f'{mixed:.3f}'} |"
        )
    return "\n".join(lines)


def _each(runs: list[Run], name: str) -> str:
    values = [run.accuracy[-1] if name == "accuracy" else run.tar for run in runs]
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def gains(runs: list[Run]) -> dict[str, float]:
    """Returns mean differences over the seeds that have both runs, at equal epochs."""
    by_case = {run.case: run for run in runs}
    pairs = [
        (by_case[Case("taught", seed)], by_case[Case("alone", seed)])
        for seed in range(len(runs))
        if {Case("taught", seed), Case("alone", seed)} <= by_case.keys()
    ]
    if not pairs:
        return {}
    return {
        "seeds": len(pairs),
        "gain/accuracy": float(np.mean([a.accuracy[-1] - b.accuracy[-1] for a, b in pairs])),
        "gain/tar@far=1e-2": float(np.mean([a.tar - b.tar for a, b in pairs])),
    }


def draw(runs: list[Run], path: Path) -> None:
    """Plots accuracy over the epochs, a line per run."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    colors = {"alone": "tab:gray", "taught": "tab:blue", "compatible": "tab:green"}
    named: set[str] = set()
    for run in runs:
        per_epoch = run.steps[-1] / run.case.epochs
        kind = run.case.kind
        axes.plot(
            np.array(run.steps) / per_epoch,
            run.accuracy,
            color=colors[kind],
            linestyle="-" if run.case.epochs == EPOCHS else "--",
            label=None if kind in named else _NAMES[kind],
        )
        named.add(kind)
    axes.set(xlabel="epoch", ylabel="accuracy on lfw_dev.bin")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def measure(
    *, data: Path, teacher: Path, output: Path, seeds: int, write: bool
) -> dict[str, float]:
    """Makes the missing runs; returns the mean gains.

    Args:
      data: the folder of LFW's train.rec and lfw_dev.bin.
      teacher: any model file or workdir.
      output: folder of the runs.
      seeds: number of seeds at equal epochs.
      write: whether to replace the table and the picture of docs/distillation.md after each run.

    Raises:
      UserError: a run failed.
    """
    planned = cases(seeds)
    for case in planned:
        train(case, data=data, teacher=teacher, output=output)
        runs = [run for each in planned if (run := read(each, output))]
        if write:
            draw(runs, DOCS / "images" / "distillation.png")
            pages.replace(DOCS / "distillation.md", f"{table(runs)}\n\n{_PICTURE}", begin=BEGIN)
        print(table(runs), gains(runs), sep="\n", flush=True)
    return gains([run for each in planned if (run := read(each, output))])
