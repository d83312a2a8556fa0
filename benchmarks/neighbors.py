"""Measure the exact search for near pairs among random unit vectors, some of them planted."""

import os
import resource
import time
from typing import NamedTuple

import numpy as np

from arcface_jax.cleaning import neighbors
from arcface_jax.evaluation.embeddings import normalize

_PLANTED = 0.02  # share of rows planted near another one
_COSINES = (0.5, 0.9)  # range of the planted pairs' cosines
THRESHOLD = 0.45
_MILLION = 1_000_000


class Row(NamedTuple):
    """One way to search."""

    projected: int
    """Dimensions to compare first; 0 for all."""
    rows: int
    seconds: float
    cpu_seconds: float
    pairs: int
    recall: float
    """Recall of the planted pairs."""
    gib: float
    """Peak memory of the process so far, in GiB."""

    @property
    def minutes_per_million(self) -> float:
        """Minutes for 1,000,000 rows on idle cores, extrapolated with the square of the rows."""
        return self.cpu_seconds / (os.cpu_count() or 1) * (_MILLION / self.rows) ** 2 / 60


def measure(*, rows: int, size: int, projections: tuple[int, ...]) -> list[Row]:
    """Searches the same vectors in each way.

    Args:
      rows: n.
      size: D.
      projections: dimensions to compare first; 0 for all.
    """
    vectors, first, second = planted(rows, size)
    wanted = first * rows + second
    some = vectors[:2000]
    found = []
    for projected in projections:
        neighbors.similar_pairs(some, threshold=THRESHOLD, projected=projected)  # compiles
        wall, cpu = time.perf_counter(), time.process_time()
        pairs = neighbors.similar_pairs(vectors, threshold=THRESHOLD, projected=projected)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        recall = float(np.isin(wanted, pairs.first * rows + pairs.second).mean())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found.append(Row(projected, rows, wall, cpu, len(pairs.score), recall, peak))
    return found


def planted(rows: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes random unit vectors with planted near pairs.

    Returns:
      vectors (rows, size) float32; first and second (p,) int64, the rows of the pairs.
    """
    random = np.random.default_rng(0)
    vectors = np.empty((rows, size), np.float32)
    for start in range(0, rows, 50_000):
        part = random.standard_normal((min(50_000, rows - start), size), np.float32)
        vectors[start : start + len(part)] = normalize(part)
    count = int(_PLANTED * rows)
    first, second = np.arange(count), np.arange(rows - count, rows)
    cosine = random.uniform(*_COSINES, (count, 1)).astype(np.float32)
    near, far = vectors[first], vectors[second]
    far = normalize(far - np.sum(far * near, axis=1, keepdims=True) * near)
    vectors[second] = cosine * near + np.sqrt(1 - cosine**2) * far
    return vectors, first, second
