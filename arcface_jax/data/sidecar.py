"""Arrays derived from data files, cached in a folder next to them: made once, then mapped.

Positions and labels of images are read once from formats that do not store them in one place. The
arrays have digests, and a stamp with sizes and times of the files that they were made from; a
damaged or outdated folder is rebuilt. If the data's folder is not writable, they go to the user's
cache folder.
"""

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arcface_jax.runtime import homes, sealed
from arcface_jax.runtime.files import atomic_folder
from arcface_jax.runtime.sealed import DamagedError

STAMP = "stamp.json"
SUFFIX = ".arcface_index"
"""Suffix of the folder next to the data."""
SETTLED = 2.0
"""Seconds without a change after which a file counts as complete."""

_CHUNK = 1 << 20  # values written at a time


class Arrays:
    """Arrays by name, mapped from a folder, or in memory.

    Args:
      values: arrays by name.
      folder: the folder that they are mapped from; None in memory.
      digests: SHA-256 of the mapped ones.
    """

    def __init__(
        self, values: Mapping[str, np.ndarray], folder: Path | None, digests: Mapping[str, str]
    ):
        self._values, self.folder = dict(values), folder
        self._digests = dict(digests)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._values[name]

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def digest(self, name: str) -> str:
        """Returns the SHA-256 of an array."""
        if name not in self._digests:
            self._digests[name] = sealed.array_digest(self._values[name])
        return self._digests[name]


def open_arrays(
    data: Path,
    files: Iterable[Path],
    make: Callable[[], Mapping[str, np.ndarray]],
    *,
    options: str,
    check: bool = True,
    part: str = "",
) -> Arrays:
    """Returns the arrays cached for some data, or makes and caches them.

    Args:
      data: folder or file of the data; the arrays are cached next to it, as NAME.arcface_index.
      files: the files that the arrays are made from; a change of any rebuilds them.
      make: reads the files and returns (n,) arrays by name.
      options: what else the arrays depend on, including the version of their layout.
      check: whether to compare the digests of cached arrays; once per process tree is enough.
      part: name of a part of the data, whose arrays are cached as NAME + part.
    """
    files = list(files)
    stamp = {"files": _digest_of(files, data), "options": options}
    places = folders(data, data.with_name(data.name + part + SUFFIX), part=part)
    for folder in places:
        if found := _mapped(folder, stamp, data, check=check):
            return found
    values = dict(make())
    if is_settled(files):
        folder = keep(places, {f"{name}.npy": x for name, x in values.items()}, {"files": stamp})
        if folder is not None:
            return _mapped(folder, stamp, data, check=False) or Arrays(values, None, {})
    return Arrays(values, None, {})


def _digest_of(files: Iterable[Path], data: Path) -> str:
    stats = ((os.path.relpath(file, data.parent), file.stat()) for file in files)
    lines = [f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}" for name, stat in stats]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _mapped(folder: Path, stamp: object, data: Path, *, check: bool) -> Arrays | None:
    if not (folder.exists() or folder.is_symlink()):
        return None
    try:
        kept = read_stamp(folder)
        if kept["files"] != stamp:
            return None
        digests = kept["digests"]
        values = {name: load(folder, name, digests, check=check) for name in digests}
    except DamagedError as error:
        print_damaged(error, f"made again from {data}")
        return None
    return Arrays(
        {name.removesuffix(".npy"): x for name, x in values.items()},
        folder,
        {name.removesuffix(".npy"): x for name, x in digests.items()},
    )


def folders(data: Path, beside: Path, *, part: str = "") -> tuple[Path, ...]:
    """Returns the folders to cache in: next to the data, and the user's cache if there is one."""
    whole = f"{data.resolve()}{part}"
    name = hashlib.sha256(whole.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    cache = homes.user_cache()
    return (beside,) if cache is None else (beside, cache / "arcface_jax" / name)


def is_settled(files: Iterable[Path]) -> bool:
    """Returns whether no file has changed for a moment; if one has, it may be incomplete."""
    return time.time() - max(path.stat().st_mtime for path in files) > SETTLED


def read_stamp(folder: Path) -> dict[str, Any]:
    """Reads the folder's stamp; for an earlier version, whose arrays are not used, its files.

    Raises:
      DamagedError: the stamp is corrupt or missing.
    """
    try:
        kept = sealed.read(folder / STAMP, unsealed=True)
    except FileNotFoundError:
        raise DamagedError(f"{folder} has no {STAMP}") from None
    files = kept.get("files")
    if "digests" not in kept and isinstance(files, dict) and files.get("version") == 1:
        return kept
    return sealed.read(folder / STAMP)


def load(
    folder: Path,
    name: str,
    digests: Mapping[str, str],
    *,
    count: int | None = None,
    check: bool = True,
) -> np.ndarray:
    """Maps an array.

    Args:
      folder: its folder.
      name: name of its file.
      digests: SHA-256 of the folder's arrays, by file name.
      count: count of its values, if that is known.
      check: whether to compare its digest.

    Raises:
      DamagedError: the array is corrupt.
    """
    try:
        values = np.load(folder / name, mmap_mode="r")
        whole = values.ndim == 1 and not values.dtype.hasobject
        whole = whole and count in (None, len(values))
    except (OSError, ValueError, EOFError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise DamagedError(f"{folder / name} cannot be read ({problem})") from None
    if not whole or (check and sealed.array_digest(values) != digests[name]):
        raise DamagedError(f"{folder / name} is not what was written")
    return values


def print_damaged(error: DamagedError, remedy: str) -> None:
    """Reports on stderr that cached arrays are not used, and what is done instead."""
    print(f"warning: {error}: {remedy}", file=sys.stderr)


def keep(
    places: tuple[Path, ...], arrays: Mapping[str, np.ndarray], content: Mapping[str, Any]
) -> Path | None:
    """Writes arrays and their stamp to the first writable folder.

    Args:
      places: of `folders`.
      arrays: (n,) each, by file name.
      content: content of the stamp, to which the digests are added.

    Returns:
      The folder; None if neither is writable.
    """
    beside = places[0]
    for folder in places:
        # The superuser may write anywhere; a folder without write permission is left as it is.
        if folder is beside and not folder.parent.stat().st_mode & 0o222:
            continue
        with contextlib.suppress(OSError):
            _write(folder, arrays, content)
            if folder is not beside:
                print(
                    f"{beside.parent} is read-only: its index is cached in {folder}",
                    file=sys.stderr,
                )
            return folder
    return None


def _write(folder: Path, arrays: Mapping[str, np.ndarray], content: Mapping[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    digests = {name: sealed.array_digest(values) for name, values in arrays.items()}
    with atomic_folder(folder) as new:
        for name, values in arrays.items():
            save(new / name, values)
        (new / STAMP).write_text(sealed.seal({**content, "digests": digests}))


def save(file: Path, values: np.ndarray) -> None:
    """Writes an array chunk by chunk, so that a strided one is never copied as a whole."""
    if not len(values):  # an empty file cannot be mapped for writing
        np.save(file, values)
        return
    mapped = np.lib.format.open_memmap(file, "w+", values.dtype, values.shape)
    for start in range(0, len(values), _CHUNK):
        mapped[start : start + _CHUNK] = values[start : start + _CHUNK]
    mapped.flush()
