"""Atomic writes, and one clear error if a disk is full or read-only.

Every file that must never be seen half-written goes through this module: `write_atomic` for text
and bytes, `atomic` for streams, `atomic_files` for writers that need a name or write several files,
`atomic_folder` for whole folders. All write to `NAME.HOST-PID.part` next to the target and rename.

The libraries report a full disk in different ways, some of them from threads: Orbax logs it several
times, raises it in the next save, and leaves pending writes that fail later.
"""

import contextlib
import errno
import functools
import gc
import glob
import inspect
import logging
import os
import platform
import re
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from arcface_jax.errors import FIXES, CheckpointError, UserError

PART = ".part"
"""Suffix of everything that is being written."""

# How TensorStore, which writes the arrays, formats the system's error.
_IN_TEXT = re.compile(r"os_error_code='(\d+)'|OS error (\d+)")
_UNFINISHED = "[0-9]*.orbax-checkpoint-tmp*"
_STEP = re.compile(r"0|[1-9][0-9]*", re.ASCII)


def require_place(path: Path) -> None:
    """Checks, before slow work, that a path can be the name of a new file.

    Raises:
      UserError: it is a folder, or its folder does not exist.
    """
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replaces a file in one move: if that fails, its old content stays.

    Args:
      path: path of the file; its folder must exist.
      content: text, written as UTF-8, or bytes.
      durable: as in `atomic`.

    Raises:
      OSError: the file cannot be written.
    """
    with atomic(path, "w" if isinstance(content, str) else "wb", durable=durable) as file:
        file.write(content)


@contextlib.contextmanager
def atomic(
    path: Path, mode: str = "w", *, newline: str | None = None, durable: bool = True
) -> Iterator[IO[Any]]:
    """Opens a file for writing that replaces `path` when the block ends without error.

    Args:
      path: of the file; its folder must exist. A device or pipe is written to directly. A symbolic
        link is followed to files in or below its folder; one that leads elsewhere is replaced.
      mode: "w" (UTF-8; bytes of names that are not UTF-8 are kept) or "wb".
      newline: as in `open`.
      durable: sync the file before the move and its folder after it, so that a power failure leaves
        either the old or the new content, and remove leftovers of killed processes. Turn it off for
        many small files that can be recreated.

    Raises:
      OSError: the file cannot be written; the old content stays and no partial file is left.
    """
    if path.exists() and not path.is_file():
        with _open(path, mode, newline) as file:
            yield file
        return
    path = path if _leads_out(path) else path.resolve() if path.is_symlink() else path
    if durable:
        _remove_stale(path)
    part = part_of(path)
    try:
        with _open(part, mode, newline) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
        if durable:
            _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            part.unlink(missing_ok=True)
        raise


def open_own(path: Path, mode: str, *, newline: str | None = None) -> IO[Any]:
    """Opens a file for appending, updating or rewriting, without leaving its folder.

    A symbolic link that leads out of the folder is replaced by a copy of its target, so that a
    planted link cannot cause another file to be overwritten.

    Args:
      path: path of the file.
      mode: as in `open`; text is UTF-8, as in `atomic`.
      newline: as in `open`.

    Raises:
      OSError: the file cannot be opened.
    """
    if _leads_out(path):
        if path.is_file() and not mode.startswith("w"):
            with path.open("rb") as source, atomic(path, "wb") as copy:
                shutil.copyfileobj(source, copy)
        else:
            path.unlink()
    return _open(path, mode, newline)


def _open(path: Path, mode: str, newline: str | None) -> IO[Any]:
    """Opens a file as `open` does, with text in UTF-8 and other bytes in names preserved."""
    if "b" in mode:
        return path.open(mode)
    return path.open(mode, encoding="utf-8", errors="surrogateescape", newline=newline)


def below(folder: Path, name: str) -> Path:
    """Returns the path of a file to write below an output folder, and creates missing folders.

    Args:
      folder: folder of the output.
      name: relative path with forward slashes, as below the input's folder.

    Raises:
      CheckpointError: a symbolic link among the folders leads out of the output.
    """
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{path.parent} leads out of {folder} by a symbolic link, through which nothing is "
            "written: remove the link, or name another folder"
        )
    return path


def _leads_out(path: Path) -> bool:
    """Returns whether a path is a symbolic link that leads out of its folder.

    Links of the system, such as /dev/stdout, do not count.
    """
    if not path.is_symlink():
        return False
    home = path.parent.resolve()
    system = home.parts[1:2] in (("dev",), ("proc",))
    return not system and not path.resolve().is_relative_to(home)


@contextlib.contextmanager
def atomic_files(path: Path) -> Iterator[Path]:
    """Writes files atomically by name, together with other files next to them.

    Yields:
      A path of the same name in a temporary folder. When the block ends without error, every file
      in that folder is moved next to `path`, and `path` itself last.

    Raises:
      OSError: a file cannot be written or moved.
    """
    with _part_folder(path) as folder:
        yield folder / path.name
        files = sorted(folder.iterdir(), key=lambda file: (file.name == path.name, file.name))
        for file in files:
            _sync(file)
        for file in files:
            file.replace(path.parent / file.name)
        _sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Creates a folder that replaces `path` when the block ends without error.

    If another process puts a folder there in the meantime, that one stays. A folder that cannot be
    replaced, because it is a mount point or the working directory, is filled if it is empty.

    Yields:
      A temporary folder.

    Raises:
      OSError: the folder cannot be written; the old one stays.
    """
    path = path.resolve() if path.name in ("", "..") else path  # "." has no name
    with _part_folder(path) as folder:
        yield folder
        for file in folder.iterdir():
            _sync(file)
        _sync_folder(folder)
        _put_in_place(folder, path)
        _sync_folder(path.parent)


def _put_in_place(new: Path, path: Path) -> None:
    """Moves a folder to `path`, and removes what was there once the new one has its place."""
    if path.is_dir() and path.samefile(os.curdir):
        _fill(path, new)
        return
    with _part_folder(path.with_name(f"{path.name}.old")) as trash:
        old = trash / path.name
        try:
            if os.path.lexists(path):
                path.rename(old)
        except FileNotFoundError:  # another process has removed it
            pass
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            _fill(path, new)
            return
        try:
            new.rename(path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # put there by another process
                return
            if os.path.lexists(old):
                old.rename(path)
            raise


def _fill(path: Path, new: Path) -> None:
    """Moves the contents of a folder to an empty one, possibly on another disk."""
    if any(path.iterdir()):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
    for file in sorted(new.iterdir()):
        _sync(Path(shutil.move(file, path / file.name)))
    _sync_folder(path)


def part_of(path: Path) -> Path:
    """Returns the path at which this process writes a file or folder before moving it into
    place.
    """
    return path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}{PART}")


@contextlib.contextmanager
def _part_folder(path: Path) -> Iterator[Path]:
    _remove_stale(path)
    folder = part_of(path)
    shutil.rmtree(folder, ignore_errors=True)  # left by an earlier process with this id
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks do not support it
            raise
    finally:
        os.close(number)


def _remove_stale(path: Path) -> None:
    """Removes partial files for `path` of this host's processes that no longer exist."""
    prefix = f"{path.name}.{platform.node()}-"
    for part in path.parent.glob(f"{glob.escape(prefix)}*{PART}"):
        number = part.name.removeprefix(prefix).removesuffix(PART)
        if number.isdecimal() and not is_running(int(number)):
            with contextlib.suppress(OSError):
                shutil.rmtree(part) if part.is_dir() else part.unlink()


def is_running(pid: int) -> bool:
    """Returns whether a process with this id exists on this machine."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def complete_steps(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints, ascending."""
    # Not isdigit(), which accepts a superscript two; nor 007, which Orbax does not take for a 7.
    found = (workdir / "checkpoints").glob("[0-9]*")
    return sorted(int(p.name) for p in found if _STEP.fullmatch(p.name) and p.is_dir())


def unfinished_steps(workdir: Path) -> list[int]:
    """Returns the steps of checkpoints that are being written, or were when a process was
    killed.
    """
    found = (workdir / "checkpoints").glob(_UNFINISHED)
    return sorted(int(step) for p in found if _STEP.fullmatch(step := p.name.partition(".")[0]))


def remove_unfinished(workdir: Path) -> None:
    """Removes checkpoints that an earlier process left incomplete, because they take disk space."""
    for path in (workdir / "checkpoints").glob(_UNFINISHED):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def reporting_disk_errors(workdir: Path, writing: Path | None = None) -> Iterator[None]:
    """Turns a write error of the system into a CheckpointError that names the step to resume from.

    Args:
      workdir: workdir of the run.
      writing: the path that the block writes. With it every OSError counts, without it only those
        that only writing can cause.
    """
    try:
        yield
    except Exception as error:
        found = _of_the_system(error)
        if found is None or (writing is None and found.errno not in FIXES):
            raise
        message = _message(workdir, found, writing)
        _release_frames(error)
        raise CheckpointError(message) from None


def resume_point(workdir: Path) -> str:
    """Describes where the same command would resume: "it resumes from step 40
    (WORKDIR/checkpoints)".
    """
    steps = complete_steps(workdir)
    if not steps:
        return "it starts over, because no checkpoint is complete yet"
    return f"it resumes from step {steps[-1]} ({workdir / 'checkpoints'})"


@functools.cache
def quiet_orbax() -> None:
    """Suppresses messages of Orbax about a failed save or read, which it also raises.

    Applies to the rest of the process: parts of a save may fail after the error is raised, as late
    as at exit.
    """
    hook = sys.unraisablehook

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        of_orbax = inspect.iscoroutine(args.object) and "orbax" in args.object.cr_code.co_filename
        # TensorStore calls back into the loop that Orbax closed after the first failed write.
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
    """Returns the OSError that an exception is or describes."""
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    if found := _IN_TEXT.search(str(error)):
        number = int(found[1] or found[2])
        return OSError(number, os.strerror(number))
    return None


def _message(workdir: Path, error: OSError, writing: Path | None) -> str:
    path = writing or error.filename or workdir
    unfinished = unfinished_steps(workdir)
    if path == workdir / "checkpoints" and unfinished:
        path = f"{path / str(unfinished[-1])} (the checkpoint of step {unfinished[-1]})"
    fix = FIXES.get(error.errno or 0, "Check that disk")
    return (
        f"cannot write {path}: {error.strerror}. {fix} and rerun the same command; "
        f"{resume_point(workdir)}"
    )


def _release_frames(error: BaseException | None) -> None:
    """Destroys the objects that an exception's frames keep alive, now rather than at exit."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__context__
    gc.collect()
