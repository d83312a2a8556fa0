"""Translate disk-full and read-only errors into one CheckpointError; atomic writes.

The libraries report a full disk in their own ways, some of them from threads: Orbax logs it several
times, raises it in the next save, and leaves writes behind that fail later.
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

# These errors always mean that something could not be written.
_FIXES = {
    errno.ENOSPC: "Free disk space",
    errno.EDQUOT: "Free disk space or raise the quota",
    errno.EROFS: "Make the disk writable",
    errno.EFBIG: "Raise the file size limit (ulimit -f)",
}
# How TensorStore, which writes the arrays, names the system's error.
_IN_TEXT = re.compile(r"os_error_code='(\d+)'|OS error (\d+)")
_UNFINISHED = "[0-9]*.orbax-checkpoint-tmp*"


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: if that fails, the old content stays.

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
    """The steps of the complete checkpoints, ascending."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def remove_unfinished(workdir: Path) -> None:
    """Remove checkpoints that an earlier process left half-written: they take disk space."""
    for path in (workdir / "checkpoints").glob(_UNFINISHED):
        shutil.rmtree(path)


@contextlib.contextmanager
def reporting_disk_errors(workdir: Path, writing: Path | None = None) -> Iterator[None]:
    """Turn a write error of the system into a CheckpointError that names the step to resume from.

    Args:
      workdir: of the run.
      writing: the path that the block writes. With it every OSError counts, without it only those
        that can come from nothing but writing.
    """
    try:
        yield
    except Exception as error:
        found = _of_the_system(error)
        if found is None or (writing is None and found.errno not in _FIXES):
            raise
        message = _message(workdir, found, writing)
        _release_frames(error)
        raise CheckpointError(message) from None


def resume_point(workdir: Path) -> str:
    """Where the same command would resume: "it resumes from step 40 (WORKDIR/checkpoints)"."""
    steps = complete_steps(workdir)
    if not steps:
        return "it starts over, because no checkpoint is complete yet"
    return f"it resumes from step {steps[-1]} ({workdir / 'checkpoints'})"


@functools.cache
def quiet_orbax() -> None:
    """Suppress what Orbax prints about a failed save in addition to raising it.

    For the rest of the process: the writes that such a save leaves behind may fail as late as at
    exit.
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
    """The OSError that an exception is or describes."""
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    if found := _IN_TEXT.search(str(error)):
        number = int(found[1] or found[2])
        return OSError(number, os.strerror(number))
    return None


def _message(workdir: Path, error: OSError, writing: Path | None) -> str:
    path = writing or error.filename or workdir
    unfinished = sorted(
        int(p.name.partition(".")[0]) for p in (workdir / "checkpoints").glob(_UNFINISHED)
    )
    if path == workdir / "checkpoints" and unfinished:
        path = f"{path / str(unfinished[-1])} (the checkpoint of step {unfinished[-1]})"
    fix = _FIXES.get(error.errno or 0, "Check that disk")
    return (
        f"cannot write {path}: {error.strerror}. {fix} and rerun the same command; "
        f"{resume_point(workdir)}"
    )


def _release_frames(error: BaseException | None) -> None:
    """Destroy now, rather than at exit, the objects that an exception's frames keep alive."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__context__
    gc.collect()
