"""Shared memory of worker processes: named after its owner, reserved before use, removed later.

Workers pass batches in objects in /dev/shm. Python's names do not identify the owner, so leftovers
of a process group after `kill -9` stay until a reboot. Here the name of each object starts with
`arcface_jax-NAMESPACE-PID-START` of the process that started the workers. The next run removes
those whose owner has ended. Objects of another process namespace, i.e. of a container, stay.
"""

import contextlib
import errno
import os
import re
import secrets
import sys
from multiprocessing import process, shared_memory
from pathlib import Path

from arcface_jax.errors import UserError
from arcface_jax.runtime.files import is_running
from arcface_jax.runtime.processes import start_of

FOLDER = Path("/dev/shm")
_PREFIX = "arcface_jax"
_NAME = re.compile(rf"(?:sem\.)?{_PREFIX}-(\d+)-(\d+)-(\d+)-.*")
_MIB = 2**20


def name_of_owner(pid: int) -> str:
    """Returns the prefix of the names of a process's objects; "" on a system without /proc."""
    started, namespace = start_of(pid), _namespace()
    return f"{_PREFIX}-{namespace}-{pid}-{started}" if started and namespace else ""


def name_semaphores() -> None:
    """Names the semaphores that this process will share with workers after it."""
    if owner := name_of_owner(os.getpid()):
        # There is no public way: multiprocessing.synchronize reads the prefix from here.
        settings = getattr(process.current_process(), "_config", None)
        if isinstance(settings, dict) and "semprefix" in settings:
            settings["semprefix"] = f"/{owner}"


def name_blocks(owner: str) -> None:
    """Makes a worker name new blocks after the owner and reserve their memory.

    Args:
      owner: `name_of_owner` of the process that started this one.
    """
    if owner and FOLDER.is_dir():
        shared_memory.SharedMemory = _class_for(owner)


def _class_for(owner: str) -> type[shared_memory.SharedMemory]:
    plain = shared_memory.SharedMemory

    class Owned(plain):
        def __init__(self, name: str | None = None, create: bool = False, size: int = 0, **more):
            new = f"{owner}-{secrets.token_hex(8)}" if create and name is None else name
            super().__init__(new, create, size, **more)
            if create:
                try:
                    _reserve(self.name, size)
                except BaseException:
                    self.close()
                    self.unlink()
                    raise

    return Owned


def _reserve(name: str, size: int) -> None:
    """Allocates the memory now: if it is missing, the first write would kill the process by SIGBUS.

    Raises:
      UserError: there is not enough memory.
    """
    try:
        number = os.open(FOLDER / name, os.O_RDWR)
    except OSError:
        return
    try:
        os.posix_fallocate(number, 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            return  # not supported on this file system
        found = os.statvfs(FOLDER)
        raise UserError(
            f"{FOLDER} is full: a batch needs {size / _MIB:.1f} MiB, and "
            f"{found.f_bavail * found.f_frsize / _MIB:.1f} of "
            f"{found.f_blocks * found.f_frsize / _MIB:.1f} MiB are free. Make it larger (docker "
            "run --shm-size 8g; in Kubernetes an emptyDir of medium Memory at /dev/shm), or use "
            "fewer --data.workers; --data.workers 0 needs none"
        ) from error
    finally:
        os.close(number)


def remove_leftovers(folder: Path = FOLDER) -> tuple[int, int]:
    """Removes the objects of owners that no longer run, and reports them on stderr.

    Args:
      folder: folder of shared memory.

    Returns:
      Number of removed objects, and their bytes.
    """
    count = size = 0
    for path, held in _leftovers(folder):
        with contextlib.suppress(OSError):  # another user's, or another run was faster
            path.unlink()
            count, size = count + 1, size + held
    if count:
        print(
            f"removed {count} objects ({size / _MIB:.1f} MiB) from {folder} that killed runs left",
            file=sys.stderr,
        )
    return count, size


def _leftovers(folder: Path) -> list[tuple[Path, int]]:
    namespace, found = _namespace(), []
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            name = _NAME.fullmatch(entry.name)
            if name and name[1] == namespace and not _runs(int(name[2]), name[3]):
                with contextlib.suppress(OSError):
                    blocks = entry.stat(follow_symlinks=False).st_blocks
                    found.append((Path(entry.path), 512 * blocks))
    return found


def _runs(pid: int, started: str) -> bool:
    """Returns whether this very process still runs; a reused process id does not count."""
    return is_running(pid) and start_of(pid) in (started, None)


def _namespace() -> str:
    """Returns the number of this process's pid namespace; "" on a system without /proc."""
    with contextlib.suppress(OSError):
        return "".join(filter(str.isdigit, os.readlink("/proc/self/ns/pid")))
    return ""
