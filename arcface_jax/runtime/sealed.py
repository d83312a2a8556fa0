"""Digests of arrays and files, and JSON files with a digest of their own content.

A file that decides whether other files are trusted must itself be protected against bit flips.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from arcface_jax.runtime import foreign

_SEAL = "digest"
_CHUNK = 1 << 24  # bytes of an array hashed at a time
_THREADS = 4  # hashing releases the GIL


class DamagedError(ValueError):
    """Raised for a file that is corrupt."""


def seal(content: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Formats an object as JSON text with a digest of its content, for `read`."""
    return json.dumps({**content, _SEAL: _digest(content)}, indent=indent) + "\n"


def read(path: Path, *, unsealed: bool = False) -> dict[str, Any]:
    """Reads the object that `seal` wrote.

    Args:
      path: path of the file.
      unsealed: accept an object without a digest, as earlier versions wrote it.

    Raises:
      FileNotFoundError: the file does not exist.
      DamagedError: it is unreadable, not a JSON object, or corrupt.
    """
    try:
        content = foreign.parse_json(foreign.read(path))
    except FileNotFoundError:
        if path.is_symlink():
            raise DamagedError(f"{path} is a symbolic link to nothing") from None
        raise
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError:
        raise DamagedError(f"{path} is not JSON") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path} is not a JSON object")
    if _SEAL not in content:
        if unsealed:
            return content
        raise DamagedError(f"{path} has no digest")
    if content.pop(_SEAL) != _digest(content):
        raise DamagedError(f"{path} differs from its digest")
    return content


def array_digest(values: np.ndarray) -> str:
    """Returns the SHA-256 over the digests of an array's chunks: its type, length and bytes.

    Chunks are hashed in parallel, and a strided array is never copied as a whole.

    Args:
      values: (n,) of any type.
    """
    rows = max(1, _CHUNK // max(1, values.itemsize))

    def look(start: int) -> bytes:
        chunk = np.ascontiguousarray(values[start : start + rows])
        return hashlib.sha256(chunk.view(np.uint8).data).digest()

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(look, range(0, len(values), rows))
        return _joined(f"{values.dtype.str} {len(values)}", parts)


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file.

    Raises:
      OSError: the file cannot be read.
    """
    foreign.require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(data: bytes) -> str:
    """Returns the SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def _joined(head: str, parts: Iterable[bytes]) -> str:
    total = hashlib.sha256(head.encode())
    for part in parts:
        total.update(part)
    return total.hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return digest(json.dumps(content, sort_keys=True).encode())
