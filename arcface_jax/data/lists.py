"""Training sets named by a list: find the columns of path and identity, and the header.

Columns are found by content: the path exists as a file, or looks like one; several images share an
identity. If two columns could be the identity, there is no guess but an error.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from arcface_jax.data import names, tables
from arcface_jax.data.files import FilesSource
from arcface_jax.data.images import is_image
from arcface_jax.data.tables import Row
from arcface_jax.errors import DataError

SUFFIXES = frozenset((".csv", ".tsv", ".txt", ".lst"))

STRONG = (
    *("label", "labels", "identity", "identity_id", "class", "class_id", "classid", "person"),
    *("person_id", "personid", "subject", "subject_id", "target", "identity_name", "class_name"),
)
"""Trusted headers of the identity's column."""
_WEAK = ("id", "name", "person_name", "subject_name", "y")  # these may also number images
PATHS = ("path", "file", "filename", "image", "image_path", "img_path", "img", "filepath")
"""Headers of the path's column."""


class _Columns(NamedTuple):
    path: int
    label: int
    header: bool
    """Whether the first row names the columns."""


class Listed(NamedTuple):
    """The rows of a list."""

    files: list[str]
    """Paths as written in the list, with slashes or backslashes."""
    labels: list[str]
    lines: list[int]
    """Line numbers in the list, from 1."""
    header: list[str]
    """The header's cells; empty without a header."""
    columns: tuple[int, int]
    """Columns of path and label, from 0."""
    width: int
    """Number of columns in the first row."""
    comments: int

    def number(self, path: Path) -> names.Numbered:
        """Numbers the labels as identities, with the names in the table of a packed list.

        Args:
          path: path of the list, for messages.

        Raises:
          ImageError: naming the line of an invalid label.
        """
        table = table_of(path)
        numbered = names.number(
            self.labels,
            where=lambda i: f"{path}, line {self.lines[i]}",
            count=names.declared(path.parent, file=table),
        )
        if numbered.names is None:
            return names.with_table(numbered, path.parent, file=table)
        return numbered


def table_of(path: Path) -> str:
    """Returns the name of the table of a list's identities, which `data pack` writes next to it."""
    return f"{path.name}.{names.FILE}"


def open_list(path: Path, *, columns: str = "") -> FilesSource:
    """Opens a text file with the path and the identity of each image.

    Separators, encodings, quotes and comments: as `tables.read`. Paths are relative to the list's
    folder, with slashes or backslashes. Labels are numbers or names by the rule of `names`. A first
    line without a path is a header.

    Args:
      path: path of the list.
      columns: "path=COLUMN,label=COLUMN", each a header's name or a number from 1; columns that are
        not given are found by content.

    Raises:
      DataError: the file is not such a list, or its columns are ambiguous; the message names the
          line.
    """
    folder = path.parent
    listed = read_list(path, columns=columns, exists=lambda name: _exists(folder, name))
    numbered = listed.number(path)
    return FilesSource(
        folder,
        _native(listed.files, folder),
        numbered.labels,
        num_classes=numbered.num_classes,
        names=numbered.names,
        ignored={"comment lines": listed.comments} if listed.comments else {},
        notes=_notes(listed, numbered),
    )


def read_list(path: Path, *, columns: str, exists: Callable[[str], bool]) -> Listed:
    """Reads the rows of a list of images and identities, as in `open_list`.

    Args:
      path: path of the list.
      columns: as in `open_list`.
      exists: returns whether a cell names an image.

    Raises:
      DataError: the file is not such a list, or its columns are ambiguous; the message names the
          line.
    """
    table = tables.read(path)
    if not table.rows:
        raise DataError(f"{path} is empty: it should have a line 'path,label' for each image")
    chosen = parse_columns(columns)
    rows = table.rows if table.separated else _divided(table.rows, exists)
    found = _find(path, rows, chosen, exists)
    data = rows[found.header :]
    if not data:
        raise DataError(f"{path} has a header and no image: add a line 'path,label' for each")
    _check_widths(path, rows, data, found)
    files = [row.cells[found.path] for row in data]
    blank = next((row for row, file in zip(data, files, strict=True) if not file), None)
    if blank is not None:
        raise DataError(f"{path}, line {blank.line}: has no path: write it, or drop the line")
    width = len(data[0].cells)
    return Listed(
        files,
        [row.cells[found.label] for row in data],
        [row.line for row in data],
        rows[0].cells if found.header else [],
        (found.path % width, found.label % width),
        width,
        table.comments,
    )


def parse_columns(columns: str) -> dict[str, str]:
    """Returns the requested columns by "path" and "label"; `data.columns` was already checked."""
    pairs = (part.partition("=") for part in columns.split(",") if part)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _divided(rows: list[Row], exists: Callable[[str], bool]) -> list[Row]:
    """Splits rows at blanks so that files exist, because paths may contain blanks too."""
    if not any(len(row.cells[0].split(None, 1)) > 1 for row in rows):
        return rows
    label_last = tables.blank_separated(rows, 1, from_right=True)
    label_first = tables.blank_separated(rows, 1, from_right=False)
    every = tables.blank_separated(rows, -1, from_right=False)
    counts = Counter(len(row.cells) for row in tables.sample(every))
    width = counts.most_common(1)[0][0]
    options = [(label_last, [0]), (label_first, [1])]
    if counts[width] > 1 and width > 2:
        options.append((every, list(range(width))))
    ranked = [(_share(divided, places, exists), divided) for divided, places in options]
    best = max(share for share, _ in ranked)
    return next(divided for share, divided in ranked if share == best) if best else label_last


def _share(rows: Sequence[Row], places: Sequence[int], exists: Callable[[str], bool]) -> float:
    """Returns the share of a sample that has a file in the best of some columns."""
    part = tables.sample(rows)
    return max(
        sum(len(row.cells) > place and exists(row.cells[place]) for row in part) for place in places
    ) / len(part)


def _exists(folder: Path, name: str) -> bool:
    if not name or "\0" in name:
        return False
    try:
        return (folder / name).is_file() or (
            "\\" in name and (folder / tables.native(name)).is_file()
        )
    except OSError:  # a name too long for a file
        return False


def _find(
    path: Path, rows: Sequence[Row], chosen: dict[str, str], exists: Callable[[str], bool]
) -> _Columns:
    """Finds the columns of path and identity, and whether there is a header."""
    first, rest = rows[0], rows[1:]
    words = [cell.lower() for cell in first.cells]
    part = tables.sample(rest or rows)
    width = max(len(row.cells) for row in part)
    asked = {what: _asked(path, what, name, first) for what, name in chosen.items()}
    at = asked["path"][0] if "path" in asked else _path_column(part, words, width, exists)
    place = at if at >= 0 else len(first.cells) + at
    named = any(by_name for _, by_name in asked.values())
    cell = first.cells[place] if place < len(first.cells) else ""
    known = any(word in PATHS for word in words) and any(word in STRONG + _WEAK for word in words)
    header = named or known or (bool(rest) and _is_heading(cell, exists))
    data = rows[header:]
    if not data:
        return _Columns(at, (place + 1) % max(2, len(words)), header)
    if "label" in asked:
        return _Columns(at, asked["label"][0], header)
    return _label_column(path, data, place, words if header else [])


def _asked(path: Path, what: str, name: str, first: Row) -> tuple[int, bool]:
    """Returns the column that --data.columns names, and whether it named it by the header."""
    if name in first.cells:
        return first.cells.index(name), True
    lower = [cell.lower() for cell in first.cells]
    if name.lower() in lower:
        return lower.index(name.lower()), True
    if name.isdecimal() and 0 < int(name) <= len(first.cells):
        return int(name) - 1, False
    raise DataError(
        f"{path} has no column {name!r} for {what}: it has {', '.join(first.cells)}; name one, or "
        f"give its number, 1 to {len(first.cells)}"
    )


def _path_column(
    part: Sequence[Row], words: Sequence[str], width: int, exists: Callable[[str], bool]
) -> int:
    """Returns the column with most existing files, or with most paths of images."""

    def rank(column: int) -> tuple[float, float, bool]:
        cells = [row.cells[column] for row in part if column < len(row.cells)]
        exist = sum(map(exists, cells))
        looks = sum(_looks_like_a_path(cell) for cell in cells)
        return exist, looks, column < len(words) and words[column] in PATHS

    ranks = {column: rank(column) for column in range(width)}
    best = max(ranks, key=lambda column: ranks[column])
    lasts = [row.cells[-1] for row in part]
    # im2rec allows any number of labels; the path comes last.
    ragged = len({len(row.cells) for row in part}) > 1
    if ragged and all(map(_looks_like_a_path, lasts)):
        return -1
    if not any(ranks[best]):
        # Neither files nor suffixes: in a list of two columns the path comes first.
        best = next((words.index(name) for name in PATHS if name in words), 0)
    return best


def _looks_like_a_path(cell: str) -> bool:
    return is_image(cell) or "/" in cell or "\\" in cell


def _is_heading(cell: str, exists: Callable[[str], bool]) -> bool:
    """Returns whether the first row is a header: a plain word where other rows have a path."""
    return not (_looks_like_a_path(cell) or exists(cell) or cell == "")


def _label_column(path: Path, data: Sequence[Row], place: int, header: Sequence[str]) -> _Columns:
    """Finds the identity's column; the path's is `place`.

    Raises:
      DataError: several columns could be the identity, or none.
    """
    width = len(data[0].cells)
    ragged = any(len(row.cells) != width for row in data)
    at = -1 if ragged and place == width - 1 else place
    others = [column for column in range(width) if column != place]
    if len(others) == 1:
        return _Columns(at, others[0], bool(header))
    if not others:
        raise _unclear(path, data[0], header, [])
    _refuse_pairs(path, data, [place, *others], header)
    if header:
        strong = [header.index(word) for word in STRONG if word in header]
        for column in strong:
            if column in others and (_shared(data, column) or len(data) <= 2):
                return _Columns(at, column, True)
    elif place == width - 1 and all(_is_number(data[0].cells[column]) for column in (0, 1)):
        return _Columns(-1, 1, False)  # im2rec: number, label, ..., path
    elif place == 1 and len(_different(data, 0)) <= 2 and _shared(data, 2):
        return _Columns(at, 2, False)  # insightface: aligned, path, label, ...
    candidates = [column for column in others if _shared(data, column)]
    if len(candidates) > 1:
        candidates = _apart(data, candidates)
    if len(candidates) == 1:
        return _Columns(at, candidates[0], bool(header))
    raise _unclear(path, data[0], header, candidates or others)


def _refuse_pairs(
    path: Path, data: Sequence[Row], columns: Sequence[int], header: Sequence[str]
) -> None:
    """Refuses a list of pairs: two columns of images, and none named as a label.

    Raises:
      DataError: it is a list of pairs.
    """
    part = tables.sample(data)
    width = min(len(row.cells) for row in part)
    images = [
        column
        for column in columns
        if column < width and all(is_image(row.cells[column]) for row in part)
    ]
    if len(images) > 1 and not set(header) & set(STRONG):
        raise DataError(
            f"{path} has two columns of images, as a list of pairs: verify on it with "
            f"--evaluation.targets {path}:FOLDER (--targets of `arcface-jax evaluate`), or name "
            "the columns of a training set with --data.columns path=1,label=2"
        )


def _different(data: Sequence[Row], column: int) -> set[str]:
    return {row.cells[column] for row in data if column < len(row.cells)}


def _shared(data: Sequence[Row], column: int) -> bool:
    """Returns whether a column has several values, some of which several images share."""
    return 1 < len(_different(data, column)) < len(data)


def _apart(data: Sequence[Row], candidates: list[int]) -> list[int]:
    """Drops columns that divide the images like an earlier one, such as number and name."""
    first = candidates[0]
    kept = [first]
    for column in candidates[1:]:
        # A row that is too short is reported afterwards, with its line.
        rows = [row.cells for row in data if len(row.cells) > max(first, column)]
        pairs = {(cells[first], cells[column]) for cells in rows}
        alike = len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        kept += [] if alike else [column]
    return kept


def _unclear(path: Path, first: Row, header: Sequence[str], candidates: Sequence[int]) -> DataError:
    shown = ",".join(first.cells)
    if not header:
        return DataError(
            f"{path}: the first line {shown!r} is neither 'path,label' nor 'number,label,path' nor "
            "a header with the names path and label: name the columns by their number, for "
            "instance --data.columns path=1,label=2"
        )
    # Rows may have more columns than the header, which are then named by number.
    words = [header[c] if c < len(header) else str(c + 1) for c in candidates]
    return DataError(
        f"{path}: which column is the identity ({' or '.join(words) or 'none'})? Its header is "
        f"{','.join(header)}: name it with --data.columns label={words[-1] if words else 'COLUMN'}"
    )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _check_widths(path: Path, rows: Sequence[Row], data: Sequence[Row], found: _Columns) -> None:
    width = len(rows[0].cells)
    for row in data:
        # im2rec allows any number of labels; the path comes last.
        if len(row.cells) != width and not (found.path == -1 and len(row.cells) > 2):
            raise DataError(
                f"{path}, line {row.line}: {len(row.cells)} columns, but the first line has "
                f"{width}: quote names that contain the separator, and give every image a label"
            )


def _native(files: list[str], folder: Path) -> list[str]:
    """Converts paths to this system's form; file names on it may contain backslashes."""
    if os.sep == "\\" or not any("\\" in file for file in files):
        return files
    return [
        tables.native(file) if "\\" in file and not (folder / file).is_file() else file
        for file in files
    ]


def _notes(listed: Listed, numbered: names.Numbered) -> list[str]:
    """Notes how ambiguous parts of the list were interpreted."""
    notes = []
    if listed.header or listed.width > 2:
        path, label = (
            listed.header[column] if listed.header else str(1 + column) for column in listed.columns
        )
        notes.append(f"columns: path={path}, label={label} (--data.columns names others)")
    if numbered.num_classes == len(listed.files) > 20:
        notes.append(
            "warning: every image has a label of its own: is this column the identity? "
            "--data.columns label=COLUMN names another"
        )
    return notes
