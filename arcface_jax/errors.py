"""User-facing errors (bad input, no traceback), and how a command reports them."""

import contextlib
import difflib
import errno
import importlib.util
import os
import select
import sys
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """Something outside the code is wrong: a path, a file, an option, a combination of options.

    The message names the value, what was expected, and the fix. Commands print only the message,
    without a traceback, and exit with code 2.
    """


class ConfigError(UserError):
    """A recipe, an option, or a combination of options that cannot be run."""


class DataError(UserError):
    """Input data that is missing, damaged, or not in the format expected."""


class ImageError(DataError):
    """One image that is damaged; the others may be whole, so a run continues without it.

    Args:
      where: the file, and the place in it.
      problem: what is wrong, and the fix.
      kind: a word or two by which such errors are counted.
    """

    def __init__(self, where: str, problem: str, kind: str = "damaged"):
        where = where.replace("\n", "\\n")  # which a file may have in its name
        super().__init__(where, problem, kind)  # all, or it could not be unpickled
        self.where = where
        self.problem = problem
        self.kind = kind

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


class CheckpointError(UserError):
    """A working directory whose contents do not fit the run that was asked for."""


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turns what ends a command, other than a bug, into one message and an exit code.

    A UserError is reported on stderr with exit code 2, and so is a path that is longer than any
    file's; Ctrl-C with 130. A reader of stdout that has
    gone, as in `| head`, ends the command with 1. Anything else passes.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = str(error.filename)
        print(
            f"error: {name[:60]}... is a path of {len(name):,} characters, longer than this "
            "system's files have: name an existing file or folder",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def _stdout_is_closed() -> bool:
    """Whether the reader of stdout has gone; it is discarded then."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):  # not a file: captured, or closed
        return False
    stdout = select.poll()
    stdout.register(number, 0)
    if not stdout.poll(0):
        return False
    # Python flushes once more when it exits, which must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True


def install(extra: str) -> str:
    """The command that installs an optional dependency, for a wheel and for a checkout."""
    return f"pip install 'arcface-jax[{extra}]' (in a checkout: pip install -e '.[{extra}]')"


def require(package: str, extra: str) -> None:
    """Checks that a package of an optional dependency is installed, without importing it.

    Raises:
      UserError: it is not; the message has the command that installs it.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"this needs the package {package}: {install(extra)}")


def unknown(word: str, known: Iterable[str], *, prog: str) -> str:
    """Returns the message for a missing or misspelled name of a command."""
    known = list(known)
    if not word:
        return f"{prog} expects one of {', '.join(known)}; {prog} --help describes them"
    return f"{prog} has no command {word!r}: {meant(word, known)}{prog} --help lists all"


def meant(word: str, known: Iterable[str]) -> str:
    """The question "did you mean A or B? " for a misspelled name; empty where none is near."""
    near = difflib.get_close_matches(word, sorted(known), n=2)
    return f"did you mean {' or '.join(near)}? " if near else ""
