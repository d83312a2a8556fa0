"""Exact search in a saved set of embeddings, memory-mapped, as float32 or scanned as int8.

A gallery is a folder:
  gallery.json      how it was made: model digest, flip, sizes names.json a name for each row
  embeddings.npy    (N, D) float32 of length 1
  int8.npy          (N, D) int8, of an int8 gallery: row i is about embeddings[i] / scales[i]
  scales.npy        (N,) float32
  residuals.npy     (N,) float32: |embeddings[i] - scales[i] * int8[i]|, rounded up

A search scans all rows in blocks, in float32 or int8, and keeps each row whose score could be among
the k best within the scan's error bound. These few are rescored in float64 from the float32 rows.
Both forms therefore return the same rows, in the same order, with the same scores: the k largest
inner products of the stored float32 vectors; ties go to the lower row. Block size, threads and
number of queries do not affect the result.

Error bounds of a scan, for unit vectors x and q of D numbers:
- float32 sums in any order: |fl(x . q) - x . q| <= D u / (1 - D u) |x| . |q| <= 1.01 D u, u = 2^-24
  (N. Higham, "Accuracy and Stability of Numerical Algorithms", 2002, 3.1);
- int8: |x . q - s (x8 . q)| <= |x - s x8| by Cauchy and Schwarz, and the float32 bound again, for
  products no longer than for vectors of length 1 + |x - s x8|.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pydantic

from arcface_jax.errors import DataError, UserError
from arcface_jax.evaluation.embeddings import lengths, normalize
from arcface_jax.runtime import foreign
from arcface_jax.runtime.files import atomic_folder, write_atomic

Form = Literal["float32", "int8"]

_ABOUT = "gallery.json"
_NAMES = "names.json"
_ROWS = "embeddings.npy"
_INT8, _SCALES, _RESIDUALS = "int8.npy", "scales.npy", "residuals.npy"

BLOCK = 16_384
"""Rows scored together."""
_CACHED = 512  # rows scored by all queries while in the cache: 1 MiB at D = 512
_QUERIES = 64  # queries scanned together: BLOCK x 64 float32 scores are 4 MiB per thread
_RESCORED = 4096  # rows converted to float64 at a time
_ROUNDING = 2.0**-24


class Matches(NamedTuple):
    """The most similar rows of a gallery for each of m queries, best first."""

    score: np.ndarray
    """(m, k) float64 cosines."""
    row: np.ndarray
    """(m, k) int64 rows of the gallery."""
    name: list[list[str]]
    """Names of those rows, m lists of k."""


@dataclass(frozen=True, kw_only=True)
class _About:
    """Contents of gallery.json."""

    model: str
    flip: bool
    rows: pydantic.PositiveInt
    embedding_size: pydantic.PositiveInt
    form: Form


_ADAPTER = pydantic.TypeAdapter(_About)
_MOST_BYTES = 1 << 20  # size limit of gallery.json


class Gallery:
    """A saved gallery, open for search; made by `build`.

    Args:
      folder: folder of the gallery.

    Raises:
      DataError: the folder has no gallery, or a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        about = self._read_about()
        self.model, self.flip, self.form = about.model, about.flip, about.form
        self.shape = (about.rows, about.embedding_size)
        self.embeddings = self._map(_ROWS, self.shape, np.float32)
        if about.form == "int8":
            self._int8 = self._map(_INT8, self.shape, np.int8)
            self._scales = np.array(self._map(_SCALES, self.shape[:1], np.float32))
            self._residuals = np.array(self._map(_RESIDUALS, self.shape[:1], np.float32))
        self._names: list[str] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def names(self) -> list[str]:
        """The name of each row.

        Raises:
          DataError: names.json is damaged.
        """
        if self._names is None:
            path = self.folder / _NAMES
            try:
                names = foreign.parse_json(foreign.read(path))
            except (OSError, ValueError) as error:
                raise DataError(f"cannot read {path} ({error}): build the gallery again") from error
            right = isinstance(names, list) and len(names) == len(self)
            if not right or not all(isinstance(name, str) for name in names):
                raise DataError(f"{path} has no {len(self):,} names: build the gallery again")
            self._names = names
            return names
        return self._names

    def search(self, queries: np.ndarray, k: int = 5) -> Matches:
        """Returns the k rows with the largest cosines; exact, as the module's docstring explains.

        Args:
          queries: (m, D) float, of any length.
          k: rows per query; all rows if the gallery has fewer.

        Raises:
          DataError: the queries are not finite vectors of D numbers, or k is below 1.
        """
        if queries.ndim != 2 or queries.shape[1] != self.shape[1]:
            raise DataError(
                f"queries are {queries.shape}; expected (m, {self.shape[1]}), as in {self.folder}"
            )
        if not np.isfinite(queries).all():
            raise DataError("the queries have values that are not finite: embed the faces again")
        if k < 1:
            raise DataError(f"k must be at least 1, got {k}")
        k = min(k, len(self))
        unit = normalize(queries)
        score = np.empty((len(unit), k))
        found = np.empty((len(unit), k), np.int64)
        for start in range(0, len(unit), _QUERIES):
            part = unit[start : start + _QUERIES]
            for i, rows in enumerate(self._candidates(part, k), start):
                if len(rows) < k:
                    raise DataError(
                        f"{self.folder} has embeddings or scales that are not finite: build "
                        "the gallery again"
                    )
                score[i], found[i] = self._best(rows, unit[i], k)
        names = self.names
        return Matches(score, found, [[names[j] for j in rows] for rows in found])

    def _candidates(self, queries: np.ndarray, k: int) -> list[np.ndarray]:
        """Returns, for each query, the rows that can be among its k best, in order."""
        workers = max(1, min(os.cpu_count() or 1, len(self) // BLOCK))
        edges = np.linspace(0, len(self), workers + 1).astype(int).tolist()

        def scan(edge: int) -> list[_Kept]:
            kept = [_Kept(k) for _ in queries]
            for start in range(edges[edge], edges[edge + 1], BLOCK):
                stop = min(start + BLOCK, edges[edge + 1])
                scores, bound = self._scan(start, stop, queries)
                for one, row in zip(kept, scores, strict=True):
                    one.add(start, row, bound)
            return kept

        with ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(scan, range(workers)))
        return [_Kept.together(each) for each in zip(*parts, strict=True)]

    def _scan(
        self, start: int, stop: int, queries: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | float]:
        """Returns scores (m, stop - start) and the bound on their errors."""
        scores = np.empty((len(queries), stop - start), np.float32)
        buffer = np.empty((_CACHED, self.shape[1]), np.float32)
        rows = self.embeddings if self.form == "float32" else self._int8
        for first in range(start, stop, _CACHED):
            last = min(first + _CACHED, stop)
            part = rows[first:last]
            if part.dtype != np.float32:
                part = buffer[: last - first]
                np.copyto(part, rows[first:last])
            # Row by row in this thread. For so few queries a BLAS product is no faster, and its
            # threads wait for each other on a busy machine.
            np.vecdot(part[None], queries[:, None], out=scores[:, first - start : last - start])
        rounding = (1.01 * self.shape[1] + 8) * _ROUNDING  # 8: for lengths and comparisons
        if self.form == "float32":
            return scores, rounding
        scores *= self._scales[start:stop]
        residual = self._residuals[start:stop]
        # Twice the rounding: for the product, and for the scale, the residual and this sum.
        return scores, residual + 2 * rounding * (1 + residual)

    def _best(self, rows: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns scores (k,) and rows (k,) of the best candidates."""
        wanted = query.astype(np.float64)
        parts = [
            # Summed row by row in a fixed order, so that equal rows have equal scores.
            (self.embeddings[part].astype(np.float64) * wanted).sum(axis=1)
            for part in (rows[i : i + _RESCORED] for i in range(0, len(rows), _RESCORED))
        ]
        score = np.concatenate(parts)
        order = np.lexsort((rows, -score))[:k]
        return score[order], rows[order]

    def _read_about(self) -> _About:
        path = self.folder / _ABOUT
        try:
            return _ADAPTER.validate_json(foreign.read(path, most=_MOST_BYTES))
        except OSError as error:
            raise DataError(
                f"{self.folder} is not a gallery ({_ABOUT}: {error.strerror}): make one with "
                "`arcface-jax gallery build`"
            ) from error
        except pydantic.ValidationError as error:
            raise DataError(f"{path} is damaged: build the gallery again") from error

    def _map(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        path = self.folder / name
        try:
            # A plain array over the mapping: slicing np.memmap takes microseconds longer.
            found = foreign.load_array(path).view(np.ndarray)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {path} ({error}): build the gallery again") from error
        if found.shape != shape or found.dtype != dtype:
            raise DataError(
                f"{path} is {found.shape} {found.dtype}; expected {shape} "
                f"{np.dtype(dtype).name}: build the gallery again"
            )
        return found


class _Kept:
    """The rows that may still be among the k best of a query."""

    def __init__(self, k: int):
        self._k = k
        self._least = -np.inf  # the k-th best row has at least this score
        self._best = np.empty(0)  # the k largest lower bounds so far
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []  # rows, upper bounds

    def add(self, start: int, scores: np.ndarray, bound: np.ndarray | float) -> None:
        """Adds the next block of scores, whose errors are at most `bound`."""
        found = np.flatnonzero(scores + bound >= self._least)
        if not len(found):
            return
        score = scores[found].astype(np.float64)
        off = bound[found] if isinstance(bound, np.ndarray) else bound
        lower = np.concatenate([self._best, score - off])
        if len(lower) > self._k:
            lower = np.partition(lower, len(lower) - self._k)[-self._k :]
        self._best = lower
        if len(lower) == self._k:
            self._least = float(lower.min())
        upper = score + off
        still = upper >= self._least
        self._parts.append((start + found[still], upper[still]))

    @staticmethod
    def together(parts: Sequence["_Kept"]) -> np.ndarray:
        """Returns the rows that may be among the k best of all parts of a gallery, in order."""
        least = -np.inf
        best = np.sort(np.concatenate([part._best for part in parts]))[::-1]
        if len(best) >= parts[0]._k:
            least = best[parts[0]._k - 1]
        found = [pair for part in parts for pair in part._parts]
        if not found:  # no score is a number
            return np.empty(0, np.int64)
        rows = np.concatenate([rows for rows, _ in found])
        upper = np.concatenate([upper for _, upper in found])
        return rows[upper >= least]


def build(
    folder: str | Path,
    embeddings: np.ndarray | Iterable[np.ndarray],
    names: Sequence[str],
    *,
    model: str,
    flip: bool = False,
    form: Form = "float32",
) -> Gallery:
    """Saves a gallery, block by block, and opens it.

    Args:
      folder: folder to create; new or empty.
      embeddings: (N, D) float of any length, or consecutive parts of it.
      names: N names; several rows may share one.
      model: `digest` of the `Model.input` of the network that made them.
      flip: whether the embeddings of the mirrored faces were added.
      form: what a search scans. int8 reads a quarter of the bytes and takes a quarter more disk.

    Raises:
      DataError: an embedding is zero or not finite, or the numbers of embeddings and names differ.
      UserError: the folder is not empty, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: choose a new folder for the gallery")
    if not len(names):
        raise DataError("a gallery needs at least one face: none was given")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as part:
            _write(part, _parts(embeddings), names, form)
            size = np.load(part / _ROWS, mmap_mode="r").shape[1]
            about = _About(model=model, flip=flip, rows=len(names), embedding_size=size, form=form)
            write_atomic(part / _NAMES, json.dumps(list(names)))
            write_atomic(part / _ABOUT, json.dumps(dataclasses.asdict(about)) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    return Gallery(folder)


def _parts(embeddings: np.ndarray | Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields blocks of unit vectors."""
    whole = [embeddings] if isinstance(embeddings, np.ndarray) else embeddings
    for each in whole:
        if each.ndim != 2:
            raise DataError(f"embeddings are {each.shape}; expected (n, D)")
        for start in range(0, len(each), BLOCK):
            part = each[start : start + BLOCK]
            if not np.isfinite(part).all() or not lengths(part).all():
                raise DataError(
                    "an embedding is zero or not finite: leave that face out or embed it again"
                )
            yield normalize(part)


def _write(folder: Path, parts: Iterator[np.ndarray], names: Sequence[str], form: Form) -> None:
    rows = scaled = None
    scales = np.empty(len(names), np.float32)
    residuals = np.empty(len(names), np.float32)
    done = 0
    for part in parts:
        end = done + len(part)
        if rows is None:
            shape = (len(names), part.shape[1])
            rows = _new(folder / _ROWS, shape, np.float32)
            scaled = _new(folder / _INT8, shape, np.int8) if form == "int8" else None
        if part.shape[1] != rows.shape[1]:
            raise DataError(
                f"embeddings have {rows.shape[1]} and {part.shape[1]} numbers: use embeddings "
                "of one model"
            )
        if end > len(names):
            raise _unequal(f"at least {end:,}", names)
        rows[done:end] = part
        if scaled is not None:
            scaled[done:end], scales[done:end], residuals[done:end] = _quantized(part)
        done = end
    if done != len(names):
        raise _unequal(f"{done:,}", names)
    if form == "int8":
        np.save(folder / _SCALES, scales)
        np.save(folder / _RESIDUALS, residuals)


def _unequal(found: str, names: Sequence[str]) -> DataError:
    return DataError(f"{found} embeddings for {len(names):,} names: give each name one embedding")


def _new(path: Path, shape: tuple[int, ...], dtype: type) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _quantized(part: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns int8 rows, their scales, and the norm of the quantization error, rounded up."""
    scale = (np.abs(part).max(axis=1) / 127).astype(np.float32)
    rows = np.rint(part / scale[:, None]).astype(np.int8)
    left = part.astype(np.float64) - rows * scale[:, None].astype(np.float64)
    residual = np.nextafter(lengths(left).astype(np.float32), np.float32(np.inf))
    return rows, scale, np.nextafter(residual, np.float32(np.inf))
