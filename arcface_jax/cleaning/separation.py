"""Decide whether a model separates the people of a set well enough to correct its labels."""

import numpy as np

from arcface_jax.cleaning import neighbors
from arcface_jax.cleaning.duplicates import halves
from arcface_jax.cleaning.identities import Identities

ENOUGH = 0.8
"""Lowest share of half identities that find their other half."""
_MOST = 4096


def rank_one(images: Identities, *, seed: int) -> float | None:
    """Returns the share of half identities whose nearest other identity is their other half.

    Identities of at least four images are split in halves at random; each first half is compared
    with the second half and with the centroids of all other identities.

    Args:
      images: the training set.
      seed: random seed of the halves.

    Returns:
      0 .. 1; None if no identity has four images.
    """
    first, second = halves(images, seed=seed, splits=1)
    labels = np.flatnonzero(images.counts() >= 4)[:_MOST]
    first, second = first[:_MOST], second[:_MOST]
    if not len(labels):
        return None
    every = np.arange(images.num_classes)
    groups = np.where(images.counts() > 0, every, -1)
    other = neighbors.best_other(first, labels, images.centroids(), groups).score
    return float(np.mean(np.einsum("nd,nd->n", first, second) > other))
