"""Decide whether a model separates the people of a set well enough to correct its labels."""

import numpy as np

from arcface_jax.cleaning import neighbors
from arcface_jax.cleaning.duplicates import halves
from arcface_jax.cleaning.identities import Identities

ENOUGH = 0.8
"""Lowest share of half identities that find their other half."""
_MOST = 4096


def rank_one(
    images: Identities,
    *,
    seed: int,
    groups: np.ndarray | None = None,
    mixed: np.ndarray | None = None,
) -> float | None:
    """Returns the share of half identities whose nearest other identity is their other half.

    Identities of at least four images are split in halves at random; each first half is compared
    with the second half and with the centroids of all other identities. A set's own label errors
    would count against the model, so whoever has found some leaves them out.

    Args:
      images: the training set, without images known to be under a wrong label.
      seed: random seed of the halves.
      groups: (C,) int: identities of one group are one person and are not compared; by default
        every identity is a person.
      mixed: labels of identities known to be several people, which are not split.

    Returns:
      0 .. 1; None if no identity that may be split has four images.
    """
    first, second = halves(images, seed=seed, splits=1)
    labels = np.flatnonzero(images.counts() >= 4)
    split = ~np.isin(labels, () if mixed is None else mixed)
    first, second, labels = (x[split][:_MOST] for x in (first, second, labels))
    if not len(labels):
        return None
    people = np.arange(images.num_classes) if groups is None else groups
    others = np.where(images.counts() > 0, people, -1)
    other = neighbors.best_other(first, people[labels], images.centroids(), others).score
    return float(np.mean(np.einsum("nd,nd->n", first, second) > other))
