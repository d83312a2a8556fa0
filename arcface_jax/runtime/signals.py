"""Stop a run on SIGTERM, SIGHUP and Ctrl-C: the shutdown deadline and the exit code.

`remember` records signals from the start of a program, `watched` during the training loop. Neither
raises from a handler: Python drops exceptions raised in a callback of the garbage collector or in a
destructor. Code checks for signals where it can stop.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from arcface_jax.runtime.files import resume_point

if TYPE_CHECKING:  # `remember` has to run before slow imports
    from arcface_jax.config import CheckpointConfig

# Max seconds to print the shutdown message: it reads a folder, whose disk may be what hangs.
_MESSAGE_SECONDS = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Signals that came outside of `watched`.
_remembered: list[signal.Signals] = []


class Interrupted(Exception):
    """Raised to abandon interruptible work after a stop signal."""


class StoppedAtStart(Exception):
    """Raised to end a run before its first step, after a stop signal.

    Args:
      by: the stop signal.
    """

    def __init__(self, by: signal.Signals):
        super().__init__(by.name)
        self.by = by


def remember() -> None:
    """Records stop signals for the rest of the process; a second signal of a kind ends it."""
    for s in _not_ignored():
        signal.signal(s, _remember)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # see hold_back


def hold_back() -> None:
    """Blocks signals until the program that replaces this one calls `remember`.

    Raises:
      StoppedAtStart: a signal has already come.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    raise_if_remembered()


def remembered() -> signal.Signals | None:
    """Returns the first signal that came since `remember`."""
    return _remembered[0] if _remembered else None


def raise_if_remembered() -> None:
    """Aborts the start of a run after a signal; call it where that is safe.

    Raises:
      StoppedAtStart: a signal has come since `remember`.
    """
    if _remembered:
        raise StoppedAtStart(_remembered[0])


def _remember(number: int, _) -> None:
    _remembered.append(signal.Signals(number))
    signal.signal(number, signal.SIG_DFL)


def _not_ignored() -> list[signal.Signals]:
    """Returns the signals to handle; under nohup, SIGHUP is ignored."""
    return [s for s in _SIGNALS if s != signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN]


class Stop:
    """The stop signals that a run has received; true after the first one.

    Args:
      checkpoint: the shutdown deadline and the exit code.
      workdir: workdir of the run.
      several: whether the run has several processes, which stop together.
    """

    def __init__(self, checkpoint: "CheckpointConfig", *, workdir: Path, several: bool):
        self.signals: list[signal.Signals] = []
        self.forwarded: signal.Signals | None = None
        """The signal that was forwarded to JAX as SIGTERM; only with several processes."""
        self._several = several
        self._config = checkpoint
        self._workdir = workdir
        self._deadline: threading.Timer | None = None

    def __bool__(self) -> bool:
        return bool(self.signals)

    def raise_if_stopped(self) -> None:
        """Abandons the current work if a signal has come; call it where that is safe.

        Does nothing with several processes: they would all have to stop at the same place.

        Raises:
          Interrupted: a signal has come.
        """
        if self.signals and not self._several:
            raise Interrupted

    def start_deadline(self, number: int) -> None:
        """Starts the shutdown deadline at the first signal; the process exits when it expires.

        Not thread-safe: call it from one thread only.
        """
        if self._config.deadline_seconds and self._deadline is None:
            self._deadline = threading.Timer(
                self._config.deadline_seconds, self._exit, [signal.Signals(number)]
            )
            self._deadline.daemon = True
            self._deadline.start()

    def close(self) -> None:
        """Cancels the deadline: everything is saved."""
        if self._deadline is not None:
            self._deadline.cancel()

    def _exit(self, by: signal.Signals) -> None:
        message = threading.Thread(target=self._print_message, args=[by], daemon=True)
        message.start()
        message.join(_MESSAGE_SECONDS)
        os._exit(exit_code(self._config, by))  # the main thread may be blocked

    def _print_message(self, by: signal.Signals) -> None:
        print(
            f"{by.name}: shutdown exceeded checkpoint.deadline_seconds="
            f"{self._config.deadline_seconds:g}; exiting. Rerun the same command; "
            f"{resume_point(self._workdir)}",
            file=sys.stderr,
            flush=True,
        )


def exit_code(config: "CheckpointConfig", by: signal.Signals) -> int:
    """Returns a stopped run's exit code: 128 + signal, or for SIGTERM the requeue code if set."""
    if by is signal.SIGTERM and config.requeue_exit_code:
        return config.requeue_exit_code
    return 128 + by


@contextmanager
def watched(checkpoint: "CheckpointConfig", *, workdir: Path) -> Iterator[Stop]:
    """Collects stop signals in a `Stop`, including remembered ones.

    A second signal of a kind has its usual effect. Python handles signals in the main thread only;
    in another one this yields a `Stop` of the remembered signals.
    """
    import jax

    several = jax.process_count() > 1
    stop = Stop(checkpoint, workdir=workdir, several=several)

    def restore_usual(number: int) -> None:
        if number in usual:  # not for a remembered one that is not handled here
            signal.signal(number, usual[signal.Signals(number)])

    def note(number: int, _) -> None:
        stop.signals.append(signal.Signals(number))
        restore_usual(number)

    def forward(number: int, _) -> None:
        stop.forwarded = signal.Signals(number)
        restore_usual(number)
        os.kill(os.getpid(), signal.SIGTERM)

    # With several processes JAX watches for SIGTERM, so that all of them stop at the same step.
    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = _not_ignored() if in_main_thread else []
    own = [s for s in handled if not (several and s == signal.SIGTERM)]
    previous = {s: signal.getsignal(s) for s in own}
    usual = {s: signal.SIG_DFL if h is _remember else h for s, h in previous.items()}
    at_once = not several and in_main_thread and checkpoint.deadline_seconds > 0
    try:
        for s in previous:
            signal.signal(s, forward if several else note)
        for s in _remembered:
            if several:
                forward(s, None)
            else:
                note(s, None)
                stop.start_deadline(s)
        with _deadline_thread(stop) if at_once else contextlib.nullcontext():
            yield stop
    finally:
        stop.close()
        for s, handler in previous.items():
            came = s in stop.signals or s == stop.forwarded
            signal.signal(s, usual[s] if came else handler)


@contextmanager
def _deadline_thread(stop: Stop) -> Iterator[None]:
    """Starts the deadline even while Python's handler waits for a call that never returns."""
    read, write = socket.socketpair()
    write.setblocking(False)
    before = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while numbers := read.recv(16):
            for number in numbers:
                if number in _SIGNALS:
                    stop.start_deadline(number)

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        write.close()  # ends the listener
        listener.join()
        read.close()
