"""Standard output and error that may lose their reader: `| head`, a closed ssh connection."""

import errno
import io
import os
import sys
from typing import TextIO

_READER_GONE = (errno.EPIPE, errno.EIO)


class _Raw(io.FileIO):
    """Discards what is written once nobody reads it."""

    def write(self, data, /):
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _READER_GONE:
                raise
        discard(self.fileno())
        return super().write(data)


def outlive_readers() -> None:
    """Let this process print for the rest of its life, whether or not anybody reads it."""
    _open_missing()
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        if before is not None:
            before.flush()
        binary = io.BufferedWriter(_Raw(number, "w", closefd=False))
        after = io.TextIOWrapper(
            binary,
            encoding=getattr(before, "encoding", None) or "utf-8",
            errors=getattr(before, "errors", None) or "backslashreplace",
            line_buffering=name == "stderr" or before is None or _is_unbuffered(before),
        )
        setattr(sys, name, after)


def _is_unbuffered(stream: TextIO) -> bool:
    """Whether lines are shown at once: on a terminal, and with python -u."""
    return bool(getattr(stream, "line_buffering", True) or getattr(stream, "write_through", False))


def discard(number: int) -> None:
    """Point a file descriptor to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


def _open_missing() -> None:
    """Open closed standard streams: the run's next file would take their numbers and their text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
