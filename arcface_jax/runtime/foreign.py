"""Read untrusted files so that none can block or exhaust this process.

A pipe would block, a device has no end, a header may claim any size, and JSON may be nested deeper
than Python's stack.
"""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def read(path: str | Path, *, most: int | None = None) -> bytes:
    """Reads the bytes of a regular file.

    Args:
      path: path of the file.
      most: largest size in bytes; unlimited by default.

    Raises:
      OSError: it cannot be read, is not a regular file, or is larger.
    """
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, which no file name contains
        raise FileNotFoundError(errno.ENOENT, "No such file", str(path)) from error
    with open(number, "rb", buffering=0) as file:
        _require_regular(os.fstat(number), path)
        if most is not None and os.fstat(number).st_size > most:
            raise OSError(errno.EFBIG, f"More than {most:,} bytes", str(path))
        return file.read()


def require_regular(path: str | Path) -> None:
    """Checks a file that a library is going to open by name.

    Raises:
      OSError: it does not exist, or is a pipe, a device or a folder.
    """
    try:
        _require_regular(os.stat(path), path)
    except ValueError as error:
        raise FileNotFoundError(errno.ENOENT, "No such file", str(path)) from error


def _require_regular(found: os.stat_result, path: str | Path) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, "Is a folder", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def is_file(path: str | Path) -> bool:
    """Returns whether a regular file exists; also False for names that no file can have."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def parse_json(
    text: str | bytes, *, object_hook: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """Parses JSON text; `object_hook` as in `json.loads`.

    Raises:
      ValueError: it is not JSON, or is nested too deep.
    """
    try:
        return json.loads(text, object_hook=object_hook)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def load_array(path: str | Path) -> "np.ndarray":
    """Maps the array of a `.npy` file: its header cannot claim more than the file has.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not such a file, or is truncated.
    """
    require_regular(path)
    import numpy as np  # here, because `arcface-jax status` does not need it

    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # many types, if the header is not a Python literal
        raise ValueError(str(error).partition("\n")[0] or "cut short") from None
