"""Training sets whose labels and image positions are cached next to them (`sidecar`)."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from arcface_jax.data import names as identities
from arcface_jax.data.names import Names, Numbered
from arcface_jax.data.sidecar import SUFFIX, Arrays
from arcface_jax.data.source import Source


class IndexedSource(Source):
    """A set with an index, which `_arrays_of` opens and `described` created.

    If labels are numbers, `identities.txt` next to the set has their names.

    Args:
      folder: where identities.txt may be.
    """

    def __init__(self, folder: Path):
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


def of_folders(folders: Sequence[str]) -> list[str]:
    """Derives the identities of images from their folders, without the common part of the paths.

    Args:
      folders: folder of each image, none of them empty.
    """
    shared = os.path.commonpath(set(folders))
    if shared in folders:  # a single identity, or images at two depths
        shared = os.path.dirname(shared)
    return [os.path.relpath(folder, shared) for folder in folders] if shared else list(folders)
