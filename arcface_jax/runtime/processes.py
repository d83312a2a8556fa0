"""Facts about a process from the system: when it started, and whether it is suspended."""

from pathlib import Path


def start_of(pid: int) -> str | None:
    """Returns when a process started, in clock ticks; "" if it has ended, None if unknown."""
    fields = _fields(pid)
    if fields is None:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def is_stopped(pid: int) -> bool:
    """Returns whether a process is suspended, by SIGSTOP or a debugger."""
    fields = _fields(pid)
    return fields is not None and fields[0] in "Tt"


def _fields(pid: int) -> list[str] | None:
    """Returns the fields of /proc/PID/stat from the third on, the state."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # the name before it may contain anything
