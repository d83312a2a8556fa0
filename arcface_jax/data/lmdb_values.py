"""Parse the values of LMDB entries: an image, with or without a label, in common formats.

Each parser returns None for other formats. No code in a value is run: pickles go through
`plain_pickle`, MessagePack and protocol buffers are parsed here.
"""

import contextlib
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from arcface_jax.data import arrow_messages, columnar, formats, plain_pickle
from arcface_jax.errors import DataError, UserError


class Value(NamedTuple):
    """An image from an entry."""

    image: bytes
    """The encoded image."""
    begin: int
    """Position of the image in the value; -1 if it is not stored contiguously."""
    label: int | str | None
    """The label; None if the value has none."""


def parse(value: Any, *, where: str) -> Value | None:
    """Parses a value into its image and label; returns None if the format is unknown.

    Args:
      value: bytes or a view of them.
      where: the entry, for messages.

    Raises:
      DataError: a pickle refers to types that images and labels do not need.
      UserError: the value needs pyarrow, which is not installed.
    """
    if formats.sniff(bytes(value[: formats.HEAD])) is not None:
        return Value(bytes(value), 0, None)
    data = bytes(value)
    for decode in _FORMS:
        try:
            found = _image_and_label(decode(data))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        except UserError:  # a package that is not installed
            raise
        except Exception:  # nearly any type, if it is another format
            continue
        if found is not None:
            image, label = found
            return Value(image, data.find(image), label)
    return None


def parse_fact(data: bytes, *, where: str) -> Any:
    """Parses a number or a list of keys that a writer stored; None if the format is unknown.

    Raises:
      DataError: a pickle refers to types that these do not need.
    """
    if data.isdigit():
        return int(data) if len(data) < _DIGITS else None
    return _first_of(int | list | tuple, data, where=where)


def parse_label(data: bytes, *, where: str) -> int | str | None:
    """Parses a label that is stored apart from its image; None if the format is unknown.

    Raises:
      DataError: a pickle refers to types that a label does not need.
    """
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode()
        if text.strip().isprintable():  # an integer's bytes may be text too, but not printable
            return text
    return _first_of(int | str, data, where=where)


def _first_of(kind: Any, data: bytes, *, where: str) -> Any:
    """Decodes a value in the first format that gives one of a type; None if there is none."""
    for decode in _FORMS:
        try:
            found = _plain(decode(data))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        except UserError:
            raise
        except Exception:
            continue
        if isinstance(found, kind):
            return found
    return None


def _image_and_label(content: Any) -> tuple[bytes, int | str | None] | None:
    """Returns image and label of a pair in either order, or of a dictionary with both."""
    if isinstance(content, dict):
        items = list(content.values())
    elif isinstance(content, list | tuple):
        items = list(content)
    else:
        items = [content]
    items = [_plain(item) for item in items]
    images = [x for x in items if isinstance(x, bytes) and formats.sniff(x[: formats.HEAD])]
    labels = [x for x in items if isinstance(x, int | str) and not isinstance(x, bool)]
    if len(images) != 1:
        return None
    if isinstance(content, dict):
        named = [_plain(x) for name, x in content.items() if _word(name) in _LABELS]
        labels = named or labels
    return images[0], labels[0] if labels else None


_DIGITS = 19  # most digits of a number; LMDB has no more entries
_LABELS = ("label", "target", "identity", "id", "class", "cls", "y")


def _word(name: Any) -> str:
    return (name.decode("latin1") if isinstance(name, bytes) else str(name)).lower()


def _plain(item: Any) -> Any:
    """Converts NumPy's values to Python's: byte arrays are images, arrays of one number labels."""
    if isinstance(item, plain_pickle.Array):
        item = item.values
    if isinstance(item, np.ndarray):
        return item.tobytes() if item.dtype == np.uint8 else item.item() if item.size == 1 else None
    if isinstance(item, np.generic):
        item = item.item()
    if isinstance(item, float) and item.is_integer():
        return int(item)
    return item


# ---- Forms --------------------------------------------------------------------------------------


def _pickled(data: bytes) -> Any:
    if data[:1] not in (b"\x80", b"(", b"]", b"}"):
        raise ValueError("no pickle")
    return plain_pickle.load(data, what="image with a label")


def _messagepack(data: bytes) -> Any:
    """Decodes MessagePack; see https://github.com/msgpack/msgpack/blob/master/spec.md."""
    content, end = _unpacked(data, 0, depth=0)
    if end != len(data):
        raise ValueError("bytes follow")
    return content


_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_LENGTHS = {
    **{0xC4: ">B", 0xC5: ">H", 0xC6: ">I"},
    **{0xD9: ">B", 0xDA: ">H", 0xDB: ">I"},
    **{0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"},
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def _unpacked(data: bytes, at: int, *, depth: int) -> tuple[Any, int]:
    """Decodes the object at a position, and returns it with the position of its end."""
    code, at = data[at], at + 1
    if code < 0x80 or code >= 0xE0:
        return (code if code < 0x80 else code - 256), at
    if code in _CONSTANTS:
        return _CONSTANTS[code], at
    if code in _NUMBERS:
        (number,) = struct.unpack_from(_NUMBERS[code], data, at)
        return number, at + struct.calcsize(_NUMBERS[code])
    if code in _LENGTHS:
        (count,) = struct.unpack_from(_LENGTHS[code], data, at)
        at += struct.calcsize(_LENGTHS[code])
    elif code < 0xC0:
        count = code & (0x1F if code >= 0xA0 else 0x0F)
    else:
        raise ValueError(f"type {code:#x}")
    if code in (0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB) or 0xA0 <= code < 0xC0:
        text = data[at : at + count]
        if len(text) < count:
            raise ValueError("cut short")
        return _as_text(code, text), at + count
    if depth > 2 or count > len(data):
        raise ValueError("nested, or longer than the value")
    mapping = 0x80 <= code < 0x90 or code in (0xDE, 0xDF)
    items = []
    for _ in range(2 * count if mapping else count):
        item, at = _unpacked(data, at, depth=depth + 1)
        items.append(item)
    return (dict(zip(items[::2], items[1::2], strict=True)) if mapping else items), at


def _as_text(code: int, data: bytes) -> bytes | str:
    """Decodes bytes that earlier writers stored as text."""
    if code in (0xC4, 0xC5, 0xC6):
        return data
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _serialized(data: bytes) -> Any:
    """Decodes pyarrow's `serialize` up to release 13: an Arrow stream after four counts."""
    begin = data.find(b"\xff\xff\xff\xff", 0, 64)
    if begin < 4 or any(data[:begin]):  # counts of tensors and buffers, which follow the stream
        raise ValueError("no plain serialized object")
    pyarrow = columnar.import_pyarrow()
    file = pyarrow.BufferReader(data[begin:])
    expanded = arrow_messages.expanded(file, whole=False)
    columnar.check_expansion(expanded, len(data), where="the Arrow stream in it")
    file.seek(0)
    with pyarrow.ipc.open_stream(file) as stream:
        rows = stream.read_all().column(0).to_pylist()
    return rows[0]


def _datum(data: bytes) -> Any:
    """Decodes Caffe's Datum with an encoded image: field 4 is the image, field 5 the label."""
    fields: dict[int, Any] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            fields[number], at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
            fields[number] = data[at : at + size]
            at += size
        else:
            raise ValueError("another field")
    if at != len(data) or not isinstance(fields.get(4), bytes):
        raise ValueError("no datum")
    return [fields[4], fields[5]] if 5 in fields else [fields[4]]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError("no number")


_FORMS: tuple[Callable[[bytes], Any], ...] = (_pickled, _serialized, _messagepack, _datum)
