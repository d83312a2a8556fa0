"""Plots of a run: training curves, and a sheet of verification pairs."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.runtime import metrics
from arcface_jax.runtime.files import atomic_files
from arcface_jax.runtime.text import drawn


def training_curves(workdir: Path) -> Path | None:
    """Draws WORKDIR/metrics.jsonl as WORKDIR/eval/curves.png: loss, accuracies, learning rate.

    Returns:
      The picture's path, or None if no step was logged.
    """
    lines = metrics.read(workdir / metrics.METRICS)
    steps = [line for line in lines if "train/loss" in line]
    if not steps:
        return None
    figure, (loss, accuracy, rate) = _figure(1, 3, width=12, height=3.6)
    x = [line["step"] for line in steps]
    loss.plot(x, [line["train/loss"] for line in steps], color="tab:blue")
    loss.set_title("training loss, margin included")
    values = [metrics.train_accuracy(line) for line in steps]
    accuracy.plot(x, values, color="tab:blue", label="train, without margin")
    names = {name for line in lines for name in line if name.startswith("eval/")}
    verified = sorted(name for name in names if name.endswith("/accuracy"))
    for number, name in enumerate(verified, start=1):
        evaluated = [line for line in lines if name in line]
        label = drawn(name.removeprefix("eval/").removesuffix("/accuracy"))
        accuracy.plot(
            [line["step"] for line in evaluated],
            [line[name] for line in evaluated],
            color=f"C{number}",
            marker="o",
            label=f"{label}, verification: {evaluated[-1][name]:.4f}",
        )
    accuracy.set_title("accuracy")
    accuracy.set_ylim(0, 1.02)
    accuracy.legend(loc="lower right", fontsize=8)
    rate.plot(x, [line["train/lr"] for line in steps], color="tab:gray")
    rate.set_title("learning rate")
    for axis in (loss, accuracy, rate):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    return _save(figure, workdir / "eval" / "curves.png")


def pair_sheet(
    pairs: PairSet, distance: np.ndarray, *, threshold: float, path: Path, examples: int = 5
) -> Path:
    """Draws pairs of a set with their cosines: typical ones, and wrongly decided ones.

    Args:
      pairs: the set.
      distance: (n,) squared distances of its pairs.
      threshold: squared distance below which a pair counts as the same.
      path: the PNG to write.
      examples: pairs per row.
    """
    cosine = 1 - distance / 2
    called_same = distance < threshold
    rows = {
        "same person, recognized": pairs.same & called_same,
        "different people, told apart": ~pairs.same & ~called_same,
        "same person, missed": pairs.same & ~called_same,
        "different people, confused": ~pairs.same & called_same,
    }
    figure, axes = _figure(len(rows), examples, width=2.6 * examples, height=1.75 * len(rows))
    for line, (title, chosen) in zip(axes, rows.items(), strict=True):
        where = np.flatnonzero(chosen)
        for column, axis in enumerate(line):
            axis.axis("off")
            if column == 0:
                axis.set_title(
                    f"{title} ({len(where)})", loc="left", fontsize=10, fontweight="bold"
                )
            shown = min(examples, len(where))
            if column >= shown:
                continue
            # Spread over the set rather than its first few pairs.
            pair = where[column * len(where) // shown]
            axis.imshow(np.hstack([pairs.images[2 * pair], pairs.images[2 * pair + 1]]))
            axis.text(
                4,
                108,
                f"cosine {cosine[pair]:.2f}",
                color="white",
                fontsize=8,
                backgroundcolor="#0008",
            )
    return _save(figure, path)


def _figure(rows: int, columns: int, *, width: float, height: float):
    # A separate canvas: no window system and no global state of pyplot is involved.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=rows == 1)


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_files(path) as part:
        figure.savefig(part, dpi=110)
    return path
