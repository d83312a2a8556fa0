"""Where a step never ends, says where every thread of the process is."""

import faulthandler
import sys

from arcface_jax.config import LoggingConfig


def arm(logging: LoggingConfig) -> None:
    """A step begins: after `logging.watchdog_seconds` without its end all stacks go to stderr.

    The standard library's own thread waits and writes; it needs no lock of Python's, so that it
    works where a call into the devices or the network holds it.
    """
    if logging.watchdog_seconds:
        faulthandler.dump_traceback_later(
            logging.watchdog_seconds, exit=logging.watchdog_abort, file=sys.__stderr__ or 2
        )


def disarm() -> None:
    """What follows may take long: an evaluation, a save, the end."""
    faulthandler.cancel_dump_traceback_later()
