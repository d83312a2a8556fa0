"""Find pairs of identities that are one person under two labels.

Every identity's nearest neighbors are candidates: by class centers of a run, or by centroids. A
candidate is verified by the cosine of the two centroids. Class centers only propose, because
softmax pushes two centers of one person apart.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from arcface_jax.cleaning import neighbors, thresholds
from arcface_jax.cleaning.identities import Identities, groups_of
from arcface_jax.cleaning.thresholds import Threshold
from arcface_jax.evaluation.embeddings import normalize

PRECISION = 0.91
"""Lowest expected precision of the merged pairs."""
SAMPLE = 5
"""Images per identity to verify candidates from class centers."""
_ALIKE = 0.5  # share of the median cosine of an image with its identity
_LISTED = 0.5  # share of the median true score above which pairs are listed
_SPLITS = 4
_FEWEST = 4  # images of an identity to split it in halves
_LOWEST = 0.05  # lowest cosine of a candidate
_PER_IDENTITY = 8  # candidates to keep, on average


class Duplicates(NamedTuple):
    """Pairs of identities, the most similar first."""

    pairs: np.ndarray
    """(p, 2) int64 labels, the lower one first."""
    score: np.ndarray
    """(p,) float32 cosines of their centroids."""
    mutual: np.ndarray
    """(p,) bool: whether each is the other's nearest neighbor."""
    merge: np.ndarray
    """(p,) bool: mutual and above the threshold; the others need a review."""
    threshold: Threshold

    def groups(self, num_classes: int) -> np.ndarray:
        """Returns (C,) int64: the smallest label of each identity's group."""
        return groups_of(num_classes, self.pairs[self.merge])


def find(images: Identities, *, seed: int, candidates: np.ndarray | None = None) -> Duplicates:
    """Finds pairs of identities that are likely one person.

    Args:
      images: the training set; with `candidates`, the images to verify them.
      seed: random seed of the split halves.
      candidates: (p, 2) int labels from class centers; by default all centroids are compared.
    """
    centroids = images.centroids()
    if candidates is None:
        # A pair without a nearest neighbor in either direction is not a candidate.
        most = _PER_IDENTITY * images.num_classes
        found = neighbors.similar_pairs(centroids, threshold=_LOWEST, most=most)
        pairs, score = np.stack([found.first, found.second], axis=1), found.score
    else:
        pairs = np.unique(np.sort(candidates, axis=1), axis=0)
        score = np.einsum("nd,nd->n", centroids[pairs[:, 0]], centroids[pairs[:, 1]])
        order = np.argsort(-score, kind="stable")
        pairs, score = pairs[order], score[order]
    nearest, highest = nearest_of(pairs, score, images.num_classes)
    ends = nearest[pairs] == pairs[:, ::-1]
    mutual, either = ends.all(axis=1), ends.any(axis=1)
    true = half_cosines(images, seed=seed)
    false = _false_pairs(highest)
    threshold = thresholds.choose(score[mutual], true, precision=PRECISION, least=0.01, false=false)
    merge = mutual & (score >= threshold.threshold)
    lowest = _LISTED * float(np.median(true)) if len(true) else 1.0
    shown = np.flatnonzero(merge | either)
    shown = shown[: thresholds.worth_a_look(score[shown], found=int(merge.sum()), lowest=lowest)]
    return Duplicates(pairs[shown], score[shown], mutual[shown], merge[shown], threshold)


def _false_pairs(highest: np.ndarray) -> Callable[[float], float]:
    """Estimates the number of mutual pairs of different people above a threshold.

    Args:
      highest: (k,) cosine of each identity's nearest other one.
    """
    if len(highest) < _FEWEST:
        return lambda threshold: 0.0
    chance = thresholds.gumbel_tail(highest)
    return lambda threshold: len(highest) / 2 * chance(threshold)


def nearest_of(
    pairs: np.ndarray, score: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Finds each label's partner in its first pair.

    Args:
      pairs: (p, 2) int, the most similar first.
      score: (p,) their cosines.
      num_classes: C.

    Returns:
      nearest (C,) int64, -1 for a label in no pair; the cosines (k,) of those in a pair.
    """
    nearest = np.full(num_classes, -1, np.int64)
    ends = np.concatenate([pairs, pairs[:, ::-1]], axis=1).reshape(-1, 2)
    label, first = np.unique(ends[:, 0], return_index=True)
    nearest[label] = ends[first, 1]
    return nearest, score[first // 2]


def half_cosines(images: Identities, *, seed: int, splits: int = _SPLITS) -> np.ndarray:
    """Returns (k,) float64: cosines of the centroids of two random halves of one identity.

    Identities with at least four images are split several times: the halves resemble two labels of
    one person in this set.
    """
    first, second = halves(trimmed(images), seed=seed, splits=splits)
    return np.einsum("nd,nd->n", first, second).astype(np.float64)


def trimmed(images: Identities) -> Identities:
    """Returns the images without those unlike the rest of their identity, which are mostly
    mislabeled.
    """
    own = images.own()
    known = own[~np.isnan(own)]
    return images.without(own < _ALIKE * np.median(known)) if len(known) else images


def halves(images: Identities, *, seed: int, splits: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (k, D) float32 each: centroids of two random halves of identities, for all splits."""
    random = np.random.default_rng(seed)
    order, starts = images.sorted()
    counts = np.diff(starts)
    large = np.flatnonzero(counts >= _FEWEST)
    of = np.repeat(np.arange(images.num_classes), counts)
    parts = [], []
    for _ in range(splits):
        mixed = np.lexsort((random.random(len(order)), of))
        place = np.arange(len(order)) - starts[of]
        lower = place < counts[of] // 2
        for part, chosen in zip(parts, (lower, ~lower), strict=True):
            rows = order[mixed[chosen]]
            half = Identities(images.embeddings[rows], images.labels[rows], images.num_classes)
            part.append(half.sums()[large])
    first, second = (normalize(np.concatenate(part)) for part in parts)
    return first, second
