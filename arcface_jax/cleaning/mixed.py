"""Identities that hold two people.

The images of an identity are divided by 2-means on the sphere. Two people are compact within and
far apart: the score is the smaller mean cosine within the halves less the mean cosine across them.
Both sides need two images, so that a single wrong label is no second person. It runs on the set as
it is: once outliers are dropped, the smaller person of most mixed identities is gone.
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
_JOINED = 1000  # pairs of identities that are joined to see how mixed ones look
_COMPACT = 0.4  # of the median within an identity, which each half has to reach
_APART = 0.98  # quantile of the mean cosines of two people that two halves may have
_LARGEST = 400  # images of an identity that are looked at


class Mixed(NamedTuple):
    """Identities that may hold two people, the clearest first."""

    label: np.ndarray
    """(m,) int64."""
    score: np.ndarray
    """(m,) float64: within less cross."""
    within: np.ndarray
    """(m,) float64: the smaller mean cosine within a half."""
    cross: np.ndarray
    """(m,) float64: the mean cosine across."""
    halves: list[np.ndarray]
    """The image numbers of the smaller half of each."""
    mixed: np.ndarray
    """(m,) bool: above the threshold."""
    threshold: Threshold


class Division(NamedTuple):
    """An identity in two halves."""

    second: np.ndarray
    """(n,) bool: the smaller half."""
    within: float
    cross: float

    @property
    def score(self) -> float:
        """Above 0 where the halves are compact and apart."""
        return self.within - self.cross


def find(images: Identities, *, seed: int) -> Mixed:
    """Finds identities that look like two people.

    Args:
      images: the training set.
      seed: random seed of the identities that are joined for the threshold.
    """
    compact = _COMPACT * float(np.median(within_cosines(images)[1]))
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
    """2-means of one identity; None where a side has fewer than two images.

    Args:
      embeddings: (n, D) float32 of length 1; of more than 400 the first ones are taken.
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
    """The mean cosine of two images of one identity, for identities with two images or more.

    Of n unit vectors with sum s it is (|s|^2 - n) / (n (n - 1)).

    Returns:
      labels (k,) int64, and cosines (k,) float64.
    """
    counts = images.counts()
    labels = np.flatnonzero(counts >= 2)
    if not len(labels):
        return labels, np.zeros(1)
    n = counts[labels].astype(np.float64)
    squares = np.square(images.sums()[labels].astype(np.float64)).sum(axis=1)
    return labels, (squares - n) / (n * (n - 1))


def _within(cosine: np.ndarray) -> float:
    count = len(cosine)
    return float((cosine.sum() - np.trace(cosine)) / (count * (count - 1)))


def _joined(images: Identities, *, compact: float, seed: int) -> list[Division]:
    """Pairs of compact identities, joined at random and divided; undividable ones are left out."""
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
