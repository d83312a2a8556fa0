"""User-facing errors (bad input, no traceback), and how a command reports them."""

import contextlib
import difflib
import errno
import importlib.util
import os
import select
import sys
from collections.abc import Iterable, Iterator

# These errors always mean that something could not be written.
FIXES = {
    errno.ENOSPC: "Free disk space",
    errno.EDQUOT: "Free disk space or raise the quota",
    errno.EROFS: "Make the disk writable",
    errno.EFBIG: "Raise the file size limit (ulimit -f)",
}
_OTHER_PATH = {
    errno.EEXIST: "Name another path, or remove it",
    errno.ENOTDIR: "A file is where a folder is expected: name another path",
    errno.EISDIR: "It is a folder: name a file",
    errno.EACCES: "Change its permissions, or name another path",
    errno.EPERM: "Change its permissions, or name another path",
    errno.ELOOP: "Its symbolic links lead in a circle: name another path",
}


class UserError(Exception):
    """A problem outside the code: a path, a file, an option, a combination of options.

    The message names the value, what was expected, and the fix. Commands print only the message,
    without a traceback, and exit with code 2.
    """


class ConfigError(UserError):
    """A recipe, an option, or a combination of options that cannot be run."""


class DataError(UserError):
    """Input data that is missing, damaged, or not in the format expected."""


class ImageError(DataError):
    """One damaged image; the others may be intact, so a run continues without it.

    Args:
      where: the file, and the place in it.
      problem: what is wrong, and the fix.
      kind: a word or two under which such errors are counted.
    """

    def __init__(self, where: str, problem: str, kind: str = "damaged"):
        where = where.replace("\n", "\\n")  # a file's name may contain a line break
        super().__init__(where, problem, kind)  # all arguments, or unpickling fails
        self.where = where
        self.problem = problem
        self.kind = kind

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


class CheckpointError(UserError):
    """A working directory whose contents do not match the requested run."""


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turns the end of a command, except by a bug, into one message and an exit code.

    A UserError is reported on stderr with exit code 2, and so is a full disk, or a path that cannot
    be used; Ctrl-C exits with 130. If the reader of stdout has gone, as in `| head`, the exit code
    is 1. Any other exception propagates.
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
        message = _of_the_system(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def _of_the_system(error: OSError) -> str | None:
    """Returns the message for a path or a disk that cannot be used; None for other errors."""
    if error.errno == errno.ENAMETOOLONG:
        name = str(error.filename)
        return (
            f"{name[:60]}... is a path of {len(name):,} characters, longer than this system's "
            "files have: name an existing file or folder"
        )
    reason, fix = os.strerror(error.errno or 0), FIXES.get(error.errno or 0)
    if fix is not None:
        place = "the output" if error.filename is None else error.filename
        return f"cannot write {place}: {reason}. {fix} and rerun the same command"
    fix = _OTHER_PATH.get(error.errno or 0)
    if fix is None or error.filename is None:
        return None
    return f"cannot use {error.filename}: {reason}. {fix}"


def _stdout_is_closed() -> bool:
    """Returns whether the reader of stdout has gone, and discards further output if so."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):  # not a file: captured, or closed
        return False
    stdout = select.poll()
    stdout.register(number, 0)
    if not stdout.poll(0):
        return False
    # Python flushes again at exit, which must not fail.
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True


def install(extra: str) -> str:
    """Returns the command that installs an optional dependency, for a wheel and for a checkout."""
    return f"pip install 'arcface-jax[{extra}]' (in a checkout: pip install -e '.[{extra}]')"


def require(package: str, extra: str) -> None:
    """Checks that a package of an optional dependency is installed, without importing it.

    Raises:
      UserError: it is not installed; the message has the command to install it.
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
    """Returns the question "did you mean A or B? " for a misspelled name; empty without a match."""
    near = difflib.get_close_matches(word, sorted(known), n=2)
    return f"did you mean {' or '.join(near)}? " if near else ""
