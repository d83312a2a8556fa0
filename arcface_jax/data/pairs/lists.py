"""Pairs of images in a folder, listed in a file: LFW's `pairs.txt`, or lines of two paths."""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.data import images, tables
from arcface_jax.data.aligner import Aligner
from arcface_jax.data.pairs import flags
from arcface_jax.data.pairs.bins import Listing, PairSet, check_reuse
from arcface_jax.data.source import by_kind
from arcface_jax.data.tables import Row
from arcface_jax.errors import DataError
from arcface_jax.runtime import foreign

SUFFIXES = (".txt", ".csv", ".tsv", ".lst")
_SHOWN = 5
_DIGITS = 10  # most digits of a count; longer ones are words
_FOLDS = 10


class Pair(NamedTuple):
    """A line of a list."""

    line: int
    """Line number in the list, from 1."""
    left: Path
    right: Path
    same: bool


class Listed(NamedTuple):
    """A list of pairs, and an account of its lines."""

    pairs: list[Pair]
    lines: int
    """Number of lines that are not blank."""
    comments: int
    headings: int

    def ignored(self) -> dict[str, int]:
        """Number of lines that are not pairs, by kind."""
        kinds = {"comment lines": self.comments, "headings": self.headings}
        return {kind: count for kind, count in kinds.items() if count}

    def files(self) -> list[Path]:
        """Returns the distinct images, in the order of the list."""
        return list(dict.fromkeys(file for x in self.pairs for file in (x.left, x.right)))

    def account(self, name: str) -> str:
        """Summarizes the use of the list's lines in one line."""
        same = sum(pair.same for pair in self.pairs)
        images, ignored = len(self.files()), self.ignored()
        return (
            f"{name}: {self.lines:,} lines: {len(self.pairs):,} pairs ({same:,} of one person) of "
            f"{images:,} images used, {sum(ignored.values()):,} ignored{by_kind(ignored)}"
        )


def split(target: str, *, base: Path = Path()) -> tuple[Path, Path] | None:
    """Splits `LIST:FOLDER` or `LIST` into list and folder; returns None if it is not a list.

    Args:
      target: a `.txt`, `.csv`, `.tsv` or `.lst` file; without a folder, its images are next to it.
      base: folder in which to look for paths that do not exist as given.

    Raises:
      DataError: the list does not exist.
    """
    name, colon, folder = target.rpartition(":")
    if not (colon and name.lower().endswith(SUFFIXES)):
        name, folder = target, ""
    path = Path(name) if Path(name).is_file() else base / name
    if path.suffix.lower() not in SUFFIXES:
        return None
    if not path.is_file():
        raise DataError(f"no list of pairs at {path}: name an existing file")
    if not folder:
        return path, path.parent
    return path, Path(folder) if Path(folder).is_dir() else base / folder


def listed(path: Path, folder: Path) -> Listed:
    """Reads a list of pairs in the list's order, which determines the folds.

    The format is detected by content, with any separator and encoding that `tables` reads:

    - LFW's (http://vis-www.cs.umass.edu/lfw/README.txt), which RFW and XQLFW have too: lines of
      `name n m`, images n and m of one person, and `name n other m`, of two. Image 7 of a person
      is the file `FOLDER/name/name_0007.jpg`, or with another suffix of images. A first line
      `folds n` or `n` announces folds x n pairs of either kind, or n.
    - two paths and whether they show one person, in any order and with further columns: an index,
      a fold, a name. The flag is one of `flags.parse`.
    - a name and two files, `name file file`, of one person, and `name file other file`, of two.
    - CPLFW's and CALFW's: two lines a pair, each `file flag`, where any flag but 0 is one person.
      All pairs of one person come first there, and are put into ten folds with the others.

    Paths are absolute or relative to the folder. A first line of other words is a header.

    Args:
      path: the list.
      folder: folder of the images.

    Returns:
      The pairs, whose files exist, and the number of other lines.

    Raises:
      DataError: naming the lines with another format, or the missing files.
    """
    try:
        table = tables.read(path)
    except DataError as error:
        raise DataError(f"cannot read the list of pairs {path}: {error}") from error
    rows = table.rows
    if not table.separated:
        rows = tables.blank_separated(rows, -1, from_right=False)
    rows = [Row(row.line, _without_blank_end(row.cells)) for row in rows]
    pairs = list(_pairs(rows, path, folder))
    if not pairs:
        raise DataError(f"{path} names no pair: give one a line, {_FORMS}")
    # Two lines of CPLFW make a pair, and the first pair starts on line 1.
    used = {pair.line for pair in pairs}
    found = Listed(pairs, len(rows) + table.comments, table.comments, int(rows[0].line not in used))
    _check_files(found.files(), pairs, path)
    return found


def read(path: Path, folder: Path, *, aligner: Aligner | None = None) -> PairSet:
    """Reads a list (`listed`) and its images.

    Args:
      path: the list.
      folder: folder of the images.
      aligner: aligns images of another size than 112 x 112; by default they are refused.
        Sub-folders of `folder` count as identities' folders.

    Raises:
      DataError: as `listed` and `Aligner`, or naming an image that cannot be read.
    """
    found = listed(path, folder)
    files = found.files()
    size = sum(file.stat().st_size for file in files)
    check_reuse(2 * len(found.pairs), len(files), size=size, where=str(path))
    align = aligner or Aligner()
    faces = {file: align(file, in_identity_folder=file.parent != folder) for file in files}
    return PairSet(
        path.stem,
        np.stack([faces[file] for pair in found.pairs for file in (pair.left, pair.right)]),
        np.array([pair.same for pair in found.pairs]),
        Listing(found.account(path.name), len(faces), found.ignored()),
    )


_FORMS = (
    "`name n m` for images n and m of one person, `name n other m` for two people, or "
    "`path,path,same` with same 1 or 0"
)


def _without_blank_end(cells: list[str]) -> list[str]:
    while len(cells) > 1 and not cells[-1]:
        cells = cells[:-1]
    return cells


def _pairs(rows: list[Row], path: Path, folder: Path) -> Iterator[Pair]:
    """Yields the pairs, in the format of most rows."""
    if not rows:
        return iter(())
    part = tables.sample(rows)
    forms = (_is_lfw, _is_half, lambda row: _is_named(row, folder))
    counts = [sum(map(form, part)) for form in forms]
    if 2 * counts[0] >= len(part):
        return _lfw(rows, path, folder)
    if 2 * counts[1] > len(part):
        return _two_lines(rows, path, folder)
    if 2 * counts[2] > len(part):
        return _named_files(rows, path, folder)
    return _paths(rows, path, folder)


def _is_lfw(row: Row) -> bool:
    cells = row.cells
    if len(cells) == 3:
        return _counts(cells[1]) and _counts(cells[2]) and not images.is_image(cells[0])
    return len(cells) == 4 and _counts(cells[1]) and _counts(cells[3])


def _counts(word: str) -> bool:
    return word.isdecimal() and len(word) < _DIGITS


def _lfw(rows: list[Row], path: Path, folder: Path) -> Iterator[Pair]:
    announced = _announced(rows[0].cells)
    heading = announced is not None or not _is_lfw(rows[0])
    # Spreadsheets have column names; a first line with numbers is meant to be a pair.
    if announced is None and heading and any(cell.isdecimal() for cell in rows[0].cells):
        heading = False
    counts = {True: 0, False: 0}
    for row in rows[heading:]:
        if not _is_lfw(row):
            raise _not_a_pair(path, row)
        name, first, *others = row.cells
        other, second = (name, *others)[-2:]
        same = len(row.cells) == 3
        counts[same] += 1
        yield Pair(row.line, _image(folder, name, first), _image(folder, other, second), same)
    if announced is not None and set(counts.values()) != {announced}:
        raise DataError(
            f"{path}: its first line announces {announced} pairs of either kind, and it has "
            f"{counts[True]} of one person and {counts[False]} of two: it was truncated or "
            f"edited; use the whole list, or remove its first line"
        )


def _announced(words: list[str]) -> int | None:
    """Returns the pairs of either kind by LFW's first line, `folds n` or `n`; None otherwise."""
    if len(words) > 2 or not all(word.isdecimal() and len(word) < _DIGITS for word in words):
        return None
    return math.prod(map(int, words))


def _image(folder: Path, name: str, number: str) -> Path:
    stem = folder / name / f"{name}_{int(number):04d}"
    return images.find_named(stem) or stem.with_name(f"{stem.name}.jpg")


def _is_half(row: Row) -> bool:
    """Returns whether it is `file flag` or `flag file`, half of a pair."""
    return len(row.cells) == 2 and sum(map(images.is_image, row.cells)) == 1


def _two_lines(rows: list[Row], path: Path, folder: Path) -> Iterator[Pair]:
    heading = not _is_half(rows[0])
    halves = rows[heading:]
    place = 0 if images.is_image(halves[0].cells[0]) else 1
    for row in halves:
        if not _is_half(row) or not _counts(row.cells[1 - place].lstrip("+-")):
            raise _not_a_pair(path, row)
    if len(halves) % 2:
        raise DataError(
            f"{path}, line {halves[-1].line}: {len(halves)} lines of one image; two lines make "
            f"a pair, and the last line has no partner: the list was truncated"
        )
    pairs = []
    below = functools.cache(functools.partial(_below, folder))
    for first, second in zip(halves[::2], halves[1::2], strict=True):
        left, right = (below(row.cells[place]) for row in (first, second))
        same, other = (int(row.cells[1 - place]) > 0 for row in (first, second))
        if same != other:
            raise DataError(
                f"{path}, lines {first.line} and {second.line}: a pair of two lines with two "
                "answers: the lines before it are not all in twos"
            )
        pairs.append(Pair(first.line, left, right, same))
    return iter(_in_folds(pairs))


def _in_folds(pairs: list[Pair]) -> list[Pair]:
    """Deals a list that has all pairs of one person first into ten balanced folds."""
    half, odd = divmod(len(pairs), 2)
    first = [pair.same for pair in pairs[:half]]
    if odd or half % _FOLDS or not all(first) or any(pair.same for pair in pairs[half:]):
        return pairs
    size = half // _FOLDS
    starts = [at for fold in range(_FOLDS) for at in (fold * size, half + fold * size)]
    return [pair for at in starts for pair in pairs[at : at + size]]


def _is_named(row: Row, folder: Path) -> bool:
    """Returns whether it is `name file file` or `name file other file`, with existing files."""
    return 3 <= len(row.cells) <= 4 and _files_of(row, folder) is not None


def _files_of(row: Row, folder: Path) -> tuple[Path, Path] | None:
    """Returns the files of a row of names and files; None if missing, or for another format."""
    cells = row.cells
    if len(cells) == 4:
        named = ((cells[0], cells[1]), (cells[2], cells[3]))
    else:
        named = ((cells[0], cells[1]), (cells[0], cells[2]))
    if any(flags.parse(name) is not None for name, _ in named):
        return None
    found = [
        next((file for file in (folder / name / at, folder / at) if foreign.is_file(file)), None)
        for name, at in ((name, tables.native(at)) for name, at in named)
    ]
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _named_files(rows: list[Row], path: Path, folder: Path) -> Iterator[Pair]:
    for number, row in enumerate(rows):
        files = _files_of(row, folder) if 3 <= len(row.cells) <= 4 else None
        if files is None and number == 0 and not any(map(images.is_image, row.cells)):
            continue  # a header
        if files is None:
            raise _not_a_pair(path, row)
        yield Pair(row.line, *files, len(row.cells) == 3)


class _Layout(NamedTuple):
    left: int
    right: int
    same: int


def _paths(rows: list[Row], path: Path, folder: Path) -> Iterator[Pair]:
    """Yields the pairs of rows with two paths and a flag."""
    layout, heading = _layout(rows, folder)
    if layout is None:
        others = [cell for cell in rows[0].cells if cell.lower() not in _HEADINGS]
        if len(rows) == 1 and not any(_means_something(cell) for cell in others):
            return  # a header, not a pair
        raise _not_a_pair(path, rows[0])
    below = functools.cache(functools.partial(_below, folder))  # images occur in many pairs
    for row in rows[heading:]:
        cells = row.cells
        same = flags.parse(cells[layout.same]) if len(cells) > max(layout) else None
        if same is None or not all(cells[place] for place in layout):
            raise _not_a_pair(path, row)
        left, right = (below(cells[place]) for place in (layout.left, layout.right))
        yield Pair(row.line, left, right, same)


def _means_something(cell: str) -> bool:
    return images.is_image(cell) or flags.parse(cell) is not None


def _layout(rows: list[Row], folder: Path) -> tuple[_Layout | None, bool]:
    """Finds the columns of the paths and the flag, and whether the first row is a header."""
    rest = rows[1:] or rows
    layout = _columns(rest, folder, heading=rows[0].cells)
    if layout is None and len(rows) > 1:  # a list of one pair, in its first line
        layout = _columns(rows, folder, heading=[])
    if layout is None or len(rows[0].cells) <= max(layout):
        return layout, False
    first = rows[0].cells
    flag, names = first[layout.same], (first[layout.left], first[layout.right])
    answered = flags.parse(flag) is not None and flag.lower() not in _HEADINGS
    return layout, not (answered or any(_looks_like_a_path(folder, name) for name in names))


def _columns(rows: Sequence[Row], folder: Path, *, heading: Sequence[str]) -> _Layout | None:
    width = max(len(row.cells) for row in rows)
    part = tables.sample(rows)
    paths, same = [], []
    for column in range(width):
        cells = [row.cells[column] for row in part if column < len(row.cells)]
        if any(_looks_like_a_path(folder, cell) for cell in cells):
            paths.append(column)
        elif sum(flags.parse(cell) is not None for cell in cells) >= len(cells) / 2:
            same.append(column)
    if len(paths) != 2 or not same:
        return None
    if len(same) > 1:
        same = _flag_among(rows, same, heading)
    return _Layout(paths[0], paths[1], same[0]) if len(same) == 1 else None


def _flag_among(rows: Sequence[Row], columns: list[int], heading: Sequence[str]) -> list[int]:
    """Finds the flag among columns of zeros and ones: by the header, or because it has both values.

    A running number also starts with these, but has other numbers in later rows.
    """
    named = [
        column
        for column in columns
        if column < len(heading) and heading[column].lower() in _HEADINGS
    ]
    if len(named) == 1:
        return named

    def values(column: int) -> set[bool | None]:
        return {flags.parse(row.cells[column]) for row in rows if column < len(row.cells)}

    every = {column: values(column) for column in columns}
    columns = [column for column in columns if None not in every[column]] or columns
    return [column for column in columns if every[column] == {True, False}] or columns


_HEADINGS = ("same", "issame", "is_same", "label", "match", "is_match", "y", "target", "actual")


def _looks_like_a_path(folder: Path, cell: str) -> bool:
    # A folder whose name is a number is not an image.
    return images.is_image(cell) or (bool(cell) and foreign.is_file(_below(folder, cell)))


def _below(folder: Path, name: str) -> Path:
    path = folder / name
    return path if "\\" not in name or foreign.is_file(path) else folder / tables.native(name)


def _not_a_pair(path: Path, row: Row) -> DataError:
    line = (" " if path.suffix == ".txt" else ",").join(row.cells)
    return DataError(
        f"{path}, line {row.line}: {line[:80]!r} is not a pair; a line should be {_FORMS}"
    )


def _check_files(files: Sequence[Path], pairs: list[Pair], path: Path) -> None:
    missing = {file for file in files if not foreign.is_file(file)}
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
        f"{', '.join(named[:_SHOWN])}{more}; if the images are elsewhere, append the folder: "
        f"--evaluation.targets {path}:FOLDER"
    )
