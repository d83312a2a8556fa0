"""Run a function in a child process that is watched: its memory, its processor time, its end."""

import contextlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from arcface_jax.errors import reported

SECONDS = 5.0
"""Of processor time, so that a busy machine changes nothing."""
MEMORY = 1 << 30
"""Bytes above those at the start."""
_HANG = 10.0  # seconds in which it sleeps and uses no processor
_LOOKS = 0.02  # seconds between two looks
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Outcome(NamedTuple):
    """How a function ended."""

    kind: str
    """`read`, `refused`, or what is wrong: `TRACEBACK`, `SIGSEGV`, `MEMORY`, `TIME`, `HANG`."""
    text: str
    """What it returned, the message, or the traceback."""
    seconds: float
    memory: int
    """Bytes, at most, above those at the start."""

    @property
    def bad(self) -> bool:
        """Whether a user would see anything but a result or one line."""
        return self.kind not in ("read", "refused") or "\n" in self.text

    def __str__(self) -> str:
        text = self.text if self.bad else self.text[:300]
        return f"{self.kind}, {self.seconds:.1f} s, {self.memory / 2**20:.0f} MiB: {text}"


def run(work: Callable[[], str], *, seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """Runs a function in a fork of this process, and ends it where it takes too much.

    Args:
      work: what it returns is the outcome's text; what ends a command with a line is `refused`.
      seconds: of processor time.
      memory: bytes above those at the start.
    """
    with TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            _work(work, result)
        return _watch(child, result, seconds=seconds, memory=memory)


def _work(work: Callable[[], str], result: Path) -> None:
    try:
        output = os.open(os.devnull, os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), reported():  # as every command does
                kind, text = "read", work()
        except SystemExit:
            kind, text = "refused", said.getvalue().partition("error: ")[2].removesuffix("\n")
        except BaseException:
            kind, text = "TRACEBACK", traceback.format_exc()
        result.write_text(f"{kind}\n{text}", errors="backslashreplace")
    finally:
        os._exit(0)


def _watch(child: int, result: Path, *, seconds: float, memory: int) -> Outcome:
    began, start = time.monotonic(), 0  # since when it sleeps
    used, peak, wrong = 0.0, 0, ""
    while not wrong:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        with contextlib.suppress(OSError, IndexError, ValueError):
            before = used
            used, resident, sleeps = _usage(child)
            began = began if sleeps and used == before else time.monotonic()
            start = start or resident
            peak = max(peak, resident - start)
        if peak > memory:
            wrong = "MEMORY"
        elif used > seconds:
            wrong = "TIME"
        elif time.monotonic() - began > _HANG:
            wrong = "HANG"
        time.sleep(_LOOKS)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return Outcome(wrong, "ended by its watcher", used, peak)
    if os.WIFSIGNALED(status):
        return Outcome(signal.Signals(os.WTERMSIG(status)).name, "", used, peak)
    kind, _, text = result.read_text().partition("\n")
    return Outcome(kind, text, used, peak)


def _usage(child: int) -> tuple[float, int, bool]:
    """Processor seconds, resident bytes, and whether it waits for something."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    pages = int(Path(f"/proc/{child}/statm").read_text().split()[1])
    return (int(fields[11]) + int(fields[12])) / _TICK, pages * _PAGE, fields[0] == "S"
