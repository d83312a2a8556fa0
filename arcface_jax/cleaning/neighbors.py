"""Exact neighbors among millions of unit vectors, block by block.

Cosines are computed in blocks of the upper triangle and compared with a threshold on the device;
only the few that reach it are copied back. Two argmax per block would cost as much as the product.
Operands are bfloat16 with float32 accumulation on accelerators, float32 on CPUs. bfloat16 and
projected cosines only propose pairs: each one is rescored from the float32 vectors.

Rounding unit vectors to bfloat16 changes a cosine by at most 2 x 2^-9 + 2^-18 < 0.004.
"""

from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from arcface_jax.runtime import devices as meshes
from arcface_jax.runtime.devices import AXIS

BLOCK = 4096
"""Rows and columns of a block on one device."""
_SMALLEST = 16  # rows of a block for few vectors
_HITS = 1 << 16  # most hits of a block on accelerators; a block with more is returned as a whole
_AHEAD = 2  # blocks in flight
_BFLOAT16_ERROR = 0.004
_PROJECTION_DEVIATIONS = 1.7  # deviations by which a projected cosine may be too small
_SAMPLE = 256  # rows from which `nearest` estimates a threshold
_SHORT = 0.05  # share of them that may have fewer than k hits
_RESCORED = 1 << 18  # pairs whose vectors are in memory together


class Pairs(NamedTuple):
    """Pairs of rows, the highest cosine first."""

    first: np.ndarray
    """(p,) int64, each below `second`."""
    second: np.ndarray
    """(p,) int64."""
    score: np.ndarray
    """(p,) float32 cosines."""


def similar_pairs(
    vectors: np.ndarray,
    *,
    threshold: float,
    most: int = 50_000_000,
    block: int = BLOCK,
    projected: int = 0,
    mesh: Mesh | None = None,
) -> Pairs:
    """Finds all pairs of rows with a cosine of at least `threshold`.

    Args:
      vectors: (n, D) float32 of length 1; rows of zeros are in no pair.
      threshold: above 0.
      most: number of pairs to keep, with the highest cosines; the threshold rises accordingly.
      block: rows of a block.
      projected: if not 0, search in this many random dimensions; finds about 99 % of the pairs, and
        verifies each in all dimensions.
      mesh: the devices that share the columns; by default all of this process.
    """
    mesh = meshes.make("own") if mesh is None else mesh
    block = min(block, max(_SMALLEST, -(-len(vectors) // mesh.size)))
    searched, slack = vectors, 0.0
    if projected:
        searched = _projected(vectors, projected)
        slack = _PROJECTION_DEVIATIONS * (1 - threshold**2) / projected**0.5
    if meshes.is_gpu(mesh):
        slack += _BFLOAT16_ERROR
    parts: list[Pairs] = []
    kept = 0
    search = _Search(searched, block, mesh, threshold=threshold - slack)
    for first, second in search.upper_triangle():
        score = _scores(vectors, first, second)
        good = score >= threshold
        parts.append(Pairs(first[good], second[good], score[good]))
        kept += int(good.sum())
        if kept > 2 * most:
            parts = [_best(parts, most)]
            kept, threshold = most, float(parts[0].score[-1])
            search.threshold = threshold - slack
    return _best(parts, most)


def nearest(
    vectors: np.ndarray, k: int, *, block: int = BLOCK, mesh: Mesh | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the exact k nearest other rows of each row.

    Args:
      vectors: (n, D) float32 of length 1.
      k: below n.
      block: rows of a block.
      mesh: as `similar_pairs`.

    Returns:
      rows (n, k) int64, the nearest first, ties in row order; scores (n, k) float32.
    """
    count = len(vectors)
    sample = np.linspace(0, count - 1, min(_SAMPLE, count)).astype(int)
    kth = _dense(vectors, sample, k)[1][:, -1]
    threshold = max(float(np.quantile(kth, _SHORT)), 1e-3)
    pairs = similar_pairs(
        vectors, threshold=threshold, most=max(64 * k, 256) * count, block=block, mesh=mesh
    )
    row = np.concatenate([pairs.first, pairs.second])
    other = np.concatenate([pairs.second, pairs.first])
    score = np.concatenate([pairs.score, pairs.score])
    order = np.lexsort((other, -score, row))
    row, other, score = row[order], other[order], score[order]
    starts = np.searchsorted(row, np.arange(count + 1))
    rows, scores = np.empty((count, k), np.int64), np.empty((count, k), np.float32)
    enough = np.diff(starts) >= k
    places = starts[:-1][enough, None] + np.arange(k)
    rows[enough], scores[enough] = other[places], score[places]
    short = np.flatnonzero(~enough)
    for start in range(0, len(short), block):
        part = short[start : start + block]
        rows[part], scores[part] = _dense(vectors, part, k)
    return rows, scores


class Best(NamedTuple):
    """The most similar row of another group for each query."""

    row: np.ndarray
    """(q,) int64; -1 for none."""
    score: np.ndarray
    """(q,) float32; -1 for none."""


def best_other(
    queries: np.ndarray,
    query_groups: np.ndarray,
    vectors: np.ndarray,
    groups: np.ndarray,
    *,
    block: int = BLOCK,
) -> Best:
    """Finds the nearest vector outside each query's own group.

    Args:
      queries: (q, D) float32 of length 1.
      query_groups: (q,) int.
      vectors: (m, D) float32 of length 1.
      groups: (m,) int; -1 excludes a vector.
      block: queries and vectors per block.
    """
    block = min(block, max(_SMALLEST, len(queries), len(vectors)))
    out = Best(np.full(len(queries), -1, np.int64), np.full(len(queries), -1, np.float32))
    for start in range(0, len(queries), block):
        here = slice(start, min(start + block, len(queries)))
        mine = jnp.asarray(_filled(queries[here], block))
        own = jnp.asarray(_filled(query_groups[here].astype(np.int32), block))
        for begin in range(0, len(vectors), block):
            there = _filled(vectors[begin : begin + block], block)
            of = np.full(block, -1, np.int32)
            of[: len(vectors) - begin] = groups[begin : begin + block]
            row, score = (
                np.asarray(x)[: here.stop - start]
                for x in _best_of_block(mine, own, jnp.asarray(there), jnp.asarray(of))
            )
            better = score > out.score[here]
            out.row[here][better] = begin + row[better]
            out.score[here][better] = score[better]
    return out


@jax.jit
def _best_of_block(
    queries: jax.Array, own: jax.Array, vectors: jax.Array, groups: jax.Array
) -> tuple[jax.Array, jax.Array]:
    cosine = jnp.matmul(queries, vectors.T, precision=jax.lax.Precision.HIGHEST)
    excluded = (own[:, None] == groups[None]) | (groups < 0)[None]
    cosine = jnp.where(excluded, -1.0, cosine)
    return jnp.argmax(cosine, axis=1), jnp.max(cosine, axis=1)


class _Search:
    """Search for cosines above a threshold in the blocks of an upper triangle."""

    def __init__(self, vectors: np.ndarray, block: int, mesh: Mesh, *, threshold: float):
        self.threshold = threshold  # may rise during a search
        self._vectors, self._block, self._mesh = vectors, block, mesh
        self._compact = meshes.is_gpu(mesh)
        self._dtype = jnp.bfloat16 if self._compact else jnp.float32

    def upper_triangle(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields rows and columns of the pairs, rows below columns, block by block."""
        wide = self._block * self._mesh.size
        ahead: deque = deque()
        for begin in range(0, len(self._vectors), self._block):
            rows = self._rows(begin)
            for start in range(begin, len(self._vectors), wide):
                columns = self._columns(start, wide)
                limit = jnp.float32(self.threshold)
                found = self._find(rows, columns, limit)
                ahead.append((begin, start, rows, columns, limit, found))
                if len(ahead) > _AHEAD:
                    yield self._received(*ahead.popleft())
        while ahead:
            yield self._received(*ahead.popleft())

    def _rows(self, begin: int) -> jax.Array:
        part = _filled(self._vectors[begin : begin + self._block], self._block)
        return jax.device_put(part.astype(self._dtype), meshes.replicated(self._mesh))

    def _columns(self, begin: int, count: int) -> jax.Array:
        part = _filled(self._vectors[begin : begin + count], count)
        return jax.device_put(part.astype(self._dtype), meshes.split(self._mesh))

    def _find(self, rows: jax.Array, columns: jax.Array, limit: jax.Array):
        if self._compact:
            return _hits_of(self._mesh)(rows, columns, limit)
        return _mask_of(self._mesh)(rows, columns, limit)

    def _received(self, begin, start, rows, columns, limit, found):
        if self._compact:
            places, counts = (np.asarray(x) for x in found)
            if counts.max() <= places.shape[1]:
                return self._pairs(
                    begin, start, [p[:n] for p, n in zip(places, counts, strict=True)]
                )
            found = _mask_of(self._mesh)(rows, columns, limit)
        parts = sorted(found.addressable_shards, key=lambda shard: shard.index[1].start or 0)
        return self._pairs(begin, start, [np.flatnonzero(np.asarray(x.data)) for x in parts])

    def _pairs(self, begin: int, start: int, places: list[np.ndarray]):
        """Returns global rows and columns of positions in the devices' blocks."""
        parts = []
        for device, place in enumerate(places):
            row, column = np.divmod(place.astype(np.int64), self._block)
            parts.append((begin + row, start + device * self._block + column))
        first, second = (np.concatenate(part) for part in zip(*parts, strict=True))
        upper = (first < second) & (second < len(self._vectors))
        return first[upper], second[upper]


@lru_cache
def _mask_of(mesh: Mesh):
    def mask(rows: jax.Array, columns: jax.Array, limit: jax.Array) -> jax.Array:
        return _cosines(rows, columns) >= limit

    specs = (P(), P(AXIS), P())
    return jax.jit(jax.shard_map(mask, mesh=mesh, in_specs=specs, out_specs=P(None, AXIS)))


@lru_cache
def _hits_of(mesh: Mesh):
    def hits(rows: jax.Array, columns: jax.Array, limit: jax.Array):
        mask = (_cosines(rows, columns) >= limit).reshape(-1)
        (places,) = jnp.nonzero(mask, size=_HITS, fill_value=0)
        return places[None].astype(jnp.int32), jnp.sum(mask, dtype=jnp.int32)[None]

    specs = (P(), P(AXIS), P())
    return jax.jit(jax.shard_map(hits, mesh=mesh, in_specs=specs, out_specs=(P(AXIS), P(AXIS))))


def _cosines(rows: jax.Array, columns: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        rows,
        columns,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _filled(part: np.ndarray, count: int) -> np.ndarray:
    """Pads with zeros to `count` rows."""
    if len(part) == count:
        return part
    filled = np.zeros((count, *part.shape[1:]), part.dtype)
    filled[: len(part)] = part
    return filled


def _projected(vectors: np.ndarray, size: int) -> np.ndarray:
    """Projects the vectors to random directions: (n, size) float32 of length 1."""
    directions = np.random.default_rng(0).standard_normal((vectors.shape[1], size))
    out = vectors @ np.linalg.qr(directions)[0].astype(np.float32)
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)


def _scores(vectors: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns (p,) float32 cosines of pairs of rows."""
    score = np.empty(len(first), np.float32)
    for start in range(0, len(first), _RESCORED):
        part = slice(start, start + _RESCORED)
        score[part] = np.einsum("nd,nd->n", vectors[first[part]], vectors[second[part]])
    return score


def _best(parts: list[Pairs], most: int) -> Pairs:
    if not parts:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    first, second, score = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.lexsort((second, first, -score))[:most]
    return Pairs(first[order], second[order], score[order])


def _dense(vectors: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k nearest of a few rows, (r, k) each."""
    found = np.empty((len(rows), k), np.int64), np.empty((len(rows), k), np.float32)
    step = max(1, (1 << 26) // len(vectors))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        cosine = vectors[part] @ vectors.T
        cosine[np.arange(len(part)), part] = -np.inf
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        found[0][start : start + step] = order
        found[1][start : start + step] = np.take_along_axis(cosine, order, axis=1)
    return found
