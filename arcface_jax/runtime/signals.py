"""Stop a run on SIGTERM and Ctrl-C: the shutdown deadline and the exit code."""

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
from arcface_jax.runtime.files import resume_point

# Max seconds to print the shutdown message: it reads a folder, whose disk may be what hangs.
_MESSAGE_SECONDS = 2.0


class Interrupted(Exception):
    """Raised to abandon interruptible work after a stop signal."""


class Stop:
    """The stop signals that a run has received; true once there is one.

    Args:
      checkpoint: the shutdown deadline and the exit code.
      workdir: of the run.
    """

    def __init__(self, checkpoint: CheckpointConfig, *, workdir: Path):
        self.signals: list[signal.Signals] = []
        self._config = checkpoint
        self._workdir = workdir
        self._deadline: threading.Timer | None = None

    def __bool__(self) -> bool:
        return bool(self.signals)

    def raise_if_stopped(self) -> None:
        """Abandon the current work if a signal has come; call it where that is safe.

        Does nothing with several processes: they would all have to stop at the same place.

        Raises:
          Interrupted: a signal has come.
        """
        if self.signals and jax.process_count() == 1:
            raise Interrupted

    def start_deadline(self, number: int) -> None:
        """Start the shutdown deadline at the first signal; when it is over the process exits.

        Not thread-safe: call it from one thread only.
        """
        if self._config.deadline_seconds and self._deadline is None:
            self._deadline = threading.Timer(
                self._config.deadline_seconds, self._exit, [signal.Signals(number)]
            )
            self._deadline.daemon = True
            self._deadline.start()

    def close(self) -> None:
        """Cancel the deadline: everything is saved."""
        if self._deadline is not None:
            self._deadline.cancel()

    def _exit(self, by: signal.Signals) -> None:
        message = threading.Thread(target=self._print_message, args=[by], daemon=True)
        message.start()
        message.join(_MESSAGE_SECONDS)
        os._exit(exit_code(self._config, by))  # the main thread may be blocked by what hangs

    def _print_message(self, by: signal.Signals) -> None:
        print(
            f"{by.name}: shutdown exceeded checkpoint.deadline_seconds="
            f"{self._config.deadline_seconds:g}; exiting. Rerun the same command; "
            f"{resume_point(self._workdir)}",
            file=sys.stderr,
            flush=True,
        )


def exit_code(config: CheckpointConfig, by: signal.Signals) -> int:
    """Exit code of a stopped run: 128 + signal, or for SIGTERM the requeue code if set."""
    if by is signal.SIGTERM and config.requeue_exit_code:
        return config.requeue_exit_code
    return 128 + by


@contextmanager
def watched(checkpoint: CheckpointConfig, *, workdir: Path) -> Iterator[Stop]:
    """Collect SIGTERM and Ctrl-C in a `Stop`; the second signal of a kind acts as usual."""
    stop = Stop(checkpoint, workdir=workdir)

    def note(number: int, _) -> None:
        stop.signals.append(signal.Signals(number))
        signal.signal(number, previous[signal.Signals(number)])

    # With several processes JAX watches for SIGTERM, so that all stop at the same step.
    own = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    previous = {s: signal.getsignal(s) for s in own}
    at_once = bool(previous) and checkpoint.deadline_seconds > 0
    try:
        for s in previous:
            signal.signal(s, note)
        with _deadline_thread(stop) if at_once else contextlib.nullcontext():
            yield stop
    finally:
        stop.close()
        for s, handler in previous.items():
            signal.signal(s, handler)


@contextmanager
def _deadline_thread(stop: Stop) -> Iterator[None]:
    """Start the deadline even while Python's handler waits for a call that never returns."""
    read, write = socket.socketpair()
    write.setblocking(False)
    before = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while numbers := read.recv(16):
            for number in numbers:
                if number in (signal.SIGTERM, signal.SIGINT):
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
