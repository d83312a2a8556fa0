"""Measure the arithmetic of evaluation: ten folds, normalization, ROC curves of millions."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.evaluation import roc, verification
from arcface_jax.machine import timing


class Row(NamedTuple):
    """One measurement."""

    what: str
    seconds: float
    """Median time."""


def measure(*, pairs: int, embedding_size: int, scores: int, repeats: int) -> list[Row]:
    """Times each part on random numbers distributed like scores.

    Args:
      pairs: pairs of a verification set, half of them of one person.
      embedding_size: D.
      scores: scores of the long ROC curve, half of them of one person.
      repeats: timed rounds.
    """
    rng = np.random.default_rng(0)
    plain, mirrored = (
        rng.normal(size=(2 * pairs, embedding_size)).astype(np.float32) for _ in range(2)
    )
    same = np.arange(pairs) % 2 == 0
    distance = np.clip(np.where(same, 1.0, 1.9) + rng.normal(0, 0.25, pairs), 0, 4)
    many_same = np.arange(scores) % 2 == 0
    many = np.where(many_same, 0.5, 0.0) + rng.normal(0, 0.2, scores)

    def flip_sum() -> np.ndarray:
        return verification.pair_distances(plain.astype(np.float64) + mirrored)

    set_of, long = f"{pairs:,} pairs", f"{scores:,} scores"
    runs: dict[str, Callable[[], object]] = {
        f"ten folds, {set_of}": lambda: verification.ten_fold(distance, same),
        f"TAR over ten folds, {set_of}": lambda: verification.ten_fold_tar(
            distance, same, far=verification.FOLD_FAR
        ),
        f"flip sum, normalization, distances, {set_of}, D = {embedding_size}": flip_sum,
        f"TAR at {len(verification.FARS)} FARs, {long}": lambda: (
            roc.tar_at_far(many, many_same, fars=verification.FARS) and None
        ),
        f"whole exact ROC curve, {long}": lambda: tuple(roc.roc(many, many_same)),
    }
    return [Row(what, seconds) for what, seconds in timing.in_turn(runs, repeats=repeats).items()]


def write(folder: Path, rows: Sequence[Row], *, machine: dict) -> Path:
    """Writes FOLDER/evaluation.json, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation.json"
    measured = {row.what: row.seconds for row in rows}
    path.write_text(json.dumps({"machine": machine, "seconds": measured}, indent=2) + "\n")
    return path
