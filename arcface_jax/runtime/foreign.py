"""Files that come from others, read so that none of them can stop or exhaust this process.

A pipe would be waited for, a device has no end, a header may claim any size, and JSON may be nested
deeper than Python's stack.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np


def read(path: str | Path, *, most: int | None = None) -> bytes:
    """Returns the bytes of a regular file.

    Args:
      path: path of the file.
      most: bytes that it may have; any number by default.

    Raises:
      OSError: it cannot be read, is no regular file, or has more bytes.
    """
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, which no file has in its name
        raise FileNotFoundError(errno.ENOENT, "No such file", str(path)) from error
    with open(number, "rb", buffering=0) as file:
        _require_regular(os.fstat(number), path)
        if most is not None and os.fstat(number).st_size > most:
            raise OSError(errno.EFBIG, f"More than {most:,} bytes", str(path))
        return file.read()


def require_regular(path: str | Path) -> None:
    """Checks a file that a library is going to open by its name.

    Raises:
      OSError: there is none, or it is a pipe, a device or a folder.
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
    """Returns whether there is a regular file; False for a name that no file can have, too."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def parse_json(text: str | bytes) -> Any:
    """Returns the value of JSON text.

    Raises:
      ValueError: it is no JSON, or is nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def load_array(path: str | Path) -> np.ndarray:
    """Returns the array of a `.npy` file, mapped: its header cannot claim more than the file has.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no such file, or is cut short.
    """
    require_regular(path)
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # of many types, where the header is no Python literal
        raise ValueError(str(error).partition("\n")[0] or "cut short") from None
