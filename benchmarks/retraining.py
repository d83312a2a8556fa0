"""Measure the gain from cleaning: lfw_tiny trained on planted label errors and on the cleaned set.

For each seed, errors are planted as in `benchmarks.cleaning`, `data clean` detects them, every
finding above the thresholds is accepted as a reviewer would, `data apply` writes the cleaned set,
and all sets train the same recipe. Everything is kept in the output folder, so the same command
resumes after an interruption without repeating work.
"""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.cleaning import apply, embedding, files, pipeline
from arcface_jax.config import DataConfig
from arcface_jax.data.opening import open_source
from arcface_jax.data.source import Source
from arcface_jax.data.tools import packing
from arcface_jax.errors import UserError
from arcface_jax.evaluation.embed import Model
from benchmarks import cleaning, pages

BEGIN = "<!-- begin: python -m benchmarks retraining -->"
PAGE = Path(__file__).parents[1] / "docs" / "cleaning.md"
SETS = ("original", "noisy", "cleaned")
_METRICS = ("eval/lfw_dev/accuracy", "eval/lfw_dev/tar@far=1e-2")


class Run(NamedTuple):
    """One training run."""

    set: str
    """One of `SETS`."""
    seed: int
    images: int
    identities: int
    accuracy: float
    """Final accuracy on lfw_dev.bin."""
    tar: float
    """TAR at FAR 1e-2."""


def measure(model: Model, data: Path, output: Path, *, seeds: int, write: bool) -> list[Run]:
    """Makes the missing sets and runs.

    Args:
      model: the model for cleaning.
      data: folder of LFW's train.rec and lfw_dev.bin.
      output: folder of sets and runs.
      seeds: number of random plantings, each with its own training seed.
      write: whether to replace the table of docs/cleaning.md after each seed.

    Returns:
      All complete runs.

    Raises:
      UserError: a run failed.
    """
    source = _open(data)
    images = embedding.embed(
        model, embedding.of_source(source), output / "embeddings", name="the training set"
    ).identities(source.labels(), source.num_classes)
    runs = []
    for seed in range(seeds):
        planted = cleaning.plant(images, seed=seed, divided=200, joined=100, share=0.1)
        folders = {"original": data, "noisy": output / f"noisy_{seed}"}
        folders["cleaned"] = output / f"cleaned_{seed}"
        _write_noisy(source, planted, folders["noisy"])
        _write_cleaned(model, folders["noisy"], folders["cleaned"], seed=seed)
        for name in SETS:
            workdir = output / f"run_{name}_{seed}"
            _train(folders[name], data / "lfw_dev.bin", workdir, seed=seed)
            runs.append(_read(name, seed, folders[name], workdir))
        if write:
            pages.replace(PAGE, table(runs), begin=BEGIN)
        print(table(runs), flush=True)
    return runs


def table(runs: list[Run]) -> str:
    """Returns a Markdown table: a row for each set, with means and single seeds."""
    rows = [
        "| trained on | images | identities | seeds | accuracy | TAR at FAR 1e-2 |",
        "|---|---|---|---|---|---|",
    ]
    for name in SETS:
        same = [run for run in runs if run.set == name]
        if same:
            counts = (
                f"{round(np.mean([getattr(run, of) for run in same])):,}" for of in Run._fields[2:4]
            )
            values = (_each([getattr(run, of) for run in same]) for of in Run._fields[4:])
            rows.append("| " + " | ".join([name, *counts, str(len(same)), *values]) + " |")
    return "\n".join(rows)


def _each(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def _open(path: Path) -> Source:
    return open_source(DataConfig(path=str(path)), seed=0)


def _write_noisy(source: Source, planted: cleaning.Planted, folder: Path) -> None:
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    labels = planted.images.labels
    present, dense = np.unique(labels, return_inverse=True)  # joining two people removes one label
    order = np.argsort(dense, kind="stable")
    selection = packing.Selection(order, dense[order].astype(np.int32), len(present))
    packing.pack(source, selection, folder)
    (folder / "done").touch()


def _write_cleaned(model: Model, noisy: Path, folder: Path, *, seed: int) -> None:
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    source, found = _open(noisy), folder.with_name(f"clean_{seed}")
    findings, _ = pipeline.by_images(model, source, found, seed=seed)
    assert findings.mixed is not None and findings.outliers is not None
    mixed = np.flatnonzero(findings.mixed.mixed).tolist()
    _decide(found, files.MIXED, dict.fromkeys(mixed, "drop"))
    decisions = {
        row: "relabel" if findings.outliers.suggested[row] >= 0 else "drop"
        for row in np.flatnonzero(findings.outliers.wrong).tolist()
    }
    _decide(found, files.IMAGES, decisions)
    apply.apply(source, found, folder, actions=apply.Actions(merge=True, drop=True, relabel=True))
    (folder / "done").touch()


def _decide(folder: Path, name: str, decisions: dict[int, str]) -> None:
    """Sets decisions by line, as a reviewer would in a spreadsheet."""
    path = folder / name
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    for line, decision in decisions.items():
        rows[line][header.index("decision")] = decision
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def _train(data: Path, pairs: Path, workdir: Path, *, seed: int) -> None:
    if (workdir / "done").exists():
        return
    options = ["--data.path", str(data), "--evaluation.targets", str(pairs), "--seed", str(seed)]
    command = [sys.executable, "-m", "arcface_jax", "train", "lfw_tiny", *options]
    done = subprocess.run([*command, "--workdir", str(workdir)], check=False)
    if done.returncode:
        raise UserError(f"the run {workdir} ended with code {done.returncode}: see its output")
    (workdir / "done").touch()


def _read(name: str, seed: int, data: Path, workdir: Path) -> Run:
    source = _open(data)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if _METRICS[0] in line][-1]
    return Run(name, seed, len(source), source.num_classes, *(last[of] for of in _METRICS))
