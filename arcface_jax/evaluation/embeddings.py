"""Lengths, normalization and spread of embeddings: plain NumPy, in float64."""

import numpy as np
from numpy.typing import DTypeLike

SHORTEST = 1e-12
"""Embeddings that are shorter, such as zeros, are divided by this."""


def lengths(embeddings: np.ndarray) -> np.ndarray:
    """(n, D) to (n,) float64 L2 norms, without an array of the squares."""
    return np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64))


def normalize(embeddings: np.ndarray, *, dtype: DTypeLike = np.float32) -> np.ndarray:
    """(n, D) scaled to length 1 in float64, returned as `dtype`; rows of zeros stay zeros."""
    scaled = embeddings / np.maximum(lengths(embeddings), SHORTEST)[:, None]
    return scaled.astype(dtype, copy=False)


def mean_cosine(embeddings: np.ndarray) -> float:
    """The mean cosine between two different images; near 1 where all embeddings are one point.

    Of n unit vectors u it is (|sum u|^2 - sum |u|^2) / (n (n - 1)): no pair is formed.

    Args:
      embeddings: (n, D) float, n at least 2, of any length; zeros count as at right angles.
    """
    unit = normalize(embeddings, dtype=np.float64)
    total = unit.sum(axis=0)
    count = len(unit)
    return float((total @ total - np.sum(unit * unit)) / (count * (count - 1)))


def effective_rank(embeddings: np.ndarray) -> float:
    """How many directions the unit embeddings use: exp of the entropy of their singular values.

    With singular values s and p = s / sum s, exp(-sum p ln p): 1 for a point or a line, D for
    vectors spread evenly over D directions. (O. Roy, M. Vetterli, "The effective rank: a measure
    of effective dimensionality", 2007.)

    Args:
      embeddings: (n, D) float, of any length; 0 where all of them are zero.
    """
    unit = normalize(embeddings, dtype=np.float64)
    # Singular values are the roots of this small matrix's eigenvalues. Those that only rounding
    # makes are left out: their roots would add up.
    gram = unit.T @ unit if len(unit) >= unit.shape[1] else unit @ unit.T
    squares = np.linalg.eigvalsh(gram)
    values = np.sqrt(squares[squares > 1e-12 * squares[-1]])
    if not values.size:
        return 0.0
    share = values / values.sum()
    return float(np.exp(-np.sum(share * np.log(share))))
