"""How a run is asked to end: SIGTERM and Ctrl-C, the time left after them, the exit code."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from arcface_jax.config import CheckpointConfig
from arcface_jax.runtime.files import kept

# The last words are worth this many seconds: they read a folder, which may be on what hangs.
_SECONDS_TO_SPEAK = 2.0


class Left(Exception):
    """Something that may be given up was, because the run is asked to end."""


class Stop:
    """The signals that asked a run to end; true where there is one.

    Args:
      checkpoint: the shutdown deadline and the exit code.
      workdir: of the run.
    """

    def __init__(self, checkpoint: CheckpointConfig, *, workdir: Path):
        self.signals: list[signal.Signals] = []
        self._config = checkpoint
        self._workdir = workdir
        self._countdown: threading.Timer | None = None

    def __bool__(self) -> bool:
        return bool(self.signals)

    def leave(self) -> None:
        """To be called where a run may give up what it is at.

        Several processes go on: they would have to do so at the same place.

        Raises:
          Left: a signal came.
        """
        if self.signals and jax.process_count() == 1:
            raise Left

    def count_down(self, number: int) -> None:
        """The deadline begins with the first signal; the process ends itself when it is over.

        To be called by one thread alone.
        """
        if self._config.deadline_seconds and self._countdown is None:
            self._countdown = threading.Timer(
                self._config.deadline_seconds, self._give_up, [signal.Signals(number)]
            )
            self._countdown.daemon = True
            self._countdown.start()

    def close(self) -> None:
        """All is saved: there is nothing to give up."""
        if self._countdown is not None:
            self._countdown.cancel()

    def _give_up(self, by: signal.Signals) -> None:
        speaker = threading.Thread(target=self._last_words, args=[by], daemon=True)
        speaker.start()
        speaker.join(_SECONDS_TO_SPEAK)
        os._exit(exit_code(self._config, by))  # the main thread may be held by what hangs

    def _last_words(self, by: signal.Signals) -> None:
        print(
            f"stopped by {by.name}, and not ready in checkpoint.deadline_seconds "
            f"{self._config.deadline_seconds:g}: given up; {kept(self._workdir)}",
            file=sys.stderr,
            flush=True,
        )


def exit_code(config: CheckpointConfig, by: signal.Signals) -> int:
    """Of a run that a signal stopped: that for requeueing where SIGTERM did and there is one."""
    if by is signal.SIGTERM and config.requeue_exit_code:
        return config.requeue_exit_code
    return 128 + by


@contextmanager
def watched(checkpoint: CheckpointConfig, *, workdir: Path) -> Iterator[Stop]:
    """What SIGTERM and Ctrl-C are noted in; a second one of a kind ends the program as usual."""
    stop = Stop(checkpoint, workdir=workdir)

    def note(number: int, _) -> None:
        stop.signals.append(signal.Signals(number))
        signal.signal(number, previous[signal.Signals(number)])

    # Of several processes JAX watches for SIGTERM, so that all stop at one step.
    own = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    previous = {s: signal.getsignal(s) for s in own}
    at_once = bool(previous) and checkpoint.deadline_seconds > 0
    try:
        for s in previous:
            signal.signal(s, note)
        with _told_at_once(stop) if at_once else contextlib.nullcontext():
            yield stop
    finally:
        stop.close()
        for s, handler in previous.items():
            signal.signal(s, handler)


@contextmanager
def _told_at_once(stop: Stop) -> Iterator[None]:
    """Begins the countdown also where Python's handler waits for a call that never returns."""
    read, write = socket.socketpair()
    write.setblocking(False)
    before = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while numbers := read.recv(16):
            for number in numbers:
                if number in (signal.SIGTERM, signal.SIGINT):
                    stop.count_down(number)

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        write.close()  # ends the listener
        listener.join()
        read.close()
