"""Find images that do not show the person of their label.

The score of an image is its cosine with the best other identity's centroid minus its cosine with
the centroid of its own identity without the image. Other centroids have at least two images and are
outside the identity's duplicate group. Identities that hold two people are skipped.
"""

from typing import NamedTuple

import numpy as np

from arcface_jax.cleaning import neighbors, thresholds
from arcface_jax.cleaning.identities import Identities
from arcface_jax.cleaning.thresholds import Threshold

PRECISION = 0.85
_RELABEL = 0.05  # quantile of own cosines above which the other identity is proposed
_SAMPLE = 20_000


class Outliers(NamedTuple):
    """Images that may be under a wrong label, the clearest first."""

    image: np.ndarray
    """(m,) int64 image numbers."""
    own: np.ndarray
    """(m,) float32: cosine with the rest of its own identity."""
    other: np.ndarray
    """(m,) float32: cosine with the best other centroid."""
    suggested: np.ndarray
    """(m,) int64: label of that other identity if it is close enough; else -1."""
    wrong: np.ndarray
    """(m,) bool: above the threshold."""
    threshold: Threshold

    @property
    def score(self) -> np.ndarray:
        """(m,) float32: other minus own."""
        return self.other - self.own


def find(images: Identities, *, groups: np.ndarray, mixed: np.ndarray, seed: int) -> Outliers:
    """Finds images that are closer to another identity than to their own.

    Args:
      images: the training set.
      groups: (C,) int: groups of identities that are one person.
      mixed: labels of identities that contain two people.
      seed: random seed of the sample that sets the threshold.
    """
    own, other, row = compare(images, groups=groups)
    looked_at = ~np.isnan(own) & (row >= 0) & ~np.isin(images.labels, mixed)
    index = np.flatnonzero(looked_at)
    score = other[index] - own[index]
    true = _misplaced_scores(images, index[score < 0], own, seed=seed)
    threshold = thresholds.choose(score, true, precision=PRECISION)
    order = np.argsort(-score, kind="stable")
    flagged = int((score >= threshold.threshold).sum())
    order = order[: thresholds.worth_a_look(score[order], found=flagged, lowest=0.0)]
    right = own[index[score < 0]]
    close = float(np.quantile(right, _RELABEL)) if len(right) else 1.0
    index = index[order]
    suggested = np.where(other[index] >= close, row[index], -1)
    wrong = score[order] >= threshold.threshold
    return Outliers(index, own[index], other[index], suggested, wrong, threshold)


def compare(images: Identities, *, groups: np.ndarray) -> tuple[np.ndarray, ...]:
    """Compares each image with its own and with the best other identity.

    Returns:
      own (n,) float32, NaN without another image; other (n,) float32; the other identity's label
      (n,) int64, -1 for none.
    """
    usable = np.where(images.counts() >= 2, groups, -1)
    query_groups = np.where(images.labels >= 0, groups[images.labels], -2)
    found = neighbors.best_other(images.embeddings, query_groups, images.centroids(), usable)
    return images.own(), found.score, found.row


def _misplaced_scores(
    images: Identities, index: np.ndarray, own: np.ndarray, *, seed: int
) -> np.ndarray:
    """Returns (k,) float32: scores that images would have under a random other label."""
    random = np.random.default_rng(seed)
    several = np.flatnonzero(images.counts() >= 2)
    if not len(index) or len(several) < 2:
        return np.empty(0, np.float32)
    rows = random.permutation(index)[:_SAMPLE]
    label = several[random.integers(0, len(several), len(rows))]
    rows, label = rows[label != images.labels[rows]], label[label != images.labels[rows]]
    there = np.einsum("nd,nd->n", images.embeddings[rows], images.centroids()[label])
    return own[rows] - there
