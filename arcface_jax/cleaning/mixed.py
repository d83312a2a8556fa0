"""Find identities that contain two people.

The images of an identity are divided by 2-means on the sphere. Two people form compact, distant
halves: the score is the smaller mean cosine within a half minus the mean cosine across. Both halves
need two images, so a single wrong label does not count as a second person. It runs on the
unmodified set: dropping outliers first would remove the smaller person of most mixed identities.
"""

from typing import NamedTuple

import numpy as np

from arcface_jax.cleaning import thresholds
from arcface_jax.cleaning.identities import Identities
from arcface_jax.cleaning.thresholds import Threshold
from arcface_jax.evaluation.embeddings import normalize

PRECISION = 0.93
_ROUNDS = 8
_FEWEST = 4
_JOINED = 1000  # pairs of identities joined to simulate mixed ones
_COMPACT = 0.4  # share of the median cosine within identities that halves need
_APART = 0.98  # quantile of the mean cosines of two people, the limit across halves
_LARGEST = 400  # images of an identity to consider


class Mixed(NamedTuple):
    """Identities that may contain two people, the clearest first."""

    label: np.ndarray
    """(m,) int64."""
    score: np.ndarray
    """(m,) float64: within minus cross."""
    within: np.ndarray
    """(m,) float64: smaller mean cosine within a half."""
    cross: np.ndarray
    """(m,) float64: mean cosine across the halves."""
    halves: list[np.ndarray]
    """Image numbers of the smaller half of each identity."""
    mixed: np.ndarray
    """(m,) bool: above the threshold."""
    threshold: Threshold


class Division(NamedTuple):
    """An identity divided into two halves."""

    second: np.ndarray
    """(n,) bool: whether an image is in the smaller half."""
    within: float
    cross: float

    @property
    def score(self) -> float:
        """Above 0 if the halves are compact and distant."""
        return self.within - self.cross


def find(images: Identities, *, seed: int) -> Mixed:
    """Finds identities that look like two people.

    Args:
      images: the training set.
      seed: random seed for joining identities to find the threshold.
    """
    _, cosines = within_cosines(images)
    compact = _COMPACT * float(np.median(cosines)) if len(cosines) else 1.0
    joined = _joined(images, compact=compact, seed=seed)
    true = np.array([division.score for division in joined])
    apart = float(np.quantile([division.cross for division in joined], _APART)) if joined else 1.0
    found = []
    for label, rows in images.each(least=_FEWEST):
        division = divide(images.embeddings[rows])
        if division and division.within >= compact and division.cross <= apart:
            found.append((label, rows, division))
    score = np.array([division.score for _, _, division in found])
    threshold = thresholds.choose(score, true, precision=PRECISION, least=0.03)
    order = np.argsort(-score, kind="stable")
    flagged = int((score >= threshold.threshold).sum())
    order = order[: thresholds.worth_a_look(score[order], found=flagged, lowest=0.0)]
    chosen = [found[place] for place in order.tolist()]
    return Mixed(
        label=np.array([label for label, _, _ in chosen], np.int64),
        score=score[order],
        within=np.array([division.within for _, _, division in chosen]),
        cross=np.array([division.cross for _, _, division in chosen]),
        halves=[rows[: len(d.second)][d.second] for _, rows, d in chosen],
        mixed=score[order] >= threshold.threshold,
        threshold=threshold,
    )


def divide(embeddings: np.ndarray) -> Division | None:
    """Divides an identity by 2-means; returns None if a half has fewer than two images.

    Args:
      embeddings: (n, D) float32 of length 1; only the first 400 are used.
    """
    unit = embeddings[:_LARGEST]
    cosine = unit @ unit.T
    a, b = np.unravel_index(int(np.argmin(cosine)), cosine.shape)
    first, second = unit[a], unit[b]
    side = unit @ first > unit @ second
    for _ in range(_ROUNDS):
        if side.all() or not side.any():
            return None
        first, second = normalize(np.stack([unit[side].mean(0), unit[~side].mean(0)]))
        before, side = side, unit @ first > unit @ second
        if np.array_equal(before, side):
            break
    sizes = int(side.sum()), int((~side).sum())
    if min(sizes) < 2:
        return None
    within = min(_within(cosine[part][:, part]) for part in (side, ~side))
    smaller = side if sizes[0] <= sizes[1] else ~side
    return Division(smaller, within, float(cosine[side][:, ~side].mean()))


def within_cosines(images: Identities) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean cosine of two images for identities with at least two images.

    For n unit vectors with sum s it is (|s|^2 - n) / (n (n - 1)).

    Returns:
      labels (k,) int64, and cosines (k,) float64.
    """
    counts = images.counts()
    labels = np.flatnonzero(counts >= 2)
    n = counts[labels].astype(np.float64)
    squares = np.square(images.sums()[labels].astype(np.float64)).sum(axis=1)
    return labels, (squares - n) / (n * (n - 1))


def _within(cosine: np.ndarray) -> float:
    count = len(cosine)
    return float((cosine.sum() - np.trace(cosine)) / (count * (count - 1)))


def _joined(images: Identities, *, compact: float, seed: int) -> list[Division]:
    """Joins random pairs of compact identities and divides them, skipping undividable ones."""
    random = np.random.default_rng(seed)
    order, starts = images.sorted()
    labels, within = within_cosines(images)
    several = labels[within >= compact]
    count = min(_JOINED, len(several) // 2)
    chosen = random.permutation(several)[: 2 * count].reshape(2, count)
    divisions = []
    for a, b in chosen.T.tolist():
        rows = np.concatenate(
            [order[starts[label] : starts[label + 1]][: _LARGEST // 2] for label in (a, b)]
        )
        divisions.append(divide(images.embeddings[rows]))
    return [division for division in divisions if division is not None]
