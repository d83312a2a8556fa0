"""Training sets of image files: a folder for each identity, or a list of paths and labels."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from arcface_jax.data.images import is_image
from arcface_jax.data.source import Sample, Source, whole_label
from arcface_jax.errors import DataError, ImageError
from arcface_jax.runtime.sealed import array_digest

LIST_SUFFIXES = frozenset((".csv", ".tsv", ".txt", ".lst"))
_PATH_COLUMNS = ("path", "file", "filename", "image")
_LABEL_COLUMNS = ("label", "identity", "id", "name", "person")


class FilesSource(Source):
    """Image files with labels.

    Args:
      folder: what the names are relative to.
      names: path of each image.
      labels: (n,) identities.
      num_classes: how many there are.
    """

    def __init__(self, folder: Path, names: Sequence[str], labels: np.ndarray, *, num_classes: int):
        self._folder = folder
        # One array instead of millions of strings: quick to send to other processes.
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._names = b"".join(encoded)
        self._labels = labels.astype(np.int32)
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> Sample:
        """The file's bytes and its label.

        Raises:
          ImageError: the file cannot be read.
        """
        path = self._path(index)
        try:
            return Sample(path.read_bytes(), int(self._labels[index]))
        except OSError as error:
            raise ImageError(
                str(path),
                f"cannot be read ({error.strerror}): restore the file, or take it off the list",
            ) from error

    def labels(self) -> np.ndarray:
        """(len,) int32."""
        return self._labels

    def where(self, index: int) -> str:
        """The file's path."""
        return str(self._path(index))

    def facts(self) -> Mapping[str, int | str]:
        """Digests of the images' names, relative to the set's folder, and of the labels."""
        names = np.frombuffer(self._names, np.uint8)
        return {
            "form": "image files",
            "file names": array_digest(names) + array_digest(self._ends),
            "labels": array_digest(self._labels),
        }

    def _path(self, index: int) -> Path:
        begin = self._ends[index - 1] if index else 0
        return self._folder / os.fsdecode(self._names[begin : self._ends[index]])


def has_identity_folders(folder: Path) -> bool:
    """Whether a sub-folder holds images."""
    with os.scandir(folder) as entries:
        return any(next(_images(entry.path), None) for entry in entries if entry.is_dir())


def open_folder(folder: Path) -> FilesSource:
    """One folder for each identity; identities and images in the order of their names.

    Raises:
      DataError: no sub-folder holds an image.
    """
    people = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    images = [(name, sorted(_images(folder / name))) for name in people]
    images = [(name, files) for name, files in images if files]
    if not images:
        raise DataError(f"{folder} has no sub-folder with images: make one for each identity")
    labels = np.repeat(np.arange(len(images)), [len(files) for _, files in images])
    paths = [f"{name}/{file}" for name, files in images for file in files]
    return FilesSource(folder, paths, labels, num_classes=len(images))


def _images(folder: str | Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_image(entry.name):
                yield entry.name


def open_list(path: Path) -> FilesSource:
    """A text file of paths and labels, separated by commas, tabs or spaces.

    With a header line the columns are found by name (path, label). Without one a line is `path,
    label`, or, as MXNet's im2rec makes them, `number, label, ..., path`. Paths are relative to the
    list's folder. Labels that are all whole numbers are taken as they are; else they are names,
    numbered in alphabetical order.

    Raises:
      DataError: the file is no such list; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error}") from error
    rows = [(number, row) for number, row in enumerate(_rows(lines), start=1) if row]
    if not rows:
        raise DataError(f"{path} is empty: it should have a line 'path,label' for each image")
    width, (path_column, label_column), header = len(rows[0][1]), *_columns(path, rows[0][1])
    names, labels = [], []
    for number, row in rows[header:]:
        # im2rec allows any number of labels; the path is what comes last.
        if len(row) != width and not (path_column == -1 and len(row) > 2):
            raise DataError(
                f"{path}, line {number}: {len(row)} columns where the first line has {width}: "
                "quote names that contain the separator"
            )
        names.append(row[path_column])
        labels.append(row[label_column])
    numbers, count = _numbered(labels, path, first_line=1 + header)
    return FilesSource(path.parent, names, numbers, num_classes=count)


def _rows(lines: list[str]) -> Iterator[list[str]]:
    first = next((line for line in lines if line.strip()), "")
    for separator in ("\t", ","):
        if separator in first:
            yield from csv.reader(lines, delimiter=separator, skipinitialspace=True)
            return
    # Spaces: the label is the last word, and the path may have some itself.
    yield from ([word.strip() for word in line.rsplit(None, 1)] for line in lines)


def _columns(path: Path, first: list[str]) -> tuple[tuple[int, int], int]:
    """The columns of path and label, and how many header lines there are."""
    words = [word.strip().lower() for word in first]
    named = [
        next((words.index(name) for name in names if name in words), None)
        for names in (_PATH_COLUMNS, _LABEL_COLUMNS)
    ]
    if named[0] is not None and named[1] is not None:
        return (named[0], named[1]), 1
    if len(first) >= 3 and _is_number(first[0]) and _is_number(first[1]):
        return (-1, 1), 0
    if len(first) == 2:
        return (0, 1), 0
    raise DataError(
        f"{path}: the first line {','.join(first)!r} is neither 'path,label' nor 'number,label,"
        "path' nor a header with the names path and label"
    )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _numbered(labels: list[str], path: Path, *, first_line: int) -> tuple[np.ndarray, int]:
    """Identities of the labels, and how many there are."""
    if all(map(_is_number, labels)):
        numbers = np.array([float(label) for label in labels])
        bad = np.flatnonzero(~((numbers >= 0) & (numbers < 2**31) & (numbers % 1 == 0)))
        if bad.size:
            whole_label(float(numbers[bad[0]]), where=f"{path}, line {bad[0] + first_line}")
        return numbers.astype(np.int32), int(numbers.max(initial=-1)) + 1
    names, numbers = np.unique(np.array(labels), return_inverse=True)
    return numbers, len(names)
