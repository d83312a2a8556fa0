"""Free memory: of a device, and of the host within its control groups' limits."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MEMINFO = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def free_on_device(device: Any) -> int:
    """Returns the bytes that a JAX device can still allocate; CPU devices share the host's
    memory.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return free_on_host()


def free_on_host() -> int:
    """Returns the bytes that this process can still allocate, limited by machine and groups."""
    return min([_free_on_machine(), *_free_in_groups()])


def _free_on_machine() -> int:
    """Returns MemAvailable, which includes reclaimable caches; free pages if not on Linux.

    Source: proc_meminfo(5).
    """
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _free_in_groups() -> Iterator[int]:
    """Yields the free bytes of each control group of this process; file caches count as free.

    Version 2 has one tree, version 1 one below memory/. Inside a container the paths in
    /proc/self/cgroup may be the host's; the container's own group is then the root.
    """
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage = _GROUPS, "memory.max", "memory.current"
            cache, shared = "file", "shmem"
        elif "memory" in controllers.split(","):
            top, limit, usage = _GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache, shared = "total_cache", "total_shmem"
        else:
            continue
        inner = top / path.strip("/")
        for group in {top, inner, *(p for p in inner.parents if p.is_relative_to(top))}:
            try:
                most = (group / limit).read_text().strip()
                used = int((group / usage).read_text())
                stat = dict(
                    line.split() for line in (group / "memory.stat").read_text().splitlines()
                )
            except (OSError, ValueError):
                continue
            if most != "max":
                given_up = int(stat.get(cache, 0)) - int(stat.get(shared, 0))
                yield max(0, int(most) - used + max(0, given_up))
