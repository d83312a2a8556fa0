"""Identities' names: decide whether labels are numbers or names, and map one to the other.

The rule: labels are numbers if all of them are plain decimal digits without leading zeros ("0",
"17", and "17.0" as im2rec writes it) and nearly dense: the largest is below twice the number of
different labels plus ten, or all are below the number of identities that the set declares.
Otherwise they are names, and identities are numbered in the names'
order: alphabetical, or by value if all are digits. A few numbers far beyond otherwise dense ones
are an error that names the line, and so is a blank label.

The table is stored next to the set in `identities.txt`, with a line `number<TAB>name` for each.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.errors import DataError, ImageError
from arcface_jax.runtime import foreign
from arcface_jax.runtime.files import write_atomic

FILE = "identities.txt"
"""File next to a training set with the name of each identity."""

_PLAIN = re.compile(r"(0|[1-9][0-9]*)(\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf)", re.I)
_LEADING_ZEROS = re.compile(r"0[0-9]+")
_SPARSE, _SLACK = 2, 10  # the largest label is below _SPARSE x (different labels) + _SLACK
_DIGITS = 19  # digits of a number below 2^63
_FEW = 0.2  # up to this share of labels far beyond the others are mistakes
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class Names:
    """The names of identities 0 .. n - 1.

    Stored as one array of bytes, so that millions are sent to another process at once.
    """

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._bytes = b"".join(encoded)

    @classmethod
    def from_arrays(cls, text: np.ndarray, ends: np.ndarray) -> "Names":
        """Returns the names that `arrays` returned."""
        names = cls(())
        names._bytes, names._ends = text.tobytes(), np.asarray(ends)
        return names

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns all names concatenated as uint8, and where each ends, (n,) int64."""
        return np.frombuffer(self._bytes, np.uint8), self._ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, label: int) -> str:
        begin = self._ends[label - 1] if label else 0
        return os.fsdecode(self._bytes[begin : self._ends[label]])

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


class Numbered(NamedTuple):
    """Labels as identities."""

    labels: np.ndarray
    """(n,) int32; -1 for an invalid label."""
    num_classes: int
    """Number of identities: labels are 0 .. num_classes - 1, or -1."""
    names: Names | None
    """Names of the identities; None if the labels are numbers."""


def number(labels: Sequence[str], *, where: Callable[[int], str], count: int = 0) -> Numbered:
    """Numbers text labels as identities, by the rule of this module.

    Args:
      labels: (n,) label of each image.
      where: describes a label's line, given its index, for messages.
      count: number of identities that the set declares; 0 if it declares none. Labels that are all
        below it are numbers, however sparse.

    Raises:
      ImageError: naming the line of a label that is blank, invalid, or far beyond the others.

    Examples:
      >>> number(["3", "0", "0"], where=str).labels.tolist()
      [3, 0, 0]
      >>> named = number(["grace", "ada", "ada"], where=str)
      >>> named.labels.tolist(), list(named.names or ())
      ([1, 0, 0], ['ada', 'grace'])
    """
    different = dict.fromkeys(labels)
    if "" in different:
        raise ImageError(where(labels.index("")), "has no label: write the identity, or drop it")
    if not all(map(_NUMBER.fullmatch, different)) or any(map(_LEADING_ZEROS.fullmatch, different)):
        return _named(labels, sorted(different))
    wrong = next((label for label in different if not _PLAIN.fullmatch(label)), None)
    if wrong is not None:
        raise ImageError(
            where(labels.index(wrong)),
            f"label {float(wrong)} is not an identity: labels are whole numbers from 0, or names",
        )
    digits = {label: label.partition(".")[0] for label in different}
    if max(map(len, digits.values())) > _DIGITS:
        return _named(labels, sorted(different, key=lambda label: (len(digits[label]), label)))
    value = {label: int(text) for label, text in digits.items()}
    largest = max(value.values())
    declared = count if largest < count else 0
    dense = declared or (largest < 2**62 and _dense(value.values(), labels, value, where))
    if not dense:
        return _named(labels, sorted(different, key=value.__getitem__))
    numbers = np.fromiter(map(value.__getitem__, labels), np.int64, len(labels))
    return Numbered(numbers.astype(np.int32), declared or largest + 1, None)


def number_integers(values: np.ndarray, *, where: Callable[[int], str], count: int = 0) -> Numbered:
    """Numbers integer labels as identities, by the rule of this module.

    Args:
      values: (n,) int64 label of each image; negative for none.
      where: describes an image's place, given its number, for messages.
      count: as in `number`.

    Raises:
      ImageError: naming a label that is far beyond the others.
    """
    if values.max(initial=-1) < count:
        return Numbered(values.astype(np.int32), count, None)
    known = values >= 0
    different = np.unique(values[known])
    far = _far(different)
    if far is None:
        return Numbered(values.astype(np.int32), int(values.max(initial=-1)) + 1, None)
    if far.size:
        place = int(np.flatnonzero(values == far[0])[0])
        raise _far_beyond(where(place), int(far[0]), len(different))
    labels = np.where(known, np.searchsorted(different, values), -1)
    return Numbered(labels.astype(np.int32), len(different), Names(map(str, different.tolist())))


def _dense(
    values: Iterable[int], labels: Sequence[str], value: Mapping[str, int], where: Callable
) -> bool:
    different = np.unique(np.fromiter(values, np.int64))
    far = _far(different)
    if far is not None and far.size:
        place = next(i for i, label in enumerate(labels) if value[label] == far[0])
        raise _far_beyond(where(place), int(far[0]), len(different))
    return far is None


def _far(different: np.ndarray) -> np.ndarray | None:
    """Returns which of ascending numbers are mistakes: none in a sparse set; None if all are
    dense.
    """
    # Number k in ascending order fits if it could be the largest of a dense set.
    fits = different < _SPARSE * np.arange(1, len(different) + 1) + _SLACK
    if not len(different) or fits[-1]:
        return None
    dense = int(np.flatnonzero(fits)[-1]) + 1 if fits.any() else 0
    few = len(different) - dense <= _FEW * len(different)
    return different[dense:] if few else different[:0]


def _far_beyond(where: str, label: int, count: int) -> ImageError:
    return ImageError(
        where,
        f"label {label} is far beyond the others ({count:,} different labels): it would make "
        f"{label + 1:,} classes; correct it, or give all identities names",
    )


def _named(labels: Sequence[str], names: list[str]) -> Numbered:
    place = {name: number for number, name in enumerate(names)}
    numbers = np.fromiter(map(place.__getitem__, labels), np.int32, len(labels))
    return Numbered(numbers, len(names), Names(names))


def name_of(names: Names | None, label: int) -> str:
    """Returns an identity's name, or its number if it has no name."""
    return str(label) if names is None else names[label]


def joined(parts: Sequence[tuple[Names | None, int]]) -> Names | None:
    """Concatenates the names of several sets; a name that occurs twice gets the set's number.

    Args:
      parts: for each set, its names and its number of identities.
    """
    if all(names is None for names, _ in parts):
        return None
    every = [[name_of(names, label) for label in range(count)] for names, count in parts]
    seen = Counter(name for part in every for name in set(part))
    return Names(
        name if seen[name] == 1 else f"{number}:{name}"
        for number, part in enumerate(every, start=1)
        for name in part
    )


def write(folder: Path, names: Iterable[str] | Mapping[int, str], *, file: str = FILE) -> Path:
    """Writes the table next to a set, and returns the file.

    Args:
      folder: folder of the set.
      names: names of identities 0, 1, ..., or by number.
      file: the table's name.
    """
    table = str.maketrans(_ESCAPES)
    pairs = names.items() if isinstance(names, Mapping) else enumerate(names)
    lines = (f"{label}\t{name.translate(table)}\n" for label, name in pairs)
    # A name that is not UTF-8, as folders may have, keeps its bytes.
    content = "".join(lines).encode("utf-8", "surrogateescape")
    write_atomic(folder / file, content)
    return folder / file


def read(folder: Path, *, count: int, file: str = FILE) -> Names | None:
    """Reads the table next to a set; None if there is none, or if it only repeats the numbers.

    A file of this name that is not such a table is skipped, with a note on stderr.

    Args:
      folder: folder of the set.
      count: count of its identities.
      file: the table's name.
    """
    path = folder / file
    if not path.is_file():
        return None
    return _complete(read_sparse(folder, file=file), count=count, path=path)


def _complete(table: Mapping[int, str], *, count: int, path: Path) -> Names | None:
    """Returns the names in a table, as `read` does."""
    if table.keys() != set(range(count)):
        print(
            f"note: {path} is not a table of {count} lines 'number<TAB>name' and is not used",
            file=sys.stderr,
        )
        return None
    if all(name == str(label) for label, name in table.items()):
        return None
    return Names(table[label] for label in range(count))


def with_table(found: Numbered, folder: Path, *, file: str = FILE) -> Numbered:
    """Adds the names in a set's table, which may include identities without images.

    Args:
      found: identities without names.
      folder: folder of the set.
      file: the table's name.
    """
    path = folder / file
    if not path.is_file():
        return found
    table = read_sparse(folder, file=file)
    count = max(found.num_classes, len(table))
    names = _complete(table, count=count, path=path)
    return found._replace(num_classes=count, names=names) if names else found


def declared(folder: Path, *, file: str = FILE) -> int:
    """Returns the number of identities in the table next to a set; 0 without a complete one."""
    table = read_sparse(folder, file=file)
    return len(table) if max(table, default=-1) == len(table) - 1 else 0


def read_sparse(folder: Path, *, file: str = FILE) -> dict[int, str]:
    """Reads the table next to a set, by number; empty if there is no valid one."""
    try:
        text = foreign.read(folder / file).decode("utf-8", "surrogateescape")
    except OSError:
        return {}
    back = {escaped[1]: plain for plain, escaped in _ESCAPES.items()}
    table = {}
    for line in text.removesuffix("\n").split("\n"):
        number, tab, name = line.partition("\t")
        if not (tab and _PLAIN.fullmatch(number) and len(number) <= _DIGITS):
            return {}
        table[int(number)] = re.sub(r"\\(.)", lambda found: back.get(found[1], found[1]), name)
    return table


def is_plausible(count: int, images: int) -> bool:
    """Returns whether a number of classes is not far above the number of images."""
    return count <= 10 * images + 10_000


def check_count(count: int, images: int, *, where: str) -> None:
    """Refuses a number of classes far above the number of images: a wrong header or label.

    Raises:
      DataError: naming the place.
    """
    if not is_plausible(count, images):
        raise DataError(
            f"{where}: {count:,} classes for {images:,} images: a header or a label is wrong; "
            "correct it, and write the file again with labels counted from 0"
        )
