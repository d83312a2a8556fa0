"""RecordIO, the format of MXNet's `train.rec` and `train.idx`, read and written without MXNet.

A record is `<u32 magic> <u32: flag in the top 3 bits, length in the low 29>` and the data, padded
to 4 bytes. Data that contains the magic word on a 4-byte boundary is split there: the word is
dropped and the parts carry the flags 1 (first), 2 (middle), 3 (last).
A payload is `<u32 flag> <f32 label> <u64 id> <u64 id2>`, `flag` more f32 labels, and the encoded
image.
All numbers are little-endian.
"""

import os
import struct
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from arcface_jax.errors import DataError

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_FRAME = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_LENGTH_BITS = 29
_LENGTH_MASK = (1 << _LENGTH_BITS) - 1
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)


class Record(NamedTuple):
    """A payload taken apart."""

    label: float | np.ndarray
    """One number, or (n,) float32 where the header's flag announces n."""
    id: int
    data: bytes
    """The encoded image; empty in the records that describe identities."""


class RecordReader:
    """Random access to the records of a `.rec` file by the keys of its `.idx`.

    Safe to use from many threads, and to send to another process, where the file is opened anew.

    Raises (the constructor): DataError where a file is missing, or does not belong to the other.
    """

    def __init__(self, rec: Path):
        index = rec.with_suffix(".idx")
        for path, other in ((rec, index), (index, rec)):
            if not path.is_file():
                there = f"{other.name} is there without it" if other.is_file() else "nor its index"
                raise DataError(
                    f"{path} is missing ({there}): a record file is a pair {rec.name} + "
                    f"{index.name}; "
                    f"copy both, or make the pair anew"
                )
        self.path = rec
        keys, offsets = _read_index(index)
        size = rec.stat().st_size
        if offsets.max() > size - _FRAME.size:
            raise DataError(
                f"{index} points to byte {offsets.max()} but {rec} has {size}: the record file is "
                "cut short, "
                f"or the index belongs to another; copy both again"
            )
        order = np.argsort(keys, kind="stable")
        self.keys = keys[order]
        self._offsets = offsets[order]
        twice = self.keys[1:][self.keys[1:] == self.keys[:-1]]
        if twice.size:
            raise DataError(
                f"{index} lists key {twice[0]} more than once: each record needs a key of its own; "
                "make the pair anew"
            )
        self._open()

    def _open(self) -> None:
        self._file = self.path.open("rb")
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._open()

    def read(self, key: int) -> Record:
        """The record of a key of the index.

        Raises:
          DataError: there is no such key, or the bytes at its place are not a whole record.
        """
        offset = self._offset(key)
        return _unpack(self._payload(key, offset), f"{self.path}, record {key}")

    def read_label(self, key: int) -> float | np.ndarray:
        """The label alone, without reading the image.

        Raises:
          DataError: as `read`.
        """
        frame = self._pread(_FRAME.size + _HEADER.size, self._offset(key))
        if len(frame) == _FRAME.size + _HEADER.size:
            magic, word, count, label, _, _ = struct.unpack("<IIIfQQ", frame)
            flag, length = word >> _LENGTH_BITS, word & _LENGTH_MASK
            # Anything out of the ordinary is left to `read`.
            if (magic, flag, count) == (MAGIC, _WHOLE, 0) and length >= _HEADER.size:
                return label
        return self.read(key).label

    def _offset(self, key: int) -> int:
        position = int(np.searchsorted(self.keys, key))
        if position == len(self.keys) or self.keys[position] != key:
            raise DataError(
                f"{self.path}: no record has key {key} (keys run from {self.keys[0]} to "
                f"{self.keys[-1]})"
            )
        return int(self._offsets[position])

    def _payload(self, key: int, offset: int) -> bytes:
        parts = []
        while True:
            flag, data = self._part(key, offset)
            expected = (_MIDDLE, _LAST) if parts else (_WHOLE, _FIRST)
            if flag not in expected:
                raise self._damaged(
                    key, offset, f"has part number {flag} where {expected} may stand"
                )
            parts.append(data)
            if flag in (_WHOLE, _LAST):
                return _MAGIC_BYTES.join(parts)
            offset += _FRAME.size + len(data) + -len(data) % 4

    def _part(self, key: int, offset: int) -> tuple[int, bytes]:
        frame = self._pread(_FRAME.size, offset)
        if len(frame) < _FRAME.size:
            raise self._damaged(key, offset, "ends before its header does")
        magic, word = _FRAME.unpack(frame)
        if magic != MAGIC:
            raise self._damaged(key, offset, f"begins with {magic:#010x} instead of {MAGIC:#010x}")
        length = word & _LENGTH_MASK
        data = self._pread(length, offset + _FRAME.size)
        if len(data) < length:
            raise self._damaged(key, offset, f"announces {length} bytes, and {len(data)} are left")
        return word >> _LENGTH_BITS, data

    def _damaged(self, key: int, offset: int, what: str) -> DataError:
        return DataError(
            f"{self.path}: record {key} at byte {offset} {what}: the file is cut short or "
            "damaged, or the "
            f".idx belongs to another file; copy {self.path.name} and its .idx again"
        )

    def _pread(self, length: int, offset: int) -> bytes:
        return os.pread(self._file.fileno(), length, offset)


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and byte offsets, int64, of the lines `key<TAB>offset`."""
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
    return table[:, 0], table[:, 1]


def _unpack(payload: bytes, where: str) -> Record:
    if len(payload) < _HEADER.size:
        raise DataError(
            f"{where}: {len(payload)} bytes are too few for the {_HEADER.size}-byte header of an "
            "image record"
        )
    count, label, identifier, _ = _HEADER.unpack_from(payload)
    if count == 0:
        return Record(label, identifier, payload[_HEADER.size :])
    end = _HEADER.size + 4 * count
    if len(payload) < end:
        raise DataError(
            f"{where}: the header announces {count} labels, and the record ends before them"
        )
    labels = np.frombuffer(payload, "<f4", count, _HEADER.size)
    return Record(labels, identifier, payload[end:])


class RecordWriter:
    """Writes `path` and its `.idx` together; a context manager."""

    def __init__(self, path: Path):
        self._rec: BinaryIO = path.open("wb")
        self._idx = path.with_suffix(".idx").open("w")

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._rec.close()
        self._idx.close()

    def write(self, key: int, data: bytes, *, label: float | Sequence[float] | np.ndarray) -> None:
        """Appends a record; `label` is one number, or several, as identity records have."""
        self._idx.write(f"{key}\t{self._rec.tell()}\n")
        if isinstance(label, Sequence | np.ndarray):
            header = _HEADER.pack(len(label), 0.0, key, 0) + np.asarray(label, "<f4").tobytes()
        else:
            header = _HEADER.pack(0, label, key, 0)
        parts = _split_at_magic(header + data)
        for number, part in enumerate(parts):
            flag = _WHOLE if len(parts) == 1 else _FIRST if number == 0 else _MIDDLE
            if len(parts) > 1 and number == len(parts) - 1:
                flag = _LAST
            self._rec.write(_FRAME.pack(MAGIC, flag << _LENGTH_BITS | len(part)))
            self._rec.write(part + bytes(-len(part) % 4))


def _split_at_magic(payload: bytes) -> list[bytes]:
    words = np.frombuffer(payload, "<u4", len(payload) // 4)
    parts, start = [], 0
    for word in np.flatnonzero(words == MAGIC):
        parts.append(payload[start : 4 * word])
        start = 4 * int(word) + 4
    return [*parts, payload[start:]]
