"""Verification sets: pairs of faces, and whether each pair shows one person."""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arcface_jax.data.aligner import Aligner
from arcface_jax.data.images import decode_any_size, square
from arcface_jax.data.pairs import flags
from arcface_jax.errors import DataError, meant


class PairSet(NamedTuple):
    """A verification set in memory."""

    name: str
    """As in `eval/NAME/accuracy`."""
    images: np.ndarray
    """(2 n, 112, 112, 3) uint8 RGB; images 2 i and 2 i + 1 are pair i."""
    same: np.ndarray
    """(n,) bool."""


def read_bin(path: Path, *, aligner: Aligner | None = None) -> PairSet:
    """Reads insightface's `.bin`: a pickle of (2 n encoded images, n booleans).

    The pickle may come from anywhere: nothing is unpickled but tuples, lists, bytes, strings,
    numbers, booleans and NumPy arrays. Pickles of Python 2 and 3 are read. By the format its images
    are aligned: those of another size are cut to their middle square and resized.

    Args:
      path: the file.
      aligner: with a detector, for images of another size that are not aligned.

    Raises:
      DataError: there is no such file, or it is not of that form.
    """
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.bin"))
        raise DataError(
            f"no verification set at {path} (in that folder: {', '.join(there) or 'no .bin file'})"
            f": {meant(path.name, there)}name an existing set with --evaluation.targets"
        )
    try:
        data = path.read_bytes()
        _check_sizes(data)
        encoded, same = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        encoded = [_encoded(item) for item in encoded]
        same = np.array([_flag(x) for x in (same.values if isinstance(same, _Array) else same)])
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:
        # pickle raises nearly any exception on damaged input.
        raise DataError(
            f"{path} is not a verification set, a pickle of (images, is-same list): {error!r}"
        ) from error
    if len(encoded) != 2 * len(same) or not len(same):
        raise DataError(
            f"{path}: {len(encoded)} images for {len(same)} pairs; there should be two images a "
            "pair, and a pair at least: make the set anew, or fetch it again"
        )
    images = []
    for number, data in enumerate(encoded):
        where = f"{path}, image {number}"
        if aligner is not None and aligner.detects:
            image = aligner(decode_any_size(data, where=where), where=where)
        else:
            image = square(data, where=where)
        images.append(image)
    return PairSet(path.stem, np.stack(images), same)


_OPERATIONS = {operation.code: operation for operation in pickletools.opcodes}


def _check_sizes(data: bytes) -> None:
    """Walks through a pickle without doing what it says: no number in it may ask for memory.

    The unpickler takes memory for the largest index of its memo, and for a length before it looks
    whether so many bytes are left; pickletools looks at the lengths first.
    """
    stream = io.BytesIO(data)
    while code := stream.read(1):
        operation = _OPERATIONS[code.decode("latin1")]
        if operation.name == "STRING":  # Python 2's bytes, which pickletools takes for ASCII
            stream.readline()
            continue
        if operation.name == "STOP":
            return
        argument: Any = operation.arg.reader(stream) if operation.arg else None
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise DataError(f"the pickle keeps an object at {argument}, behind all it could have")


def _encoded(item: Any) -> bytes:
    if isinstance(item, _Array) and item.values.dtype.kind in "biuf":
        return item.values.astype(np.uint8).tobytes()
    if not isinstance(item, bytes):
        raise DataError(f"an image is of type {type(item).__name__}; there should be its bytes")
    return item


def _flag(value: Any) -> bool:
    same = flags.parse(value)
    if same is None:
        raise DataError(f"{value!r} is no answer to whether a pair shows one person: give 1 or 0")
    return same


def _encode_latin(text: str, encoding: str) -> bytes:
    """What `_codecs.encode` does in Python 3's pickles of protocol 2: bytes out of text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


# NumPy trusts the pickles it reads: one of its dtypes can pass bytes off as pointers to objects,
# which is as good as running code. So these stand in for its types, and know only plain numbers and
# text.


class _Dtype:
    """`numpy.dtype`."""

    def __init__(self, name: str | bytes, *_: Any):
        self.plain = np.dtype(name.decode() if isinstance(name, bytes) else name)
        if self.plain.kind not in "biufSU":
            raise DataError(f"the pickle holds an array of {self.plain}; numbers were expected")

    def __setstate__(self, state: tuple) -> None:
        """Takes the byte order, and nothing else."""
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        if order in ("<", ">"):
            self.plain = self.plain.newbyteorder(order)


class _Array:
    """`numpy.ndarray`, without its shape."""

    def __init__(self, *_: Any):
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, _, dtype, _, data = state
        self.values = np.frombuffer(data, dtype.plain)


def _array_from_buffer(data: bytes, dtype: _Dtype, *_: Any) -> _Array:
    array = _Array()
    array.values = np.frombuffer(data, dtype.plain)
    return array


def _scalar(dtype: _Dtype, data: bytes) -> np.generic:
    return np.frombuffer(data, dtype.plain)[0]


def _bytes(content: bytes = b"") -> bytes:
    """`bytes`, which would take memory at will were it given a number."""
    if not isinstance(content, bytes):
        raise DataError(f"the pickle makes bytes out of {type(content).__name__}")
    return content


_KNOWN = {
    "__builtin__.bytes": _bytes,
    "__builtin__.str": _bytes,
    "builtins.bytes": _bytes,
    "_codecs.encode": _encode_latin,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _array_from_buffer,
}


class _Unpickler(pickle.Unpickler):
    """Reads plain containers, bytes and NumPy arrays; any other name in the pickle is an error."""

    def find_class(self, module: str, name: str) -> Any:
        word = f"{module}.{name}".replace("numpy.core.", "numpy._core.")  # as NumPy 1 wrote it
        if word not in _KNOWN:
            raise DataError(
                f"the pickle asks for {module}.{name}, which no verification set needs: it is not "
                "such a set, or it was made to run code; do not open it with other tools"
            )
        return _KNOWN[word]
