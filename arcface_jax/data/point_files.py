"""Read the five points of many faces from a file, in any common format.

- lines `path,x1,y1, ... ,x5,y5`, separated by commas, semicolons or tabs, with or without a header
- lines `path x1 y1 ... x5 y5`, separated by blanks, such as IJB's `name_5pts_score.txt`
- `.json`: an object of `"path": [[x, y], ... five]`

Words after the ten numbers of a line are ignored unless the caller reads them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.data import tables
from arcface_jax.data.faces import POINT_NAMES, TEMPLATE
from arcface_jax.errors import DataError
from arcface_jax.runtime import foreign

_NUMBERS = TEMPLATE.size


class Row(NamedTuple):
    """One face, as written in the file."""

    number: int
    """Number of the line, or of the JSON object's entry, from 1."""
    where: str
    """The file and the place in it, for error messages."""
    name: str
    """The image's path."""
    words: Sequence[object]
    """The words after the path."""


def rows(path: Path) -> Iterator[Row]:
    """Yields the faces of a file, before their numbers are parsed.

    Raises:
      DataError: the file does not exist, or is not text or JSON.
    """
    if not foreign.is_file(path):
        raise DataError(f"no list of points at {path}: name an existing file")
    try:
        text = tables.read_text(path) if path.suffix == ".json" else ""
        table = tables.read(path) if path.suffix != ".json" else None
    except DataError as error:
        raise DataError(f"cannot read the list of points {path}: {error}") from error
    if table is None:
        yield from _json(path, text)
        return
    for place, row in enumerate(table.rows):
        cells = row.cells if table.separated else row.cells[0].split()
        heading = table.separated and place == 0 and len(cells) > 1 and not _real(cells[1])
        if not heading:
            yield Row(row.line, f"{path}, line {row.line}", cells[0], cells[1:])


def by_name(path: Path) -> dict[str, np.ndarray]:
    """Returns (n, 5, 2) float64 by image: the faces of each, in the order of the file.

    Raises:
      DataError: the file has another format; the message names the line.
    """
    points: dict[str, list[np.ndarray]] = {}
    for row in rows(path):
        try:
            points.setdefault(row.name, []).append(parse(row.words[:_NUMBERS]))
        except DataError as error:
            raise DataError(f"{row.where}, {row.name}: {error}") from error
    return {name: np.stack(found) for name, found in points.items()}


def one_by_name(path: Path) -> dict[str, np.ndarray]:
    """Returns (5, 2) float64 by image, for files with one face per image; of several, the last.

    Raises:
      DataError: as `by_name`.
    """
    return {name: found[-1] for name, found in by_name(path).items()}


def parse(words: Sequence[object]) -> np.ndarray:
    """Parses ten numbers x1 y1 ... x5 y5, or five pairs, to (5, 2) float64.

    Raises:
      DataError: they are not ten numbers.
    """
    try:
        return np.array(words, np.float64).reshape(TEMPLATE.shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"{' '.join(map(_short, words))[:80]!r} are not five points, the ten numbers x1 y1 x2 "
            f"y2 x3 y3 x4 y4 x5 y5: {', '.join(POINT_NAMES)}"
        ) from error


def _json(path: Path, text: str) -> Iterator[Row]:
    try:
        content = foreign.parse_json(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold an object of path: [[x, y], ... five points]")
    for number, (name, points) in enumerate(content.items(), start=1):
        words = points if isinstance(points, list) else [points]
        yield Row(number, f"{path}, entry {number}", name, words)


def _short(word: object) -> str:
    return "a number of thousands of digits" if _is_long(word) else str(word)[:80]


def _is_long(word: object) -> bool:
    return isinstance(word, int) and word.bit_length() > 1000


def _real(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
