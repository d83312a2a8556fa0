"""Installed versions: constraints.txt and the lock files agree, and every release has hashes."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "locks").glob("*.txt"))


def _entries(text: str) -> dict[str, str]:
    """The requirement before the first hash -> everything up to the next requirement."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", text))
    return {re.split(r"\s*--hash", line)[0]: line for line in joined.splitlines() if line.strip()}


def _pins(text: str) -> set[tuple[str, str]]:
    found = [Requirement(entry) for entry in _entries(text)]
    return {(canonicalize_name(one.name), str(one.specifier)) for one in found}


def test_makes_every_environment_from_a_lock():
    named = re.findall(r"(?m)^LOCK_\S+ := (\S+)$", (ROOT / "Makefile").read_text())
    assert sorted(named) == [path.name for path in LOCKS]
    assert len(LOCKS) == 3


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_locked_releases_are_the_pinned_ones(path: Path):
    pinned = _pins((ROOT / "constraints.txt").read_text())
    locked = _pins(path.read_text())
    # What another platform or Python needs is in the lock only.
    names = {name for name, _ in pinned}
    differ = {(name, version) for name, version in locked - pinned if name in names}
    assert not differ, f"run `make lock`: {sorted(differ)}"
    assert len(locked & pinned) > 30
    assert not [name for name, _ in locked if name in {"torch", "arcface-jax"}]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_locked_release_has_hashes(path: Path):
    entries = _entries(path.read_text())
    assert len(entries) > 30
    for entry, line in entries.items():
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}\b", line), entry
