"""Pairs of images in a folder, named by a list: LFW's `pairs.txt`, or CSV lines of two paths."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.data import images
from arcface_jax.errors import DataError

SUFFIXES = (".txt", ".csv")
_SAME = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_SHOWN = 5


class Pair(NamedTuple):
    """A line of a list."""

    line: int
    """Of the list, from 1."""
    left: Path
    right: Path
    same: bool


def split(target: str, *, base: Path = Path()) -> tuple[Path, Path] | None:
    """The list and the folder of `LIST:FOLDER` or `LIST`; None where it is no list.

    Args:
      target: a `.txt` or `.csv` file; without a folder its images lie beside it.
      base: the folder in which to look for what is not found as it is named.

    Raises:
      DataError: there is no such list.
    """
    name, colon, folder = target.rpartition(":")
    if not (colon and name.endswith(SUFFIXES)):
        name, folder = target, ""
    path = Path(name) if Path(name).is_file() else base / name
    if path.suffix not in SUFFIXES:
        return None
    if not path.is_file():
        raise DataError(f"no list of pairs at {path}: name an existing file")
    if not folder:
        return path, path.parent
    return path, Path(folder) if Path(folder).is_dir() else base / folder


def listed(path: Path, folder: Path) -> list[Pair]:
    """Reads a list; the order is the list's, which decides the folds.

    `.txt` is LFW's form (http://vis-www.cs.umass.edu/lfw/README.txt): lines of `name n m`, images
    n and m of one person, and `name n other m`, of two. Image 7 of a person is the file
    `FOLDER/name/name_0007.jpg`, or with another suffix of images. A first line `folds n` or `n`
    announces folds x n pairs of either kind, or n.

    `.csv` has lines of `path,path,same`, where same is 1, true or yes, or 0, false or no;
    paths are absolute or relative to the folder. A first line of other words is a heading.

    Args:
      path: the list.
      folder: where the images lie.

    Returns:
      the pairs, whose files exist.

    Raises:
      DataError: naming the lines that are not of that form, or the files that are missing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list of pairs {path}: {error}") from error
    pairs = list(_csv(text, path, folder) if path.suffix == ".csv" else _lfw(text, path, folder))
    if not pairs:
        raise DataError(f"{path} names no pair: give one a line, {_FORMS[path.suffix]}")
    files = {file: None for pair in pairs for file in (pair.left, pair.right)}
    _check_files(files, pairs, path)
    return pairs


def read(path: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a list (`listed`) and the images that it names.

    Returns:
      images (2 n, 112, 112, 3) uint8 RGB, of which 2 i and 2 i + 1 are pair i; same (n,) bool.
      Images of another size are cut to their middle square and resized.

    Raises:
      DataError: as `listed`, or naming an image that cannot be read.
    """
    pairs = listed(path, folder)
    files = {file: None for pair in pairs for file in (pair.left, pair.right)}
    squares = {file: images.square(file.read_bytes(), where=str(file)) for file in files}
    return (
        np.stack([squares[file] for pair in pairs for file in (pair.left, pair.right)]),
        np.array([pair.same for pair in pairs]),
    )


_FORMS = {
    ".txt": "`name n m` for images n and m of one person, `name n other m` for two people",
    ".csv": "`path,path,same` with same 1 or 0",
}


def _lfw(text: str, path: Path, folder: Path) -> Iterator[Pair]:
    announced, counts = None, {True: 0, False: 0}
    for number, line in enumerate(text.splitlines(), start=1):
        words = [word.strip() for word in (line.split("\t") if "\t" in line else line.split())]
        if not any(words):
            continue
        if announced is None and not any(counts.values()) and len(words) <= 2:
            announced = _announced(words)
            if announced is not None:
                continue
        match words:
            case [name, first, second] if first.isdecimal() and second.isdecimal():
                left, right = (name, first), (name, second)
            case [name, first, other, second] if first.isdecimal() and second.isdecimal():
                left, right = (name, first), (other, second)
            case _:
                raise _not_a_pair(path, number, line)
        same = len(words) == 3
        counts[same] += 1
        yield Pair(number, _image(folder, *left), _image(folder, *right), same)
    if announced is not None and set(counts.values()) != {announced}:
        raise DataError(
            f"{path}: its first line announces {announced} pairs of either kind, and it has "
            f"{counts[True]} of one person and {counts[False]} of two: it was cut short or "
            "edited; take it whole, or take its first line away"
        )


def _announced(words: list[str]) -> int | None:
    """Pairs of either kind by LFW's first line, `folds n` or `n`; None where it is none."""
    if not all(word.isdecimal() for word in words):
        return None
    return int(np.prod([int(word) for word in words]))


def _image(folder: Path, name: str, number: str) -> Path:
    stem = folder / name / f"{name}_{int(number):04d}"
    return images.find_named(stem) or stem.with_name(f"{stem.name}.jpg")


def _csv(text: str, path: Path, folder: Path) -> Iterator[Pair]:
    for number, cells in enumerate(csv.reader(text.splitlines()), start=1):
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        known = len(cells) == 3 and cells[2].lower() in _SAME
        if number == 1 and len(cells) == 3 and not known and not (folder / cells[0]).is_file():
            continue  # a heading
        if not known or not all(cells):
            raise _not_a_pair(path, number, ",".join(cells))
        yield Pair(number, folder / cells[0], folder / cells[1], _SAME[cells[2].lower()])


def _not_a_pair(path: Path, number: int, line: str) -> DataError:
    return DataError(
        f"{path}, line {number}: {line.strip()[:80]!r} is not a pair; a line should be "
        f"{_FORMS[path.suffix]}"
    )


def _check_files(files: dict[Path, None], pairs: list[Pair], path: Path) -> None:
    missing = {file for file in files if not file.is_file()}
    if not missing:
        return
    named = [
        f"{file} (line {pair.line})"
        for pair in pairs
        for file in (pair.left, pair.right)
        if file in missing
    ]
    more = f", and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    raise DataError(
        f"{path} names {len(missing)} of {len(files)} images that do not exist: "
        f"{', '.join(named[:_SHOWN])}{more}; where they lie elsewhere, say so behind a colon: "
        f"--targets {path}:FOLDER (--evaluation.targets in training)"
    )
