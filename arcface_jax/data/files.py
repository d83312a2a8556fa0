"""Training sets of image files: named by a list (`lists`), or in one folder per identity."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.data import names as identities
from arcface_jax.data.images import Walk, read_file
from arcface_jax.data.names import Names
from arcface_jax.data.source import Sample, Source
from arcface_jax.errors import DataError
from arcface_jax.runtime.sealed import array_digest


class FilesSource(Source):
    """Image files with labels.

    Args:
      folder: base of the relative paths.
      files: path of each image.
      labels: (n,) identities.
      num_classes: number of identities.
      names: names of the identities, if they have any.
      ignored: entries that are not used, by kind.
      notes: how ambiguous parts of the set were interpreted.
    """

    unit = "files"

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        labels: np.ndarray,
        *,
        num_classes: int,
        names: Names | None = None,
        ignored: Mapping[str, int] | None = None,
        notes: Sequence[str] = (),
    ):
        self._folder = folder
        self.names, self.ignored, self.notes = names, dict(ignored or {}), tuple(notes)
        # One array instead of millions of strings: fast to send to other processes.
        encoded = [os.fsencode(name) for name in files]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._names = b"".join(encoded)
        self._labels = labels.astype(np.int32)
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> Sample:
        """Returns the file's bytes and its label.

        Raises:
          ImageError: the file cannot be read.
        """
        return Sample(read_file(self._path(index)), int(self._labels[index]))

    def labels(self) -> np.ndarray:
        """Returns (len,) int32."""
        return self._labels

    def where(self, index: int) -> str:
        """Returns the file's path."""
        return str(self._path(index))

    def facts(self) -> Mapping[str, int | str]:
        """Returns digests of the images' names, relative to the set's folder, and of the labels."""
        names = np.frombuffer(self._names, np.uint8)
        return {
            "form": "image files",
            "file names": array_digest(names) + array_digest(self._ends),
            "labels": array_digest(self._labels),
        }

    def _path(self, index: int) -> Path:
        begin = self._ends[index - 1] if index else 0
        return self._folder / os.fsdecode(self._names[begin : self._ends[index]])


LOOSE = "loose images"
"""Kind of ignored images: those above the identities' folders."""
_STRAY = 0.05  # share of a group's images that lie directly in its folder


class _Found(NamedTuple):
    """The images found in a folder."""

    people: dict[str, list[str]]
    """By sub-folder: the images' relative paths, in order."""
    loose: list[str]
    ignored: dict[str, int]


def try_folder(folder: Path, *, level: int = 0) -> FilesSource | None:
    """Opens a folder with one sub-folder per identity, in the order of the names.

    An identity has all images below its folder, at any depth.

    Args:
      folder: folder of the identities' folders.
      level: depth of the identities' folders, from 1; 0 detects it.

    Returns:
      The set; None if no sub-folder has an image.

    Raises:
      DataError: the images are not in sub-folders, or it is ambiguous which folders are the
          identities.
    """
    found = _walk(folder)
    if not found.people:
        if found.loose:
            raise DataError(
                f"{folder} holds {len(found.loose)} loose images ({sorted(found.loose)[0]}) and no "
                "folder with images: put the images of each identity into a separate folder"
            )
        return None
    people = found.people
    if level == 0:
        check_level(folder, people)
    elif level > 1:
        people = _deeper(folder, found, level)
    ignored = found.ignored | ({LOOSE: len(found.loose)} if found.loose else {})
    order = sorted(people)
    labels = np.repeat(np.arange(len(order)), [len(people[name]) for name in order])
    paths = [f"{name}/{file}" for name in order for file in people[name]]
    return FilesSource(
        folder,
        paths,
        labels,
        num_classes=len(order),
        names=Names(names_of(folder, order).values()),
        ignored=ignored,
    )


def open_unlabeled(folder: Path) -> FilesSource | None:
    """Opens all images below a folder, at any depth, as one class; None without an image."""
    walk = Walk(folder)
    files = sorted(walk.files())
    if not files:
        return None
    labels = np.zeros(len(files), np.int64)
    return FilesSource(folder, files, labels, num_classes=1, ignored=dict(walk.ignored))


def _walk(folder: Path) -> _Found:
    walk = Walk(folder)
    people: dict[str, list[str]] = {}
    loose = []
    before, files = "", loose
    for file in walk.files():
        name, slash, rest = file.partition("/")
        if not slash:
            loose.append(name)
            continue
        if name != before:  # a folder's files are consecutive
            before, files = name, people.setdefault(name, [])
        files.append(rest)
    for files in people.values():
        files.sort()
    return _Found(people, loose, dict(walk.ignored))


def check_level(folder: Path | str, people: Mapping[str, Sequence[str]]) -> None:
    """Refuses a folder if it is ambiguous which level of sub-folders is the identities.

    Folders of sessions or years are few and recur for many people; people's folders are many.

    Raises:
      DataError: hardly any image is at the first level, and the second level has more folders.
    """
    deep = [file for files in people.values() for file in files if "/" in file]
    direct = sum(map(len, people.values())) - len(deep)
    second = {file.partition("/")[0] for file in deep}
    if len(second) > len(people) and direct <= _STRAY * len(deep):
        group, file = min((g, file) for g, files in people.items() for file in files if "/" in file)
        person = file.partition("/")[0]
        raise DataError(
            f"{folder}: the images are two folders deep, as {group}/{file}: is the "
            f"identity {group} ({len(people)} of them) or {person} ({len(second)})? Give "
            "--data.identity-level 1 or 2"
        )


def _deeper(folder: Path, found: _Found, level: int) -> dict[str, list[str]]:
    """Returns the images by identity, `level` folders down; images higher up count as loose."""
    people: dict[str, list[str]] = {}
    for group, files in found.people.items():
        for file in files:
            parts = f"{group}/{file}".split("/", level)
            if len(parts) > level:
                people.setdefault("/".join(parts[:level]), []).append(parts[level])
            else:
                found.loose.append(file)
    if not people:
        raise DataError(f"{folder} has no image {level} folders deep: give a lower identity level")
    return people


def names_of(folder: Path, order: Sequence[str]) -> dict[int, str]:
    """Returns the identities' names by number: the folders' names, or those in the table.

    `data pack --format folder` names folders by seven-digit numbers, and writes the identities'
    names into the table.

    Args:
      folder: folder of the identities' folders.
      order: the sorted names of these folders.
    """
    if not all(len(name) == 7 and name.isdecimal() for name in order):
        return dict(enumerate(order))
    table = identities.read_sparse(folder)
    return {int(name): table.get(int(name), name) for name in order}
