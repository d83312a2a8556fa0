"""Embeddings of a training set, grouped by identity: centroids and leave-one-out cosines."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from arcface_jax.evaluation.embeddings import normalize

_ROWS = 65_536  # rows whose products are in memory together


class Identities(NamedTuple):
    """Embeddings of a training set with their labels."""

    embeddings: np.ndarray
    """(n, D) float32 of length 1; zeros for an unreadable image."""
    labels: np.ndarray
    """(n,) int32; -1 for an unreadable image."""
    num_classes: int

    def counts(self) -> np.ndarray:
        """Returns (C,) int64: number of readable images of each identity."""
        known = self.labels[self.labels >= 0]
        return np.bincount(known, minlength=self.num_classes)

    def sums(self) -> np.ndarray:
        """Returns (C, D) float32: the sum of each identity's embeddings."""
        sums = np.zeros((self.num_classes, self.embeddings.shape[1]), np.float32)
        order, starts = self.sorted()
        filled = np.flatnonzero(np.diff(starts))
        if len(filled):
            sums[filled] = np.add.reduceat(self.embeddings[order], starts[filled], axis=0)
        return sums

    def centroids(self) -> np.ndarray:
        """Returns (C, D) float32 of length 1: each identity's mean direction; zeros without
        images.
        """
        return normalize(self.sums())

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns image numbers sorted by identity.

        Returns:
          order (m,) int64: readable images, identity by identity; starts (C + 1,) int64: where each
          identity starts in `order`.
        """
        order = np.argsort(self.labels, kind="stable")
        order = order[np.searchsorted(self.labels[order], 0) :]
        return order, np.concatenate([[0], np.cumsum(self.counts())])

    def each(self, *, least: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """Yields label and image numbers of every identity with at least `least` images."""
        order, starts = self.sorted()
        for label in np.flatnonzero(self.counts() >= least).tolist():
            yield label, order[starts[label] : starts[label + 1]]

    def without(self, dropped: np.ndarray) -> "Identities":
        """Returns the set without some images.

        Args:
          dropped: (n,) bool: the images to leave out.
        """
        return self._replace(labels=np.where(dropped, -1, self.labels).astype(np.int32))

    def own(self) -> np.ndarray:
        """Returns (n,) float32: cosine of each image with the centroid of its identity's others.

        NaN for the only image of an identity, and for an unreadable one.
        """
        sums, counts = self.sums(), self.counts()
        own = np.full(len(self.labels), np.nan, np.float32)
        usable = np.flatnonzero(self.labels >= 0)
        usable = usable[counts[self.labels[usable]] >= 2]
        for start in range(0, len(usable), _ROWS):
            rows = usable[start : start + _ROWS]
            mine = self.embeddings[rows]
            others = normalize(sums[self.labels[rows]] - mine)
            own[rows] = np.einsum("nd,nd->n", mine, others)
        return own


def groups_of(num_classes: int, pairs: np.ndarray) -> np.ndarray:
    """Groups connected identities by union-find.

    Args:
      num_classes: C.
      pairs: (p, 2) int labels that are one person.

    Returns:
      (C,) int64: the smallest label of each identity's group; its own without a group.
    """
    parent = np.arange(num_classes)

    def root(label: int) -> int:
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    for a, b in pairs.tolist():
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return np.array([root(label) for label in range(num_classes)], np.int64)
