"""RecordIO, the format of MXNet's `train.rec` and `train.idx`, read and written without MXNet.

A record is `<u32 magic> <u32: flag in the top 3 bits, length in the low 29>` and the data, padded
to 4 bytes. Data that contains the magic word on a 4-byte boundary is split there: the word is
dropped and the parts carry the flags 1 (first), 2 (middle), 3 (last).
A payload is `<u32 flag> <f32 label> <u64 id> <u64 id2>`, `flag` more f32 labels, and the encoded
image.
All numbers are little-endian.
"""

import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.data.recordio import index as record_index
from arcface_jax.data.recordio.index import (
    FIRST,
    FRAME,
    HEADER,
    LAST,
    LENGTH_BITS,
    LENGTH_MASK,
    MAGIC,
    MAGIC_BYTES,
    MIDDLE,
    WHOLE,
)
from arcface_jax.errors import DataError, ImageError
from arcface_jax.runtime.files import open_own

# Reading a header for longer than this many seconds shows that the disk was slow. Asking the system
# to read ahead costs as much as all other work on an image, so it is done only for some time after
# that.
_SLOW = 20e-6
_SLOW_CALLS = 1000


class Record(NamedTuple):
    """A decoded record."""

    label: float | np.ndarray
    """One number, or (n,) float32 if the header's flag announces n."""
    id: int
    data: bytes
    """The encoded image; empty in records that describe identities."""


class RecordReader:
    """Random access to the records of a `.rec` file by the keys of its `.idx`.

    Safe to use from many threads, and to send to another process, which reopens the file.

    Raises (the constructor): DataError if a file is missing, or the two do not belong together.
    """

    def __init__(self, rec: Path):
        index = rec.with_suffix(".idx")
        for path, other in ((rec, index), (index, rec)):
            if not path.is_file():
                there = f"{other.name} is there without it" if other.is_file() else "nor its index"
                raise DataError(
                    f"{path} is missing ({there}): a record file is a pair {rec.name} + "
                    f"{index.name}; "
                    f"copy both, or recreate the pair"
                )
        self.path = rec
        self._index = record_index.open_index(rec)
        self._open()

    @property
    def keys(self) -> range | np.ndarray:
        """All keys, ascending."""
        return self._index.keys

    def _open(self) -> None:
        with self.path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._size = len(self._bytes)
        self._slow = 0  # remaining calls of `images` that ask for read-ahead
        self._data = np.frombuffer(self._bytes, np.uint8)
        self._words = np.frombuffer(self._bytes, "<u4", self._size // 4)
        self._offsets = np.asarray(
            self._index.offsets
        )  # slicing it is cheaper than slicing a memmap

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict:
        return {"path": self.path, "_index": self._index}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._open()

    def read(self, key: int) -> Record:
        """Returns the record of a key of the index.

        Raises:
          DataError: there is no such key.
          ImageError: the bytes at its place are not a whole record.
        """
        return self.read_at(self.position(key))

    def read_at(self, position: int) -> Record:
        """Returns the record at a position of the ascending keys.

        Raises:
          ImageError: the bytes at its place are not a whole record.
        """
        key = int(self.keys[position])
        return _unpack(
            self._payload(key, int(self._offsets[position])), f"{self.path}, record {key}"
        )

    def images(
        self, positions: np.ndarray, *, which: int = 0
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Returns the encoded images of many records, not copied, and a label of each.

        The GIL is held only for a few calls that cover all records.

        Args:
          positions: (n,) int64 positions in the ascending keys.
          which: of several labels, from 0.

        Returns:
          n uint8 arrays, and (n,) float32. An array is empty if the record has no image, is split
          or is damaged: `read_at` reads it, or reports the problem.

        Raises:
          DataError: the file was truncated in the meantime.
        """
        if self._bytes.size() < self._size:
            raise DataError(
                f"{self.path} was cut from {self._size} to {self._bytes.size()} bytes while it was "
                "read: put the whole file back, and run the same command again"
            )
        if self._slow > 0:
            self._slow -= 1
            self.will_need(positions, positions + 1)
        started = time.perf_counter()
        offsets = self._offsets[positions]
        there, flag, length, count, labels = record_index.headers(self._words, offsets, which=which)
        if time.perf_counter() - started > _SLOW * len(positions):
            self._slow = _SLOW_CALLS
        begin = offsets + FRAME.size + HEADER.size + 4 * count
        end = offsets + FRAME.size + length
        whole = there & (flag == WHOLE) & (begin < end) & (end <= self._size)
        spans = zip(
            np.where(whole, begin, 0).tolist(), np.where(whole, end, 0).tolist(), strict=True
        )
        return [self._data[begin:end] for begin, end in spans], labels

    def labels(self, *, which: int = 0) -> np.ndarray:
        """Returns (n,) int32: a label of each record in key order, scanned once.

        -1 stands for an invalid label or a damaged record.

        Args:
          which: of several labels, from 0.
        """
        return record_index.open_labels(self._index, which=which)

    def facts(self) -> dict[str, int | str]:
        """Returns the file's size, and digests of its index."""
        return self._index.facts()

    def position(self, key: int) -> int:
        """Returns the position of a key in the ascending keys.

        Raises:
          DataError: the key does not exist.
        """
        keys, position = self._index.keys, self.below(key)
        if position == len(keys) or keys[position] != key:
            raise DataError(
                f"{self.path}: no record has key {key} (keys run from {keys[0]} to {keys[-1]})"
            )
        return position

    def below(self, key: int) -> int:
        """Returns the number of smaller keys."""
        keys = self._index.keys
        if isinstance(keys, range):  # NumPy would convert it to an array
            return min(max(key - keys.start, 0), len(keys))
        return int(np.searchsorted(keys, key))

    def will_need(self, first: np.ndarray, last: np.ndarray) -> None:
        """Asks the system to read ahead the records at positions first .. last - 1.

        Args:
          first: (n,) int64.
          last: (n,) int64.
        """
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        begin = self._offsets[first]
        begin -= begin % mmap.PAGESIZE
        inside = last < len(self._offsets)
        end = np.where(inside, self._offsets[np.where(inside, last, 0)], self._size)
        for place, length in zip(begin.tolist(), (end - begin).tolist(), strict=True):
            if 0 < length <= self._size - place:
                self._bytes.madvise(mmap.MADV_WILLNEED, place, length)

    def _payload(self, key: int, offset: int) -> bytes:
        parts = []
        while True:
            flag, data = self._part(key, offset)
            expected = (MIDDLE, LAST) if parts else (WHOLE, FIRST)
            if flag not in expected:
                raise self._damaged(
                    key, offset, f"has part number {flag} where {expected} may stand"
                )
            parts.append(data)
            if flag in (WHOLE, LAST):
                return MAGIC_BYTES.join(parts)
            offset += FRAME.size + len(data) + -len(data) % 4

    def _part(self, key: int, offset: int) -> tuple[int, bytes]:
        if offset + FRAME.size > self._size:
            raise self._damaged(key, offset, "ends before its header does")
        magic, word = FRAME.unpack_from(self._bytes, offset)
        if magic != MAGIC:
            raise self._damaged(key, offset, f"begins with {magic:#010x} instead of {MAGIC:#010x}")
        length = word & LENGTH_MASK
        begin = offset + FRAME.size
        data = self._bytes[begin : begin + length]
        if len(data) < length:
            raise self._damaged(key, offset, f"announces {length} bytes, and {len(data)} are left")
        return word >> LENGTH_BITS, data

    def _damaged(self, key: int, offset: int, what: str) -> ImageError:
        return ImageError(
            f"{self.path}, record {key}",
            f"at byte {offset} it {what}: the file is truncated or damaged, or the .idx belongs "
            f"to another file; copy {self.path.name} and its .idx again",
        )


def _unpack(payload: bytes, where: str) -> Record:
    if len(payload) < HEADER.size:
        raise ImageError(
            where,
            f"{len(payload)} bytes are too few for the {HEADER.size}-byte header of an "
            "image record",
        )
    count, label, identifier, _ = HEADER.unpack_from(payload)
    if count == 0:
        return Record(label, identifier, payload[HEADER.size :])
    end = HEADER.size + 4 * count
    if len(payload) < end:
        raise ImageError(
            where, f"the header announces {count} labels, and the record ends before them"
        )
    labels = np.frombuffer(payload, "<f4", count, HEADER.size)
    return Record(labels, identifier, payload[end:])


class RecordWriter:
    """Writes `path` and its `.idx` together; a context manager.

    Args:
      path: the `.rec` file.
      resume: continue after at most this many records of an interrupted writer; `written` counts
        them.
    """

    def __init__(self, path: Path, *, resume: int = 0):
        index = path.with_suffix(".idx")
        offsets = _whole_records(path, index)[: resume + 1] if resume else [0]
        self.written = len(offsets) - 1
        """Number of records already in the file."""
        self._rec = open_own(path, "r+b" if self.written else "wb")
        self._rec.seek(offsets[-1])
        self._rec.truncate()
        self._idx = open_own(index, "r+" if self.written else "w")
        lines = [self._idx.readline() for _ in range(self.written)]
        self._idx.seek(sum(map(len, lines)))
        self._idx.truncate()

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._rec.close()
        self._idx.close()

    def write(self, key: int, data: bytes, *, label: float | Sequence[float] | np.ndarray) -> None:
        """Appends a record; `label` is one number or, as in identity records, several."""
        self._idx.write(f"{key}\t{self._rec.tell()}\n")
        if isinstance(label, Sequence | np.ndarray):
            header = HEADER.pack(len(label), 0.0, key, 0) + np.asarray(label, "<f4").tobytes()
        else:
            header = HEADER.pack(0, label, key, 0)
        self._write_payload(header + data)

    def overwrite_first(self, label: Sequence[float]) -> None:
        """Replaces the first record's labels by as many others."""
        self._rec.seek(FRAME.size + HEADER.size)
        self._rec.write(np.asarray(label, "<f4").tobytes())
        self._rec.seek(0, os.SEEK_END)

    def _write_payload(self, payload: bytes) -> None:
        parts = _split_at_magic(payload)
        for number, part in enumerate(parts):
            flag = WHOLE if len(parts) == 1 else FIRST if number == 0 else MIDDLE
            if len(parts) > 1 and number == len(parts) - 1:
                flag = LAST
            self._rec.write(FRAME.pack(MAGIC, flag << LENGTH_BITS | len(part)))
            self._rec.write(part + bytes(-len(part) % 4))


def _whole_records(rec: Path, index: Path) -> list[int]:
    """Returns the offsets of the records that are known to be complete, and the end of the last.

    A record is complete if another one starts after it, because records are written in order. The
    two files may be truncated at different records, because each has its own buffer; nothing after
    a damaged line is trusted.
    """
    if not (rec.is_file() and index.is_file()):
        return [0]
    size = rec.stat().st_size
    offsets, last = [], -1
    for line in index.read_bytes().splitlines(keepends=True):
        key, _, end = line.partition(b"\t")
        offset = int(end) if end.endswith(b"\n") and end[:-1].isdigit() else -1
        if key != b"%d" % len(offsets) or not last < offset <= size:
            break
        offsets.append(offset)
        last = offset
    words = np.fromfile(rec, "<u4", 0) if size < 4 else np.memmap(rec, "<u4", "r", shape=size // 4)
    begun = np.array([offset for offset in offsets if offset + 4 <= size], np.int64)
    wrong = np.flatnonzero((begun % 4 != 0) | (words[begun // 4] != MAGIC))
    return offsets[: wrong[0] if len(wrong) else None] or [0]


def _split_at_magic(payload: bytes) -> list[bytes]:
    words = np.frombuffer(payload, "<u4", len(payload) // 4)
    parts, start = [], 0
    for word in np.flatnonzero(words == MAGIC):
        parts.append(payload[start : 4 * word])
        start = 4 * int(word) + 4
    return [*parts, payload[start:]]
