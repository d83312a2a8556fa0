"""Plot of ROC curves: TAR over FAR on a log axis."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from arcface_jax.evaluation.roc import Roc
from arcface_jax.runtime.files import atomic_files
from arcface_jax.runtime.text import drawn


def draw(curves: Mapping[str, Roc], *, title: str, path: Path | None = None) -> Figure:
    """Draws curves as steps, from the lowest FAR that their pairs can measure to 1.

    Args:
      curves: by the name that the legend shows.
      title: above the picture.
      path: the PNG to write, where one is wanted.
    """
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axis = figure.subplots()
    lowest = min(1 / curve.false_accepts[-1] for curve in curves.values())
    for name, curve in curves.items():
        far = np.maximum(curve.far, lowest / 10)  # a log axis has no FAR of 0
        axis.step(far, curve.tar, where="post", label=drawn(name))
    axis.set_xscale("log")
    axis.set_xlim(min(lowest, 0.1), 1)  # a single different pair measures no FAR below 1
    axis.set_ylim(min(curve.tar[curve.far <= lowest].max() for curve in curves.values()) - 0.05, 1)
    axis.set_ylim(max(0.0, axis.get_ylim()[0]), 1.005)
    axis.set_xlabel("FAR: different people accepted")
    axis.set_ylabel("TAR: one person accepted")
    axis.set_title(drawn(title))
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="lower right")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_files(path) as part:
            figure.savefig(part, dpi=110)
    return figure
