"""Files of `data clean`: findings as CSV with a `decision` column, and clean.json about them.

Reviewers only edit `decision`. Extra columns are ignored.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arcface_jax.errors import DataError
from arcface_jax.runtime import foreign, sealed
from arcface_jax.runtime.files import atomic, write_atomic
from arcface_jax.runtime.text import cells

DUPLICATES = "duplicates.csv"
MIXED = "mixed.csv"
IMAGES = "images.csv"
OVERLAP = "overlap.csv"
MERGE = "merge.csv"
ISSUES = "label_issues.csv"
ABOUT = "clean.json"

COLUMNS: Mapping[str, tuple[str, ...]] = {
    DUPLICATES: (
        *("label_a", "label_b", "images_a", "images_b", "score", "mutual", "same_photo"),
        *("group", "decision"),
    ),
    MIXED: (*("label", "images_a", "images_b", "within", "cross", "score", "decision"),),
    IMAGES: ("index", "path", "given_label", "suggested_label", "own", "other", "decision"),
    ISSUES: ("index", "is_label_issue", "label_quality", "given_label", "predicted_label"),
    OVERLAP: (
        *("set", "index", "path", "label_a", "index_a", "path_a", "score", "same_photo"),
        "decision",
    ),
    MERGE: ("label_a", "label_b", "score", "decision"),
}
"""Columns of each file; label_issues.csv has cleanlab's columns."""
DECISIONS: Mapping[str, tuple[str, ...]] = {
    DUPLICATES: ("merge", "drop", "keep", "review"),
    MIXED: ("drop", "keep", "review"),
    IMAGES: ("drop", "relabel", "keep", "review"),
    OVERLAP: ("drop", "keep", "review"),
    MERGE: ("merge", "keep", "review"),
}
"""Values of `decision` in each file; `review` is undecided and changes nothing."""
Row = dict[str, str]


def write(folder: Path, name: str, rows: Iterable[Sequence[object]]) -> Path:
    """Writes a CSV of `COLUMNS`; floats get four decimals.

    Args:
      folder: output folder.
      name: name of the file.
      rows: the cells of each line.
    """
    with atomic(folder / name, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS[name])
        writer.writerows(cells(map(_cell, row)) for row in rows)
    return folder / name


def _cell(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.4f}"
    return value


def read(path: Path, name: str) -> list[Row]:
    """Reads the rows of a CSV, by column.

    Args:
      path: path of the file, which may have any name.
      name: its key in `COLUMNS`.

    Raises:
      DataError: the file does not exist, a column is missing, or a decision is unknown.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), list(reader.fieldnames or ())
    except FileNotFoundError:
        raise DataError(f"{path} not found: run `data clean` or `data overlap` first") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path} ({error}): save it as CSV in UTF-8") from error
    missing = [column for column in COLUMNS[name] if column not in header]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}: expected {', '.join(COLUMNS[name])}, "
            "separated by commas"
        )
    for line, row in enumerate(rows, start=2):
        row["decision"] = (row["decision"] or "").strip().lower()
        if row["decision"] not in DECISIONS[name]:
            raise DataError(
                f"{path}, line {line}: decision {row['decision']!r} is not one of "
                f"{', '.join(DECISIONS[name])}"
            )
    return rows


def number(path: Path, row: Row, column: str, *, below: int) -> int:
    """Parses a cell with a label or an image number.

    Args:
      path: path of the file, for the message.
      row: the line.
      column: column of the cell.
      below: number of labels or images.

    Raises:
      DataError: it is not a number in the range.
    """
    text = row[column] or ""  # None in a row that is too short
    if not (text.isascii() and text.isdecimal() and int(text) < below):
        raise DataError(
            f"{path}: {column} {text!r} is not a whole number from 0 to {below - 1}: restore the "
            "column, and edit only `decision`"
        )
    return int(text)


def write_about(folder: Path, content: Mapping[str, Any], *, files: Sequence[Path]) -> Path:
    """Writes clean.json with the checksum of each file.

    Args:
      folder: output folder.
      content: plain JSON.
      files: the CSVs.
    """
    checksums = {path.name: sealed.file_digest(path) for path in files}
    text = json.dumps({**content, "checksums": checksums}, indent=2) + "\n"
    write_atomic(folder / ABOUT, text)
    return folder / ABOUT


def read_about(folder: Path) -> dict[str, Any]:
    """Reads what `write_about` wrote.

    Raises:
      DataError: the file is missing or damaged.
    """
    path = folder / ABOUT
    try:
        content = foreign.parse_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{folder} holds no {ABOUT}: name the output of `data clean`") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} ({error}): run `data clean` again") from error
    if not isinstance(content, dict) or "data" not in content:
        raise DataError(f"{path} is not of `data clean`: run it again")
    return content
