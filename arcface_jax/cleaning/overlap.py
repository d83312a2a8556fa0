"""Find people of a training set who are also in another set, and photographs in both.

An image of the other set is compared with the centroids of the training set. The threshold comes
from the training set: true scores are its images' cosines with the rest of their own identity,
false ones their cosines with the best other identity. One false image in two thousand is accepted.
"""

from typing import NamedTuple

import numpy as np

from arcface_jax.cleaning import duplicates, neighbors, outliers, thresholds
from arcface_jax.cleaning.identities import Identities
from arcface_jax.cleaning.thresholds import Threshold
from arcface_jax.errors import DataError

FALSE = 0.0005
"""Highest share of the training set's own images with such a score for another identity."""


_LIKELY = 0.75  # share of the median cosine of two halves of one identity


class Overlap(NamedTuple):
    """Images of the other set that show a person of the training set."""

    image: np.ndarray
    """(m,) int64 image numbers of the other set, the highest score first."""
    label: np.ndarray
    """(m,) int64: identity of the training set."""
    score: np.ndarray
    """(m,) float32: cosine with its centroid."""
    nearest: np.ndarray
    """(m,) int64: most similar image of that identity."""
    threshold: Threshold


def find(train: Identities, others: np.ndarray, *, seed: int) -> Overlap:
    """Finds images that show a person of the training set.

    Args:
      train: the training set.
      others: (m, D) float32 of length 1, from the other set; zeros for unreadable images.
      seed: of the search for the training set's own duplicates, which would count as false.

    Raises:
      DataError: the training set has too few readable images.
    """
    centroids, counts = train.centroids(), train.counts()
    if not counts.any():
        raise DataError(
            "the training set has no readable image to compare with: `arcface-jax data inspect` "
            "lists what is wrong with its images"
        )
    present = np.where(counts > 0, np.arange(train.num_classes), -1)
    best = neighbors.best_other(others, np.full(len(others), -2), centroids, present)
    threshold = _threshold(train, best.score, seed=seed)
    index = np.flatnonzero((best.score >= threshold.threshold) & others.any(axis=1))
    index = index[np.argsort(-best.score[index], kind="stable")]
    order, starts = train.sorted()
    nearest = []
    for image, label in zip(index.tolist(), best.row[index].tolist(), strict=True):
        rows = order[starts[label] : starts[label + 1]]
        nearest.append(int(rows[np.argmax(train.embeddings[rows] @ others[image])]))
    return Overlap(
        index, best.row[index], best.score[index], np.array(nearest, np.int64), threshold
    )


def _threshold(train: Identities, scores: np.ndarray, *, seed: int) -> Threshold:
    same = duplicates.find(train, seed=seed)
    groups = same.groups(train.num_classes)
    halves = duplicates.half_cosines(train, seed=seed)
    likely = _LIKELY * float(np.median(halves)) if len(halves) else 1.0
    chosen = same.score >= min(likely, same.threshold.threshold)
    for a, b in same.pairs[chosen].tolist():  # likely pairs count as one person here
        groups[groups == groups[b]] = groups[a]
    own, other, row = outliers.compare(train, groups=groups)
    if not (row >= 0).any():
        raise DataError(
            "the training set has no two people with two readable images each, from which the "
            "threshold is found: name a set with more images"
        )
    right = own > other  # NaN for the only image of an identity
    false = other[right & (own >= np.nanmedian(own) / 2)] if right.any() else other
    threshold = float(np.quantile(false, 1 - FALSE))
    found = int((scores >= threshold).sum())
    wrong = FALSE * len(scores)
    return Threshold(
        threshold=threshold,
        recall=float(np.mean(_one_per_identity(train, own, right) >= threshold)),
        precision=max(0.0, 1 - wrong / found) if found else None,
        found=found,
    )


def _one_per_identity(train: Identities, own: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns (k,) float32: cosine of one image of each identity with the rest of it."""
    index = np.flatnonzero(right)
    _, first = np.unique(train.labels[index], return_index=True)
    return own[index[first]] if len(index) else np.zeros(1, np.float32)


class Shared(NamedTuple):
    """Identities of two training sets that show the same person."""

    pairs: np.ndarray
    """(p, 2) int64: label in the first set, label in the second."""
    score: np.ndarray
    """(p,) float32."""
    mutual: np.ndarray
    """(p,) bool: whether each is the other's nearest neighbor."""
    threshold: Threshold


def shared(first: Identities, second: Identities, *, seed: int) -> Shared:
    """Finds identities that two training sets share, by their centroids.

    Args:
      first: a training set.
      second: another.
      seed: random seed of the split halves.
    """
    a, b = first.centroids(), second.centroids()
    in_a = np.where(first.counts() > 0, 0, -1)
    in_b = np.where(second.counts() > 0, 0, -1)
    from_b = neighbors.best_other(b, np.full(len(b), -2), a, in_a)
    from_a = neighbors.best_other(a, np.full(len(a), -2), b, in_b)
    label = np.flatnonzero((from_b.row >= 0) & (in_b == 0))
    pairs = np.stack([from_b.row[label], label], axis=1)
    mutual = from_a.row[pairs[:, 0]] == label
    score = from_b.score[label]
    true = np.concatenate(
        [duplicates.half_cosines(images, seed=seed) for images in (first, second)]
    )
    threshold = thresholds.choose(score[mutual], true, precision=duplicates.PRECISION, least=0.01)
    keep = np.flatnonzero(score >= threshold.threshold)
    keep = keep[np.argsort(-score[keep], kind="stable")]
    return Shared(pairs[keep], score[keep], mutual[keep], threshold)
