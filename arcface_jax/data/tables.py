"""Read text files of rows: detect encoding, separator, comments and quotes.

For lists of images and of pairs, written with spreadsheets, scripts or by hand.
"""

import codecs
import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from arcface_jax.errors import DataError
from arcface_jax.runtime import foreign

_SAMPLE = 50  # rows from which a table's format is detected
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROL = re.compile("[\0-\x08\x0e-\x1f]")


class Row(NamedTuple):
    """A line that is neither blank nor a comment."""

    line: int
    """Line number in the file, from 1."""
    cells: list[str]


class Table(NamedTuple):
    """The rows of a file."""

    rows: list[Row]
    comments: int
    """Number of lines that start with # and were skipped."""
    separated: bool
    """Whether tabs, commas or semicolons separate cells; otherwise blanks do, also within paths."""


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8 or UTF-16, with or without byte order mark, or in Latin-1.

    Raises:
      DataError: the file cannot be read, or is not text.
    """
    try:
        data = foreign.read(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    try:
        text = data.decode(_encoding(data))
    except UnicodeDecodeError as error:
        raise _not_text(path, str(error)) from error
    if data and not text:
        raise _not_text(path, "a byte order mark, and nothing else")
    if found := _CONTROL.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise _not_text(path, f"line {line} has the control character {found[0]!r}")
    return text


def _not_text(path: Path, why: str) -> DataError:
    return DataError(f"{path} is not text in UTF-8, UTF-16 or Latin-1 ({why}): export it as UTF-8")


def _encoding(data: bytes) -> str:
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    sample = data[:4096]
    if b"\0" in sample:  # in English text, half of UTF-16's bytes are zero
        low, high = sample[0::2].count(0), sample[1::2].count(0)
        return "utf-16-be" if low > high else "utf-16-le"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        # Windows' code page has letters where Latin-1 has control characters.
        return "cp1252" if _decodes(data, "cp1252") else "latin-1"
    return "utf-8"


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def read(path: Path) -> Table:
    """Reads the rows of a file, with blanks around cells removed.

    The separator is a tab, comma, semicolon or blank, whichever the first lines agree on. Cells may
    be quoted. Blank lines, comments (#) and columns that are empty at the end of all rows are
    dropped. A row separated by blanks is a single cell, which `blank_separated` divides.

    Raises:
      DataError: the file is not text, or a quote is not closed.
    """
    # Only at line ends: names may contain other characters at which splitlines divides.
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    kept = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    content = [(number, line) for number, line in kept if not line.lstrip().startswith("#")]
    if not content:  # all labels look like #1, or there are only comments
        content = kept if any("," in line or "\t" in line for _, line in kept) else []
    separator = _separator([line.strip() for _, line in content[:_SAMPLE]])
    if separator is None:
        rows = [Row(number, [line.strip()]) for number, line in content]
    else:
        rows = list(_split(content, separator, path))
    return Table(_without_empty_ends(rows), len(kept) - len(content), separator is not None)


def _separator(lines: Sequence[str]) -> str | None:
    """Returns the first of tab, comma and semicolon in the first line and half of all lines."""
    for separator in ("\t", ",", ";"):
        counts = Counter(line.count(separator) for line in lines)
        if lines and lines[0].count(separator) and counts[0] <= 0.5 * len(lines):
            return separator
    return None


def _split(lines: Sequence[tuple[int, str]], separator: str, path: Path) -> Iterator[Row]:
    reader = csv.reader((line for _, line in lines), delimiter=separator, skipinitialspace=True)
    before = 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {lines[before][0]}: {error}") from error
        if cells is None:
            return
        if reader.line_num > before + 1:
            raise DataError(
                f"{path}, line {lines[before][0]}: a quote is not closed on this line: double "
                "a quote that belongs to a name, or remove it"
            )
        yield Row(lines[before][0], [_bare(cell) for cell in cells])
        before = reader.line_num


def _bare(cell: str) -> str:
    cell = cell.strip()
    single = len(cell) > 1 and cell[0] == cell[-1] == "'"
    return cell[1:-1] if single else cell


def _without_empty_ends(rows: list[Row]) -> list[Row]:
    """Drops empty last cells if all rows have them, as trailing separators produce."""
    while rows and all(len(row.cells) > 1 and not row.cells[-1] for row in rows):
        rows = [Row(row.line, row.cells[:-1]) for row in rows]
    return rows


def blank_separated(rows: Sequence[Row], most: int, *, from_right: bool) -> list[Row]:
    """Divides rows of a single cell at blanks.

    Args:
      rows: rows from `read`, if the table is not separated.
      most: largest number of divisions, counted from one end; -1 for all.
      from_right: whether to count from the right.
    """
    return [
        Row(
            row.line,
            row.cells[0].rsplit(None, most) if from_right else row.cells[0].split(None, most),
        )
        for row in rows
    ]


def sample(rows: Sequence[Row]) -> Sequence[Row]:
    """Returns rows from all over a table, to detect its format."""
    step = max(1, len(rows) // _SAMPLE)
    return rows[::step][:_SAMPLE]


def native(path: str) -> str:
    """Returns a path with the separators of this system: Windows' backslashes become slashes."""
    return path.replace("\\", "/")
