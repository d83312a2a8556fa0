"""What a run writes where the disk does not take it: one error in words, and nothing half-written.

The computing libraries report a full disk in their own ways, some of them from threads: Orbax logs
it several times over, raises it in the next save, and leaves writes behind that complain later.
"""

import contextlib
import errno
import functools
import gc
import inspect
import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from arcface_jax.errors import CheckpointError

# Of these there is no doubt that something could not be written.
_FIXES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or have the quota raised",
    errno.EROFS: "make it writable",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}
# So TensorStore, which writes the arrays, names the system's error.
_IN_TEXT = re.compile(r"os_error_code='(\d+)'|OS error (\d+)")
_UNFINISHED = "[0-9]*.orbax-checkpoint-tmp*"


def write_whole(path: Path, text: str) -> None:
    """Writes a file in one move: where that fails, what was there is as it was.

    Raises:
      OSError: it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text)
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            part.unlink(missing_ok=True)
        raise


def complete_steps(workdir: Path) -> list[int]:
    """The steps of the checkpoints that are there as a whole, ascending."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def remove_unfinished(workdir: Path) -> None:
    """Takes away checkpoints that a run that is gone began to write: they fill the disk too."""
    for path in (workdir / "checkpoints").glob(_UNFINISHED):
        shutil.rmtree(path)


@contextlib.contextmanager
def reporting_disk_errors(workdir: Path, writing: Path | None = None) -> Iterator[None]:
    """Turns the system's refusal to write into a CheckpointError that says what is kept.

    Args:
      workdir: of the run.
      writing: what is written inside; where it is given every error of the system counts, else
        those alone that only writing can meet.
    """
    try:
        yield
    except Exception as error:
        found = _of_the_system(error)
        if found is None or (writing is None and found.errno not in _FIXES):
            raise
        words = _in_words(workdir, found, writing)
        _let_go(error)
        raise CheckpointError(words) from None


def kept(workdir: Path) -> str:
    """What a run that stops now leaves behind, and where the same command would go on."""
    steps = complete_steps(workdir)
    if not steps:
        return "no checkpoint is complete yet; the same command begins anew"
    return (
        f"the last complete checkpoint is that of step {steps[-1]} ({workdir / 'checkpoints'}); "
        "the same command resumes there"
    )


@functools.cache
def quiet_orbax() -> None:
    """Keeps back what Orbax prints of a failed save besides raising it.

    For the rest of the process: what such a save leaves behind may complain as late as at its end.
    """
    hook = sys.unraisablehook

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        of_orbax = inspect.iscoroutine(args.object) and "orbax" in args.object.cr_code.co_filename
        # TensorStore calls back into the loop that Orbax closed when the first write failed.
        if not of_orbax and str(args.exc_value) != "Event loop is closed":
            hook(args)

    logging.getLogger("absl").addFilter(_not_of_a_failed_save)
    logging.getLogger("asyncio").addFilter(_not_of_a_failed_save)
    sys.unraisablehook = unraisable


def _not_of_a_failed_save(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return True
    text = [record.pathname, record.getMessage(), *traceback.format_exception(error)]
    return not any("orbax" in part for part in text)


def _of_the_system(error: BaseException) -> OSError | None:
    """The error of the operating system that an exception is, or tells of."""
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    if found := _IN_TEXT.search(str(error)):
        number = int(found[1] or found[2])
        return OSError(number, os.strerror(number))
    return None


def _in_words(workdir: Path, error: OSError, writing: Path | None) -> str:
    path = writing or error.filename or workdir
    unfinished = sorted(
        int(p.name.partition(".")[0]) for p in (workdir / "checkpoints").glob(_UNFINISHED)
    )
    if path == workdir / "checkpoints" and unfinished:
        path = f"{path / str(unfinished[-1])} (the checkpoint of step {unfinished[-1]})"
    fix = _FIXES.get(error.errno or 0, "see to that disk")
    return f"cannot write {path}: {error.strerror}. To go on, {fix}; {kept(workdir)}"


def _let_go(error: BaseException | None) -> None:
    """Ends now, and not when the process does, what an exception's frames keep alive."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__context__
    gc.collect()
