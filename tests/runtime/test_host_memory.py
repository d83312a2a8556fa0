"""Free memory: the machine's, and what each control group around the process leaves."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from arcface_jax.runtime import memory

MIB = 2**20
NUMBERS = {
    2: ("memory.max", "memory.current", "file {} \nshmem {}\n"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache {}\ntotal_shmem {}\n"),
}


def group(folder: Path, version: int, *, limit: str, used: int, cache: int = 0, shared: int = 0):
    most, usage, stat = NUMBERS[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / most).write_text(f"{limit}\n")
    (folder / usage).write_text(f"{used * MIB}\n")
    (folder / "memory.stat").write_text(stat.format(cache * MIB, shared * MIB))


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """1000 MiB available, no groups."""
    (tmp_path / "meminfo").write_text(
        f"MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:   {1000 * 1024} kB\n"
    )
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    return tmp_path


def test_without_groups_it_is_what_the_machine_has(machine):
    assert memory.free_on_host() == 1000 * MIB
    (machine / "meminfo").unlink()
    assert memory.free_on_host() > 0  # another system: free pages


def test_the_tightest_group_of_version_2_counts_with_its_caches(machine):
    (machine / "own").write_text("0::/job/task\n")
    groups = machine / "groups"
    group(groups / "job" / "task", 2, limit="max", used=10)
    group(groups / "job", 2, limit=str(500 * MIB), used=400, cache=150, shared=50)
    assert memory.free_on_host() == 200 * MIB
    group(groups, 2, limit=str(100 * MIB), used=130)
    assert memory.free_on_host() == 0


def test_groups_of_version_1_and_a_container_that_sees_its_own_as_the_root(machine):
    (machine / "own").write_text("5:cpu:/x\n4:memory,hugetlb:/docker/abc\n0::/\n")
    group(machine / "groups" / "memory", 1, limit=str(300 * MIB), used=200, cache=20)
    assert memory.free_on_host() == 120 * MIB


def test_a_device_with_memory_of_its_own_is_asked(machine):
    gpu = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 80 * MIB, "bytes_in_use": 30 * MIB})
    assert memory.free_on_device(gpu) == 50 * MIB
    assert memory.free_on_device(SimpleNamespace(memory_stats=lambda: None)) == 1000 * MIB
