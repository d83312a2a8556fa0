"""Read files of `torch.save`: plain containers, and tensors that are loaded on request.

Both formats, the zip archive and the one before PyTorch 1.6, are a pickle and the bytes of
storages. The pickle is interpreted by `safe_pickle`, which runs no code; this module replaces the
few torch functions that make tensors.
"""

import io
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from arcface_jax.convert import file_kinds, safe_pickle
from arcface_jax.convert.safe_pickle import DamagedPickleError, Global
from arcface_jax.errors import UserError


class Entry(NamedTuple):
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    place: tuple[object, ...]
    """Equal for tensors that share memory."""
    read: Callable[[], torch.Tensor]
    """Reads the tensor as a contiguous copy on the CPU."""

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Unusable:
    """A tensor of a kind that no network here uses, such as a sparse one."""

    kind: str


def entry_of(tensor: torch.Tensor) -> Entry:
    """Returns an entry for a tensor in memory."""
    tensor = tensor.detach()
    return Entry(tuple(tensor.shape), tensor.dtype, (id(tensor),), tensor.contiguous)


def read(path: Path) -> object:
    """Reads a file's containers: tensors become `Entry`, other objects `safe_pickle.Skipped`.

    Args:
      path: path of a file that `file_kinds.recognize` calls "zip" or "legacy".

    Raises:
      UserError: it is damaged, or claims more data than it has.
    """
    legacy = file_kinds.recognize(path) == "legacy"
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _read_legacy(data) if legacy else _read_zip(path, data)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OSError, EOFError) as error:
        raise _damaged(path, error) from error
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return UserError(f"{path} is damaged, or not a file of weights ({reason}): copy it again")


# ---- storages and tensors --------------------------------------------------------------------

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}
_DTYPES = {str(dtype): dtype for dtype in _STORAGES.values()}


@dataclass(eq=False)
class _Storage:
    """Bytes in the file that tensors share."""

    key: str
    dtype: torch.dtype | None
    nbytes: int
    data: mmap.mmap
    start: int = -1
    """Where they start; in the old format only known after the pickle."""
    check: Callable[[], None] | None = None
    """Raises if the bytes are corrupt."""

    def bytes_between(self, start: int, stop: int) -> np.ndarray:
        """Returns a copy, aligned for every type."""
        if self.check is not None:
            self.check()
            self.check = None
        return np.frombuffer(self.data, np.uint8, stop - start, self.start + start).copy()


def _storage_of(identity: object) -> tuple[str, torch.dtype | None, int]:
    """Parses a persistent id: key, type, and size in elements (bytes for an untyped storage)."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise DamagedPickleError("a reference that is not a torch storage")
    kind, key, count = identity[1], identity[2], identity[4]
    if not isinstance(kind, Global) or not isinstance(key, str) or not _is_size(count):
        raise DamagedPickleError("a storage without type, name or size")
    name = kind.name.rpartition(".")[2]
    if name != "UntypedStorage" and name not in _STORAGES:
        raise DamagedPickleError(f"a storage of the kind {name[:40]}")
    return key, _STORAGES.get(name), count


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > 8 or not all(map(_is_size, value)):
        raise DamagedPickleError("a tensor without a shape")
    return value


def _tensor(
    storage: object, offset: object, size: object, stride: object, dtype: object = None
) -> Entry | Unusable:
    if not isinstance(storage, _Storage) or not _is_size(offset):
        raise DamagedPickleError("a tensor without a storage")
    assert isinstance(offset, int)
    shape, steps = _sizes(size), _sizes(stride)
    kind = storage.dtype or (_DTYPES.get(dtype.name) if isinstance(dtype, Global) else None)
    if kind is None:
        return Unusable(f"of the type {getattr(dtype, 'name', dtype)}")
    if len(shape) != len(steps):
        raise DamagedPickleError("a tensor whose shape and strides do not belong together")
    count = math.prod(shape)
    if any(n > 1 and step == 0 for n, step in zip(shape, steps, strict=True)):
        return Unusable("expanded (a stride of 0)")
    last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + 1
    if count and max(last, count) * kind.itemsize > storage.nbytes:
        raise DamagedPickleError(
            f"a tensor of shape {shape} in a storage of {storage.nbytes} bytes"
        )

    def read() -> torch.Tensor:
        if not count:
            return torch.zeros(shape, dtype=kind)
        spanned = storage.bytes_between(offset * kind.itemsize, last * kind.itemsize)
        flat = torch.from_numpy(spanned).view(kind)
        return flat.as_strided(shape, steps).contiguous()

    return Entry(shape, kind, (id(storage), offset, shape, steps), read)


def _parameter(data: object, *_: object) -> object:
    return data


def _of_type(function: object, _: object, arguments: object, *__: object) -> object:
    """Returns a tensor of a subclass of torch.Tensor as a tensor."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise DamagedPickleError("a tensor without a form")
    return _make(function.name, arguments)


def _mapping(*arguments: object) -> dict[Any, Any]:
    """Makes an OrderedDict or defaultdict: empty, or with pairs as Python 2 wrote it."""
    pairs = arguments[-1] if arguments else ()
    if not isinstance(pairs, list | tuple):
        return {}
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and isinstance(pair[0], str)}


# All functions that a file may call; the names are torch's, the functions this module's.
_FUNCTIONS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": lambda s, o, size, stride: _tensor(s, o, size, stride),
    "torch._utils._rebuild_tensor_v2": lambda s, o, size, stride, *_: _tensor(s, o, size, stride),
    "torch._utils._rebuild_tensor_v3": lambda s, o, size, stride, _, __, dtype, *___: _tensor(
        s, o, size, stride, dtype
    ),
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": lambda sizes: _sizes(tuple(sizes)),
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
}
_UNUSABLE = {
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_qtensor": "quantized",
    "_rebuild_meta_tensor_no_storage": "without values (on the meta device)",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_wrapper_subclass": "of a class of its own",
    "_rebuild_device_tensor_from_numpy": "of a device that is not here",
}


def _make(name: str, arguments: tuple[Any, ...]) -> object:
    """Implements `safe_pickle.Make` for torch's tensors."""
    module, _, last = name.rpartition(".")
    if module == "torch._utils" and last in _UNUSABLE:
        return Unusable(_UNUSABLE[last])
    function = _FUNCTIONS.get(name)
    return NotImplemented if function is None else function(*arguments)


# ---- the two formats -------------------------------------------------------------------------


def _read_zip(path: Path, data: mmap.mmap) -> object:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    root = min(pickles, key=len).removesuffix("data.pkl")
    places = {name: _place(data, info) for name, info in members.items() if name.startswith(root)}
    order = places.get(f"{root}byteorder")
    if order and data[order[0] : order[0] + order[1]].strip() == b"big":
        raise ValueError("a big-endian machine wrote it")
    storages: dict[str, _Storage] = {}

    def persistent(identity: object) -> _Storage:
        key, dtype, count = _storage_of(identity)
        name = f"{root}data/{key}"
        start, size = places[name]
        if count * (dtype.itemsize if dtype else 1) > size:
            raise DamagedPickleError(f"{name} has {size} bytes for {count} values")
        found = storages.get(key)
        if found is None:
            check = _check_of(data, members[name], start, size)
            found = storages[key] = _Storage(key, dtype, size, data, start, check)
        elif found.dtype is not dtype:
            return _Storage(key, dtype, size, data, start, found.check)
        return found

    start, size = places[f"{root}data.pkl"]
    _check_of(data, members[f"{root}data.pkl"], start, size)()
    content = io.BytesIO(data[start : start + size])
    return safe_pickle.load(content, make=_make, persistent=persistent)


def _place(data: mmap.mmap, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Returns where a member's bytes start, and how many there are."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"{ascii(info.filename)[:60]} is compressed, which torch.save never does")
    header = data[info.header_offset : info.header_offset + 30]
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{ascii(info.filename)[:60]} is not where it should be")
    names, extra = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + names + extra
    if start + info.file_size > len(data):
        raise ValueError(f"{ascii(info.filename)[:60]} goes beyond the end of the file")
    return start, info.file_size


def _check_of(data: mmap.mmap, info: zipfile.ZipInfo, start: int, size: int) -> Callable[[], None]:
    def check() -> None:
        with memoryview(data) as whole, whole[start : start + size] as part:
            found = zlib.crc32(part)
        if found != info.CRC:
            raise DamagedPickleError(f"the checksum of {ascii(info.filename)[:60]} is wrong")

    return check


def _read_legacy(data: mmap.mmap) -> object:
    if safe_pickle.load(data) != file_kinds.LEGACY_MAGIC or safe_pickle.load(data) != 1001:
        raise ValueError("another version of torch's format")
    system = safe_pickle.load(data)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise ValueError("a big-endian machine wrote it")
    storages: dict[str, _Storage] = {}

    def persistent(identity: object) -> object:
        if isinstance(identity, tuple) and identity[:1] == ("module",) and len(identity) > 1:
            return identity[1]  # a class with its source text
        key, dtype, count = _storage_of(identity)
        assert isinstance(identity, tuple)
        if dtype is None or identity[5:] not in ((), (None,)):
            raise DamagedPickleError("views of storages, as PyTorch before 0.4 wrote them")
        return storages.setdefault(key, _Storage(key, dtype, count * dtype.itemsize, data))

    content = safe_pickle.load(data, make=_make, persistent=persistent)
    keys = safe_pickle.load(data)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("no list of storages")
    position = data.tell()
    for key in keys:
        storage = storages[key]
        assert storage.dtype is not None
        (count,) = struct.unpack("<q", data[position : position + 8])
        if count * storage.dtype.itemsize < storage.nbytes:
            raise ValueError(f"a storage of {count} values for {storage.nbytes} bytes")
        storage.start = position + 8
        position = storage.start + count * storage.dtype.itemsize
        if position > len(data):
            raise ValueError("cut short")
    if any(storage.start < 0 for storage in storages.values()):
        raise ValueError("a storage is missing")
    return content
