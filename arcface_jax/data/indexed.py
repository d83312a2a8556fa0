"""Training sets whose labels and image positions are cached next to them (`sidecar`)."""

import json
import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import numpy as np

from arcface_jax.data import names as identities
from arcface_jax.data.files import check_level
from arcface_jax.data.names import Names, Numbered
from arcface_jax.data.sidecar import SUFFIX, Arrays
from arcface_jax.data.source import Source
from arcface_jax.errors import DataError


class IndexedSource(Source):
    """A set with an index, which `_arrays_of` opens and `described` created.

    If labels are numbers, `identities.txt` next to the set has their names.

    Args:
      folder: where identities.txt may be.
    """

    def __init__(self, folder: Path):
        # Decides whether sparse labels are numbers, so the index depends on it.
        self._declared = identities.declared(folder)
        self._arrays = self._open_arrays(check=True)
        self._labels = self._arrays["labels"]
        found = Numbered(self._labels, int(self._arrays["classes"][0]), None)
        if "names" in self._arrays:
            names = Names.from_arrays(self._arrays["names"], self._arrays["name_ends"])
            found = found._replace(names=names)
        else:
            found = identities.with_table(found, folder)
        self.num_classes, self.names = found.num_classes, found.names
        self.ignored = json.loads(self._arrays["ignored"].tobytes())
        self.notes = tuple(json.loads(self._arrays["notes"].tobytes()))
        self._prepare()

    def _open_arrays(self, *, check: bool) -> Arrays:
        """Opens the arrays by `sidecar.open_arrays`; another process need not check digests
        again.
        """
        raise NotImplementedError

    def _prepare(self) -> None:
        """Creates what is not sent to another process."""

    def __getstate__(self) -> dict:
        # Mapped arrays would be copied; the other process maps them again.
        own = ("_arrays", "_labels") if self._arrays.folder else ()
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if "_arrays" not in state:
            self._arrays = self._open_arrays(check=False)
            self._labels = self._arrays["labels"]
        self._prepare()

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> np.ndarray:
        """Returns (len,) int32; -1 where an image has none."""
        return self._labels


def described(
    found: Numbered, *, ignored: Mapping[str, int], notes: Sequence[str]
) -> dict[str, np.ndarray]:
    """Returns the arrays from which an IndexedSource reads labels, identities and notes."""
    text = {"ignored": json.dumps(ignored), "notes": json.dumps(notes)}
    arrays = {
        "labels": found.labels,
        "classes": np.array([found.num_classes], np.int64),
        **{name: np.frombuffer(value.encode(), np.uint8) for name, value in text.items()},
    }
    if found.names is not None:
        arrays["names"], arrays["name_ends"] = found.names.arrays()
    return arrays


def files_of(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Returns the visible entries of a folder that have one of the suffixes, sorted.

    Returns an empty list if the folder also has sub-folders: then these are the identities, and
    files next to them are not archives.

    Args:
      folder: may have millions of entries.
      suffixes: lower-case suffixes.
    """
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if entry.name.lower().endswith(tuple(suffixes))]
    if not found:
        return []
    names = {entry.name for entry in found}
    with os.scandir(folder) as entries:
        own = (entry for entry in entries if entry.name not in names and _is_folder(entry))
        if any(entry.name[0] != "." and not entry.name.endswith(SUFFIX) for entry in own):
            return []
    return sorted(Path(entry.path) for entry in found if entry.name[0] != ".")


def _is_folder(entry: os.DirEntry) -> bool:
    """Returns whether an entry leads to a folder; `entry.is_dir` raises on a link to itself."""
    linked = entry.is_symlink() and os.path.isdir(entry.path)
    return linked or entry.is_dir(follow_symlinks=False)


def of_paths(paths: Sequence[str], *, level: int, where: str) -> list[str | None]:
    """Derives identities from the folders in images' paths, by the rules of an image folder.

    The common part of the paths does not count, so a tar of `faces/` is like the folder `faces`.

    Args:
      paths: path of each image in its archive, each with a folder.
      level: as `data.identity_level`.
      where: the archive, for messages.

    Returns:
      Each image's identity; None for those above the identities' folders.

    Raises:
      DataError: it is ambiguous which folders are the identities, or no image is at that level.
    """
    parts = [tuple(part for part in path.split("/") if part not in ("", ".")) for path in paths]
    shared = _depth_of_root({part[:-1] for part in parts})
    below = [part[shared:] for part in parts]
    if not level and any(len(part) > 2 for part in below):
        people: dict[str, list[str]] = {}
        for part in sorted(part for part in below if len(part) > 1):
            people.setdefault(part[0], []).append("/".join(part[1:]))
        check_level(where, people)
    depth = level or 1
    found = ["/".join(part[:depth]) if len(part) > depth else None for part in below]
    if not any(found):
        raise DataError(f"{where} has no image {depth} folders deep: give a lower identity level")
    return found


def _depth_of_root(folders: Set[tuple[str, ...]]) -> int:
    """Returns how many folders are above those of the identities.

    Args:
      folders: the images' folders, as their parts.
    """
    first, last = min(folders), max(folders)
    differ = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    shared = first[: next(differ, min(len(first), len(last)))]
    if not shared or shared not in folders:
        return len(shared)
    # Images next to several folders are loose ones. A single folder, or none, is in an identity's.
    several = len({folder[len(shared)] for folder in folders if len(folder) > len(shared)}) > 1
    return len(shared) if several else len(shared) - 1
