"""Positions of the records in a `.rec`: its `.idx`, read once and cached next to it as arrays.

`train.idx` is text. Reading it for the first time creates `train.arcface_index/`, a folder with the
arrays and, if requested, the labels of all records; later these files are mapped into memory after
a check of their digests. A damaged file is rebuilt from the `.idx` and the `.rec`. If the data's
folder is not writable, they go to the user's cache folder.
"""

import contextlib
import os
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from arcface_jax.data import sidecar
from arcface_jax.errors import DataError
from arcface_jax.runtime import sealed
from arcface_jax.runtime.files import atomic_files, write_atomic
from arcface_jax.runtime.sealed import DamagedError

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
FRAME = struct.Struct("<II")
"""Magic word; 3 bits for the part's position in the record, and 29 for its length."""
HEADER = struct.Struct("<IfQQ")
"""Number of labels that follow, the label if that is 0, and two ids."""
LENGTH_BITS = 29
LENGTH_MASK = (1 << LENGTH_BITS) - 1
WHOLE, FIRST, MIDDLE, LAST = range(4)


_NAN = np.float32(np.nan).view(np.uint32)
_CHUNK = 1 << 20  # records processed together
_OFFSETS, _KEYS, _LABELS = "offsets.npy", "keys.npy", "labels.npy"


@dataclass(frozen=True, eq=False)
class RecordIndex:
    """Keys in ascending order, and the byte offset of each key's record."""

    rec: Path
    keys: range | np.ndarray
    """A range if they are consecutive, which takes no memory."""
    offsets: np.ndarray
    """(n,) int64."""
    folder: Path | None
    """Folder that the arrays are mapped from."""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the mapped arrays by file name; already checked."""

    def __reduce__(self) -> tuple:
        # A mapped array would be copied into the pickle.
        if self.folder is not None:
            return _opened_again, (self.rec, self.folder)
        return RecordIndex, (self.rec, self.keys, self.offsets, None)

    def facts(self) -> dict[str, int | str]:
        """Returns the record file's size and digests of keys and offsets, for a fingerprint."""
        digests = dict(self.digests)
        if "offsets.npy" not in digests:
            digests["offsets.npy"] = sealed.array_digest(self.offsets)
        keys = self.keys
        if isinstance(keys, np.ndarray) and "keys.npy" not in digests:
            digests["keys.npy"] = sealed.array_digest(_small(keys))
        named = str(keys) if isinstance(keys, range) else digests["keys.npy"]
        size = self.rec.stat().st_size
        return {"bytes": size, "record keys": named, "record offsets": digests["offsets.npy"]}


def open_index(rec: Path) -> RecordIndex:
    """Opens the index of a record file, from the cached arrays if they are still valid.

    Raises:
      DataError: the `.idx` is not an index, or not of this record file.
    """
    stamp = _stamp(rec)
    for folder in _folders(rec):
        index = _mapped(rec, folder, stamp)
        if index is not None:
            return index
    index = _parsed(rec)
    if sidecar.is_settled((rec, rec.with_suffix(".idx"))):
        folder = _keep(index, stamp)
        if folder is not None:
            return _mapped(rec, folder, stamp) or index
    return index


def _opened_again(rec: Path, folder: Path) -> RecordIndex:
    """Opens an index in another process, after the sending process has checked the arrays."""
    return _mapped(rec, folder, _stamp(rec), check=False) or open_index(rec)


def open_labels(index: RecordIndex, *, which: int = 0) -> np.ndarray:
    """Returns (n,) int32: a label of each record; the first labels are scanned once and cached.

    -1 stands for an invalid label or a damaged record; reading that record reports the problem.

    Args:
      index: index of the record file.
      which: of several labels, from 0.
    """
    folder = index.folder
    if folder is None or which:
        return _scan(index.rec, index.offsets, which)
    if _LABELS in _digests(folder):
        try:
            return sidecar.load(folder, _LABELS, _digests(folder), count=len(index.offsets))
        except DamagedError as error:
            sidecar.print_damaged(error, f"read again from {index.rec}")
    labels = _scan(index.rec, index.offsets)
    with contextlib.suppress(OSError):
        file = folder / _LABELS
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        with atomic_files(file) as part:
            sidecar.save(part, labels)
        content = sealed.read(folder / sidecar.STAMP)
        content["digests"][_LABELS] = sealed.array_digest(labels)
        write_atomic(folder / sidecar.STAMP, sealed.seal(content))
        return np.load(file, mmap_mode="r")
    return labels


def _stamp(rec: Path) -> dict:
    """Returns a stamp that changes if either file changes."""
    files = {"rec": rec.stat(), "idx": rec.with_suffix(".idx").stat()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()} | {"version": 2}


def _folders(rec: Path) -> tuple[Path, ...]:
    """Returns the folders to cache in: next to the data, and the user's cache."""
    return sidecar.folders(rec, rec.with_suffix(sidecar.SUFFIX))


def _mapped(rec: Path, folder: Path, stamp: dict, *, check: bool = True) -> RecordIndex | None:
    """Maps the cached arrays; None if there are none, or if they are of other files."""
    if not (folder.exists() or folder.is_symlink()):
        return None
    try:
        kept = sidecar.read_stamp(folder)
        if kept["files"] != stamp:
            return None
        digests = {name: x for name, x in kept["digests"].items() if name != _LABELS}
        offsets = sidecar.load(folder, _OFFSETS, digests, count=kept["count"], check=check)
        if "first" in kept:
            keys = range(kept["first"], kept["first"] + len(offsets))
        else:
            keys = sidecar.load(folder, _KEYS, digests, count=kept["count"], check=check)
    except DamagedError as error:
        sidecar.print_damaged(error, f"made again from {rec.with_suffix('.idx')}")
        return None
    return RecordIndex(rec, keys, offsets, folder, digests)


def _digests(folder: Path) -> dict[str, str]:
    try:
        return sealed.read(folder / sidecar.STAMP)["digests"]
    except (FileNotFoundError, DamagedError):
        return {}


def _keep(index: RecordIndex, stamp: dict) -> Path | None:
    """Writes the arrays to the first writable folder."""
    arrays = {_OFFSETS: index.offsets}
    content: dict = {"files": stamp, "count": len(index.offsets)}
    if isinstance(index.keys, range):
        content["first"] = index.keys[0]
    else:
        arrays[_KEYS] = _small(index.keys)
    return sidecar.keep(_folders(index.rec), arrays, content)


def _small(keys: np.ndarray) -> np.ndarray:
    """Returns keys as they are stored: in 32 bits if possible."""
    return keys.astype(np.uint32) if keys[-1] < 2**32 else keys


def _parsed(rec: Path) -> RecordIndex:
    path = rec.with_suffix(".idx")
    table = _read_text(path)
    keys, offsets = table[:, 0], table[:, 1]
    size, last = rec.stat().st_size, offsets.max()
    if last > size - FRAME.size:
        raise DataError(
            f"{path} points to byte {last} but {rec} has {size}: the record file is truncated, "
            f"or the index belongs to another one; copy both again"
        )
    if not _rising(keys):
        order = np.argsort(keys, kind="stable")
        keys, offsets = keys[order], offsets[order]
        twice = keys[1:][keys[1:] == keys[:-1]]
        if twice.size:
            raise DataError(
                f"{path} lists key {twice[0]} more than once: each record needs a key of its own; "
                "recreate the pair"
            )
    first = int(keys[0])
    if int(keys[-1]) - first == len(keys) - 1:  # ascending, so none is missing
        return RecordIndex(rec, range(first, first + len(keys)), offsets, None)
    return RecordIndex(rec, keys, offsets, None)


def _rising(keys: np.ndarray) -> bool:
    """Returns whether the keys are strictly ascending, checked chunk by chunk."""
    parts = (keys[i : i + _CHUNK + 1] for i in range(0, len(keys), _CHUNK))
    return all((part[:-1] < part[1:]).all() for part in parts)


def _read_text(path: Path) -> np.ndarray:
    """Reads lines `key<TAB>offset` as (n, 2) int64 keys and byte offsets."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "loadtxt: input contained no data")
            table = np.loadtxt(path, dtype=np.int64, delimiter="\t", comments=None, ndmin=2)
    except ValueError as error:
        raise DataError(f"{path} is not an index of lines 'key<TAB>offset': {error}") from error
    if table.size == 0:
        raise DataError(f"{path} is empty: it should have a line 'key<TAB>offset' for each record")
    if table.shape[1] != 2 or table.min() < 0:
        raise DataError(
            f"{path} is not an index: each line should be 'key<TAB>offset', neither negative"
        )
    return table


def _scan(rec: Path, offsets: np.ndarray, which: int = 0) -> np.ndarray:
    """Reads (n,) int32 labels of the records in parallel, without their images."""
    labels = np.full(len(offsets), -1, np.int32)
    size = rec.stat().st_size
    words = np.memmap(rec, "<u4", "r", shape=(size // 4,))

    def look(start: int) -> None:
        part = slice(start, start + _CHUNK)
        labels[part] = _labels_of(words, offsets[part], size, which)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(look, range(0, len(offsets), _CHUNK)))
    return labels


def _labels_of(words: np.ndarray, offsets: np.ndarray, file_size: int, which: int) -> np.ndarray:
    """Returns the labels of records, -1 if missing.

    A multi-label header that is split by a magic word, one case in billions, counts as damaged.
    """
    offsets = np.asarray(offsets)
    good, flag, length, count, label = headers(words, offsets, which=which)
    need = HEADER.size + 4 * count
    # The first part of a split record may end anywhere after the label.
    need = np.where(flag == FIRST, np.where(count > 0, HEADER.size + 4 * (1 + which), 8), need)
    good &= ((flag == WHOLE) | (flag == FIRST)) & (length >= need)
    good &= offsets + FRAME.size + length <= file_size
    good &= (label >= 0) & (label < 2**31) & (label == np.floor(label))
    return np.where(good, np.where(good, label, 0).astype(np.int32), np.int32(-1))


def headers(words: np.ndarray, offsets: np.ndarray, *, which: int = 0) -> tuple[np.ndarray, ...]:
    """Decodes frames and headers of the RecordIO layout. `take` releases the GIL.

    Args:
      words: the file as (n,) little-endian uint32.
      offsets: (r,) int64 byte offsets of the records.
      which: of several labels, from 0.

    Returns:
      Five arrays of (r,): whether there is a frame (bool), the number of the record's part, the
      length of its data, the number of labels in its header (int64), and one of its labels
      (float32), NaN if it has fewer. Without a frame, the other values are undefined.
    """
    base = offsets >> 2
    magic, size, count, label = (words.take(base + k, mode="clip") for k in range(4))
    several = count > 0
    after = (FRAME.size + HEADER.size) // 4  # position of several labels
    label[several] = words.take(base[several] + after + which, mode="clip")
    if which:
        label[count <= which] = _NAN
    there = (magic == MAGIC) & (offsets & 3 == 0)
    length = (size & LENGTH_MASK).astype(np.int64)
    return there, size >> LENGTH_BITS, length, count.astype(np.int64), label.view("<f4")
