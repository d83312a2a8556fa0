"""Read pickles of plain containers, text, numbers and NumPy arrays from untrusted files.

A pickle that refers to any other type is refused, so none of its code runs.
"""

import io
import pickle
import pickletools
from typing import Any

import numpy as np

from arcface_jax.errors import DataError


def load(data: bytes, *, what: str) -> Any:
    """Loads a pickle of Python 2 or 3; text of Python 2 becomes bytes, arrays become `Array`.

    Args:
      data: the pickle.
      what: what it should be, for the message.

    Raises:
      DataError: it refers to another type, or asks for more memory than it could fill.
      Exception: of nearly any type, if it is damaged.
    """
    _check_sizes(data)
    return _Unpickler(io.BytesIO(data), what).load()


_OPERATIONS = {operation.code: operation for operation in pickletools.opcodes}


def _check_sizes(data: bytes) -> None:
    """Scans a pickle without executing it: no number in it may cause a large allocation.

    The unpickler allocates memory for the largest memo index, and for a length before it checks
    that enough bytes are left; pickletools checks the lengths first.
    """
    stream = io.BytesIO(data)
    while code := stream.read(1):
        operation = _OPERATIONS[code.decode("latin1")]
        if operation.name == "STRING":  # bytes of Python 2, which pickletools decodes as ASCII
            stream.readline()
            continue
        if operation.name == "STOP":
            return
        argument: Any = operation.arg.reader(stream) if operation.arg else None
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise DataError(f"the pickle keeps an object at {argument}, beyond all it could have")


def _encode_latin(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, which pickles of protocol 2 use to make bytes from text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


# NumPy trusts the pickles that it reads: one of its dtypes can turn bytes into pointers to objects,
# which is as good as running code. So these classes replace its types, and accept plain numbers and
# text only.


class _Dtype:
    """Stands in for `numpy.dtype`."""

    def __init__(self, name: str | bytes, *_: Any):
        self.plain = np.dtype(name.decode() if isinstance(name, bytes) else name)
        if self.plain.kind not in "biufSU":
            raise DataError(f"the pickle holds an array of {self.plain}; numbers were expected")

    def __setstate__(self, state: tuple) -> None:
        """Reads the byte order and nothing else."""
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        if order in ("<", ">"):
            self.plain = self.plain.newbyteorder(order)


class Array:
    """Stands in for `numpy.ndarray`, without its shape."""

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
    """Stands in for `bytes`, which would allocate memory at will if given a number."""
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
        word = f"{module}.{name}".replace("numpy.core.", "numpy._core.")  # NumPy 1's name
        if word not in _KNOWN:
            raise DataError(
                f"the pickle asks for {module}.{name}, which no {self._what} needs: it is not "
                "such a file, or it was made to run code; do not open it with other tools"
            )
        return _KNOWN[word]
