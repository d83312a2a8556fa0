"""What the system knows about a process: when it started, and whether it is stopped."""

from pathlib import Path


def start_of(pid: int) -> str | None:
    """When a process started, in clock ticks; "" for one that has ended, None where unknown."""
    fields = _fields(pid)
    if fields is None:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def is_stopped(pid: int) -> bool:
    """Returns whether a process is suspended, by SIGSTOP or a debugger."""
    fields = _fields(pid)
    return fields is not None and fields[0] in "Tt"


def _fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on, the state."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # the name before it may hold anything
