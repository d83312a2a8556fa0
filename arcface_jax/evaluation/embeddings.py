"""Lengths, normalization and spread of embeddings, in NumPy and float64."""

import numpy as np
from numpy.typing import DTypeLike

SHORTEST = 1e-12
"""Shorter embeddings, such as zeros, are divided by this instead of their length."""


def lengths(embeddings: np.ndarray) -> np.ndarray:
    """Returns the (n,) float64 L2 norms of (n, D), without an array of squares."""
    return np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64))


def normalize(embeddings: np.ndarray, *, dtype: DTypeLike = np.float32) -> np.ndarray:
    """Scales (n, D) to length 1 in float64 and returns it as `dtype`; rows of zeros stay zeros."""
    scaled = embeddings / np.maximum(lengths(embeddings), SHORTEST)[:, None]
    return scaled.astype(dtype, copy=False)


def mean_cosine(embeddings: np.ndarray) -> float:
    """Returns the mean cosine of two different images; near 1 if all embeddings are one point.

    For n unit vectors u it is (|sum u|^2 - sum |u|^2) / (n (n - 1)), so no pairs are formed.

    Args:
      embeddings: (n, D) float, n at least 2, of any length; zeros count as orthogonal.
    """
    unit = normalize(embeddings, dtype=np.float64)
    total = unit.sum(axis=0)
    count = len(unit)
    return float((total @ total - np.sum(unit * unit)) / (count * (count - 1)))


def effective_rank(embeddings: np.ndarray) -> float:
    """Returns the effective rank of the unit embeddings: exp of the entropy of singular values.

    With singular values s and p = s / sum s, exp(-sum p ln p): 1 for a point or a line, D for
    vectors spread evenly over D directions. (O. Roy, M. Vetterli, "The effective rank: a measure
    of effective dimensionality", 2007.)

    Args:
      embeddings: (n, D) float, of any length; if all are zero the result is 0.
    """
    unit = normalize(embeddings, dtype=np.float64)
    # Singular values are the square roots of this small matrix's eigenvalues. Those made by
    # rounding are dropped, because their roots would add up.
    gram = unit.T @ unit if len(unit) >= unit.shape[1] else unit @ unit.T
    squares = np.linalg.eigvalsh(gram)
    values = np.sqrt(squares[squares > 1e-12 * squares[-1]])
    if not values.size:
        return 0.0
    share = values / values.sum()
    return float(np.exp(-np.sum(share * np.log(share))))
