"""Standard output and error: escape unsafe text, and survive closed readers.

Readers close with `| head` or a lost ssh connection.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from arcface_jax.runtime.text import shown

_READER_GONE = (errno.EPIPE, errno.EIO)


class _Escaping:
    """A text stream that escapes control sequences and unencodable characters.

    Args:
      stream: the stream to write to.
      colors: let color codes pass.
    """

    def __init__(self, stream: TextIO, *, colors: bool = False):
        self.plain = stream
        self._colors = colors or stream.isatty()  # commands' help is colored there

    def write(self, text: str) -> int:
        # Progress bars of libraries start with a carriage return.
        start, rest = ("\r", text[1:]) if text[:1] == "\r" else ("", text)
        safe = start + shown(rest, colors=self._colors)
        try:
            self.plain.write(safe)
        except UnicodeEncodeError:
            encoding = self.plain.encoding or "ascii"
            self.plain.write(safe.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)


@contextlib.contextmanager
def escaping() -> Iterator[None]:
    """Escapes everything printed in the block by `text.shown`.

    Code that writes control sequences, such as a progress bar, uses `plain` and escapes names
    itself.
    """
    if isinstance(sys.stdout, _Escaping):
        yield
        return
    before = sys.stdout, sys.stderr
    if sys.stdout is not None:
        sys.stdout = cast(TextIO, _Escaping(sys.stdout))
    if sys.stderr is not None:
        sys.stderr = cast(TextIO, _Escaping(sys.stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def plain(stream: TextIO) -> TextIO:
    """Returns the stream below an escaping one, for progress bars."""
    return stream.plain if isinstance(stream, _Escaping) else stream


def colored(stream: TextIO) -> TextIO:
    """Returns the stream for tables: an escaping one that lets colors pass."""
    return cast(TextIO, _Escaping(plain(stream), colors=True))


class _Raw(io.FileIO):
    """Discards output once nobody reads it."""

    def write(self, data, /):
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _READER_GONE:
                raise
        discard(self.fileno())
        return super().write(data)


def outlive_readers() -> None:
    """Lets this process keep printing for its whole lifetime, even if nobody reads it."""
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
    """Returns whether lines are shown at once: on a terminal, and with python -u."""
    return bool(getattr(stream, "line_buffering", True) or getattr(stream, "write_through", False))


def discard(number: int) -> None:
    """Points a file descriptor to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


def _open_missing() -> None:
    """Opens closed standard streams, or the run's next file would get their numbers and output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
