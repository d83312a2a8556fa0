"""Pickles of plain containers, text, numbers and NumPy arrays, from files of any origin.

Nothing else is made: a pickle that asks for any other name is refused, so no code of it runs.
"""

import io
import pickle
import pickletools
from typing import Any

import numpy as np

from arcface_jax.errors import DataError


def load(data: bytes, *, what: str) -> Any:
    """The object of a pickle of Python 2 or 3; text of Python 2 is bytes, arrays are `Array`.

    Args:
      data: the pickle.
      what: it should be, for the message.

    Raises:
      DataError: it asks for something else, or for more memory than it could fill.
      Exception: of nearly any type, where it is damaged.
    """
    _check_sizes(data)
    return _Unpickler(io.BytesIO(data), what).load()


_OPERATIONS = {operation.code: operation for operation in pickletools.opcodes}


def _check_sizes(data: bytes) -> None:
    """Walks through a pickle without executing it: no number in it may ask for memory.

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
            raise DataError(f"the pickle keeps an object at {argument}, beyond all it could have")


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


class Array:
    """`numpy.ndarray`, without its shape."""

    def __init__(self, *_: Any):
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, _, dtype, _, data = state
        self.values = np.frombuffer(data, dtype.plain)


def _array_from_buffer(data: bytes, dtype: _Dtype, *_: Any) -> Array:
    array = Array()
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
    "numpy.ndarray": Array,
    "numpy._core.multiarray._reconstruct": Array,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _array_from_buffer,
}


class _Unpickler(pickle.Unpickler):
    """Reads plain containers, bytes and NumPy arrays; any other name in the pickle is an error."""

    def __init__(self, file: io.BytesIO, what: str):
        super().__init__(file, encoding="bytes")
        self._what = what

    def find_class(self, module: str, name: str) -> Any:
        word = f"{module}.{name}".replace("numpy.core.", "numpy._core.")  # as NumPy 1 wrote it
        if word not in _KNOWN:
            raise DataError(
                f"the pickle asks for {module}.{name}, which no {self._what} needs: it is not "
                "such a file, or it was made to run code; do not open it with other tools"
            )
        return _KNOWN[word]
