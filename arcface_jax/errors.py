"""Errors that are the user's to mend, and how a command reports them."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """Something outside the code is wrong: a path, a file, an option, a combination of options.

    The message names the value, what was expected, and the fix. Commands print it alone, without a
    traceback, and exit with code 2.
    """


class ConfigError(UserError):
    """A recipe, an option, or a combination of options that cannot be run."""


class DataError(UserError):
    """Input data that is missing, damaged, or not what the format says."""


class ImageError(DataError):
    """One image that is damaged; the others may be whole, so a run goes on without it.

    Args:
      where: the file, and the place in it.
      problem: what is wrong, and the fix.
    """

    def __init__(self, where: str, problem: str):
        super().__init__(where, problem)  # both, or it could not be unpickled
        self.where = where
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


class CheckpointError(UserError):
    """A working directory whose contents do not fit the run that was asked for."""


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turns a UserError into one message on stderr and exit code 2; anything else passes."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
