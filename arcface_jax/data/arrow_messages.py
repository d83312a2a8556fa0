"""Find the decompressed size of an Arrow file without decompressing it.

An Arrow file or stream is a sequence of messages; in a compressed one, each buffer starts with its
size as 8 bytes. Messages are FlatBuffers, of which this reads the few fields that it needs:
https://github.com/apache/arrow/blob/main/format/Message.fbs
"""

import struct
from collections.abc import Iterator
from typing import Any

_MARK = b"\xff\xff\xff\xff"
_FILE_START = 8  # bytes before the messages of the file format
_DICTIONARY, _BATCH = 2, 3  # kinds of messages with a body
_BUFFERS, _COMPRESSION = 2, 3  # fields of a record batch
_MOST_MESSAGES = 10_000_000


def expanded(file: Any, *, whole: bool) -> int:
    """Returns the total bytes of all compressed buffers after decompression.

    Args:
      file: an open file with `read`, `seek` and `size`.
      whole: whether it has the file format; otherwise it is a stream.

    Raises:
      ValueError: the messages are malformed.
    """
    try:
        return sum(_of_message(file, *message) for message in _messages(file, whole=whole))
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError("a message of the file is damaged") from error


def _messages(file: Any, *, whole: bool) -> Iterator[tuple[bytes, int]]:
    """Yields the metadata of each message, and where its body starts."""
    at, size = _FILE_START if whole else 0, file.size()
    for _ in range(_MOST_MESSAGES):
        file.seek(at)
        head = file.read(8)
        if head[:4] != _MARK:  # the format before 2019
            head = _MARK + head[:4]
            at -= 4
        length = int.from_bytes(head[4:8], "little", signed=True)
        if len(head) < 8 or length <= 0:
            return
        at += 8
        if at + length > size:
            return  # pyarrow reports it
        file.seek(at)
        metadata = file.read(length)
        at += length
        yield metadata, at
        body = _number(metadata, _root(metadata), 3, "<q")
        if body < 0:
            raise ValueError("a message of the file is damaged")
        at += body


def _of_message(file: Any, metadata: bytes, body: int) -> int:
    root = _root(metadata)
    kind = _number(metadata, root, 1, "<B")
    if kind not in (_DICTIONARY, _BATCH):
        return 0
    header = _table(metadata, root, 2)
    batch = header if kind == _BATCH or header is None else _table(metadata, header, 1)
    if batch is None or _table(metadata, batch, _COMPRESSION) is None:
        return 0
    total = 0
    for offset, length in _buffers(metadata, batch):
        if length >= 8:
            file.seek(body + offset)
            total += max(0, int.from_bytes(file.read(8), "little", signed=True))
    return total


def _buffers(data: bytes, batch: int) -> Iterator[tuple[int, int]]:
    vector = _table(data, batch, _BUFFERS)
    if vector is None:
        return
    (count,) = struct.unpack_from("<I", data, vector)
    if vector + 4 + 16 * count > len(data):
        raise IndexError
    yield from struct.iter_unpack("<qq", data[vector + 4 : vector + 4 + 16 * count])


def _root(data: bytes) -> int:
    return struct.unpack_from("<I", data, 0)[0]


def _field(data: bytes, table: int, number: int) -> int | None:
    """Returns the position of a table's field; None if it has its default."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise IndexError
    if 4 + 2 * number + 2 > struct.unpack_from("<H", data, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
    return table + offset if offset else None


def _number(data: bytes, table: int, number: int, form: str) -> int:
    place = _field(data, table, number)
    return 0 if place is None else struct.unpack_from(form, data, place)[0]


def _table(data: bytes, table: int, number: int) -> int | None:
    """Returns the position of the table or vector that a field refers to."""
    place = _field(data, table, number)
    return None if place is None else place + struct.unpack_from("<I", data, place)[0]
