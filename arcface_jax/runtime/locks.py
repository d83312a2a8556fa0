"""Lock a workdir for one run at a time, with its file `run.lock`.

The file is created by a hard link, which is atomic on local disks and on NFS, and names its holder.
Locks of the operating system are not used, because they vanish with a network connection.

A killed holder leaves its file. There are two ways to decide whether it still runs:

- On the same machine, by its process number and the start time of that process, so that a number
  that was used again is not taken for it.
- On another machine or in another container, by its heartbeat: the holder touches the file every
  `HEARTBEAT_SECONDS`. A file that has not changed for `STALE_SECONDS` is stale. Both times are
  the file system's. A younger file is watched: its holder runs as soon as it changes.

If several processes find the same stale lock, the one that gets a second lock, named after the
stale one, replaces it.
"""

import contextlib
import errno
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from arcface_jax.errors import FIXES, CheckpointError
from arcface_jax.runtime import foreign
from arcface_jax.runtime.files import PART, complete_steps, is_running, resume_point
from arcface_jax.runtime.processes import start_of

LOCK = "run.lock"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 180.0
"""Longer than NFS clients cache a file's times, which is 60 s."""

# Errors of a file system without hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
# Attempts of 0.1 s to get past other processes that replace the same stale lock.
_ATTEMPTS = 100


@dataclass(frozen=True)
class Holder:
    """The process that holds a workdir."""

    host: str
    pid: int
    machine: str
    """Boot and process namespace in which `pid` is valid."""
    started: str
    """Start time of the process in clock ticks since the boot; "" where unknown."""
    since: str
    """When it took the lock."""
    token: str
    """Unique token of this lock."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@dataclass
class _Hold:
    """A lock that this process holds."""

    me: Holder
    ended: threading.Event = field(default_factory=threading.Event)
    lost_to: Holder | None = None
    """Process that took the lock over while this one did not respond."""


class _HeldError(Exception):
    """Raised if another process holds the lock."""

    def __init__(self, holder: Holder):
        super().__init__(str(holder))
        self.holder = holder


_holds: dict[Path, _Hold] = {}


def _nothing() -> None:
    """Does nothing, so that waiting for a heartbeat continues."""


@contextlib.contextmanager
def held(workdir: Path, *, between: Callable[[], None] = _nothing) -> Iterator[None]:
    """Locks WORKDIR, which is created if missing, until the block ends.

    A process that already has the lock may take it again.

    Args:
      workdir: workdir of a run.
      between: called every second while waiting for another machine's lock; it may raise to end the
        wait.

    Raises:
      CheckpointError: another process holds it, or the folder cannot be written.
    """
    key = workdir.resolve()
    if key in _holds:
        yield
        return
    missing = [folder for folder in (key, *key.parents) if not folder.exists()]
    try:
        key.mkdir(parents=True, exist_ok=True)
        me = _take_workdir(workdir, key / LOCK, between)
    except OSError as error:
        _remove_empty(missing)
        raise cannot_write(workdir, error) from error
    hold = _holds[key] = _Hold(me)
    beat = threading.Thread(target=_beat, args=[key / LOCK, hold], name="lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        hold.ended.set()
        del _holds[key]
        if me.pid == os.getpid():  # not in a fork
            beat.join(HEARTBEAT_SECONDS)  # takes longer only if the disk hangs
            _release(key / LOCK, me)
            _remove_empty(missing)


def require(workdir: Path) -> None:
    """Checks, before a write to WORKDIR, that no other process has taken it over.

    That happens to a process that was suspended or disconnected from the disk for `STALE_SECONDS`.

    Raises:
      CheckpointError: another process holds it.
    """
    hold = _holds.get(workdir.resolve())
    if hold and hold.lost_to:
        raise CheckpointError(
            f"--workdir {workdir} was taken over by {hold.lost_to}: this process did not respond "
            f"for {STALE_SECONDS:g} s. Nothing more is saved here; stop one of the two runs"
        )


def find(workdir: Path) -> tuple[Holder, bool] | None:
    """Returns the holder of WORKDIR and whether it still runs; None without one. Writes nothing.

    The heartbeat of another machine is compared with the clock of this one.
    """
    path = workdir / LOCK
    with contextlib.suppress(OSError):
        if holder := _read(path):
            runs = _runs(holder)
            fresh = time.time() - path.stat().st_mtime < STALE_SECONDS
            return holder, fresh if runs is None else runs
    return None


def cannot_write(workdir: Path, error: OSError) -> CheckpointError:
    """Returns the error for a workdir that the system does not let the run write to."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return CheckpointError(
            f"--workdir {workdir} is a file, or leads through one: choose another --workdir"
        )
    fix = FIXES.get(error.errno or 0, "Change its permissions")
    message = f"cannot write to --workdir {workdir}: {error.strerror}. {fix}"
    if complete_steps(workdir):
        return CheckpointError(f"{message} and rerun the same command; {resume_point(workdir)}")
    return CheckpointError(f"{message}, or choose another --workdir")


def is_lock_file(path: Path) -> bool:
    """Returns whether a file in a workdir belongs to its lock."""
    return path.name == LOCK or path.name.startswith(f"{LOCK}.")


def _take_workdir(workdir: Path, path: Path, between: Callable[[], None]) -> Holder:
    """Takes the lock file and reports whose it was."""
    me = _this_process()
    try:
        before = _take(path, me, between)
    except _HeldError as error:
        holder = error.holder
        here = holder.host == me.host and holder.machine == me.machine
        stop = f"stop it (kill {holder.pid})" if here else f"stop it on {holder.host}"
        raise CheckpointError(
            f"--workdir {workdir} is in use by another run: {holder}. Wait until it ends, {stop}, "
            "or choose another --workdir"
        ) from None
    if before and not _is_this_process(before, me):
        print(
            f"{workdir} was left locked by {before}, which no longer runs; taking it over",
            file=sys.stderr,
        )
    _remove_litter(path)
    return me


def _remove_litter(path: Path) -> None:
    """Removes leftovers of processes that were killed while taking the lock."""
    with contextlib.suppress(OSError):
        now = path.stat().st_mtime
        for file in path.parent.glob(f"{LOCK}.*"):
            if now - file.stat().st_mtime > STALE_SECONDS:
                file.unlink()


def _take(path: Path, me: Holder, between: Callable[[], None]) -> Holder | None:
    """Creates the lock file, or replaces a stale one and returns its holder.

    Raises:
      _HeldError: the holder still runs.
    """
    there = me
    for _ in range(_ATTEMPTS):
        if _create(path, me):
            return None
        there = _read(path)
        if there is None:  # released in the meantime
            continue
        if not _is_stale(path, there, me, between):
            raise _HeldError(there)
        # Another process may have replaced the lock since it was judged stale: to replace it, a
        # process takes this second lock and checks again.
        second = path.with_name(f"{path.name}.{there.token}")
        try:
            _take(second, me, between)
        except _HeldError:
            time.sleep(0.1)
            continue
        try:
            now = _read(path)
            if now and now.token == there.token:
                with _written(path, me) as part:
                    part.replace(path)
                return there
        finally:
            second.unlink(missing_ok=True)
    raise _HeldError(there or me)


def _create(path: Path, me: Holder) -> bool:
    """Creates the file with its full content, unless it exists."""
    with _written(path, me) as part:
        try:
            os.link(part, path)
            return True
        except FileExistsError:
            # On NFS the reply to a successful link may be lost, and the link retried.
            with contextlib.suppress(FileNotFoundError):
                return part.samefile(path)
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_without_link(path, me)


@contextlib.contextmanager
def _written(path: Path, me: Holder) -> Iterator[Path]:
    """Writes a file next to `path` that names this process; removes it afterwards unless moved."""
    part = path.with_name(f"{LOCK}.{me.token}{PART}")  # containers may share host names and pids
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(_text(me))
            file.flush()
            os.fsync(file.fileno())
        yield part
    finally:
        part.unlink(missing_ok=True)


def _create_without_link(path: Path, me: Holder) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(_text(me))
        return True
    except FileExistsError:
        return False


def _text(me: Holder) -> str:
    return json.dumps(asdict(me), indent=1) + "\n"


def _read(path: Path) -> Holder | None:
    """Reads the holder that the file names; None without a file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    try:
        found = Holder(**foreign.parse_json(text))
        if found.token.isalnum() and found.pid + 0 == found.pid:  # checks the types
            return found
        raise ValueError
    except (ValueError, TypeError, AttributeError):
        # Empty for a moment on file systems without links, or damaged: the heartbeat decides.
        return Holder("unknown", 0, "", "", "an unknown time", "unreadable")


def _is_stale(path: Path, there: Holder, me: Holder, between: Callable[[], None]) -> bool:
    if _is_this_process(there, me):  # left by an earlier run in a notebook
        return True
    runs = _runs(there)
    return _heart_stopped(path, there, me, between) if runs is None else not runs


def _heart_stopped(path: Path, there: Holder, me: Holder, between: Callable[[], None]) -> bool:
    """Watches the heartbeat of another machine's holder until it changes, or is stale."""
    beat = _modified(path)
    if beat is None:
        return True
    with _written(path, me) as part:
        left = min(STALE_SECONDS - (part.stat().st_mtime - beat), STALE_SECONDS)
    if left > 0:
        print(
            f"{path.parent} is locked by {there}; waiting up to {left:.0f} s for a sign of life",
            file=sys.stderr,
        )
    while left > 0:
        between()
        time.sleep(1.0)
        left -= 1.0
        now = _modified(path)
        if now is None:
            return True
        if now != beat:
            return False
    return True


def _modified(path: Path) -> float | None:
    """Returns when the file was changed; opens it first, so that NFS asks its server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _beat(path: Path, hold: _Hold) -> None:
    """Touches the lock file while it is held, and detects whether another run has taken it."""
    while not hold.ended.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            there = _read(path)
            if there is None:  # removed by hand
                _create(path, hold.me)
            elif there.token != hold.me.token:
                hold.lost_to = there
                return
            else:
                os.utime(path)


def _release(path: Path, me: Holder) -> None:
    with contextlib.suppress(OSError):
        there = _read(path)
        if there and there.token == me.token:
            path.unlink()


def _remove_empty(folders: list[Path]) -> None:
    """Removes the folders created for a run that wrote nothing."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _this_process() -> Holder:
    return Holder(
        host=platform.node(),
        pid=os.getpid(),
        machine=_machine(),
        started=start_of(os.getpid()) or "",
        since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        token=uuid.uuid4().hex,
    )


def _is_this_process(there: Holder, me: Holder) -> bool:
    one, other = asdict(there), asdict(me)
    return all(one[name] == other[name] for name in ("host", "pid", "machine", "started"))


def _runs(holder: Holder) -> bool | None:
    """Returns whether a holder runs; None if it is on another machine or in another container."""
    if (holder.host, holder.machine) != (platform.node(), _machine()):
        return None
    if not is_running(holder.pid):
        return False
    started = start_of(holder.pid)
    return started is None or started == holder.started


def _machine() -> str:
    """Returns the boot and the process namespace; "" on a system without /proc."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""
