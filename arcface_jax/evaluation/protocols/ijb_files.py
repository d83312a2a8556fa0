"""The files of IJB-B and IJB-C, in the folders and formats that insightface's tools read.

FOLDER/loose_crop holds the images and FOLDER/meta, with P for `ijbb` or `ijbc`:

    P_name_5pts_score.txt       file x1 y1 x2 y2 x3 y3 x4 y4 x5 y5 detector_score
    P_face_tid_mid.txt          file template media
    P_template_pair_label.txt template template 0|1 P_1N_gallery_G1.csv, P_1N_gallery_G2.csv (IJB-B:
    S1 and S2), P_1N_probe_mixed.csv TEMPLATE_ID,SUBJECT_ID,... with a header

The first two describe the same images in the same order. The csv files are for identification and
may be missing together.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.config.choices import IjbProtocol
from arcface_jax.data import point_files, tables
from arcface_jax.errors import DataError

GALLERIES: dict[IjbProtocol, tuple[str, str]] = {"ijbb": ("S1", "S2"), "ijbc": ("G1", "G2")}
IMAGES = "loose_crop"
META = "meta"


class Enrolled(NamedTuple):
    """Templates and the person that each shows: a gallery, or the probes."""

    name: str
    """Name: `G1`, `probe_mixed` and so on."""
    templates: np.ndarray
    """(t,) int64, ascending."""
    subjects: np.ndarray
    """(t,) int64."""


class IjbSet(NamedTuple):
    """Contents of the files: n images, T templates and p pairs."""

    name: IjbProtocol
    images: tuple[Path, ...]
    landmarks: np.ndarray
    """(n, 5, 2) float32: x and y in pixels of eyes, nose and mouth corners."""
    detector: np.ndarray
    """(n,) float32: the detector's score of each face."""
    templates: np.ndarray
    """(n,) int64: the template of each image."""
    media: np.ndarray
    """(n,) int64: the photo or video of each image; frames of a video share it."""
    first: np.ndarray
    """(p,) int64: first template of each pair."""
    second: np.ndarray
    """(p,) int64: second template of each pair."""
    same: np.ndarray
    """(p,) bool: whether a pair shows one person."""
    galleries: tuple[Enrolled, ...]
    """Two galleries; empty if the folder has no files for identification."""
    probes: Enrolled | None


def read(folder: Path, protocol: IjbProtocol) -> IjbSet:
    """Reads all of meta/; whether the images exist is noticed only when they are read.

    Raises:
      DataError: a file is missing, or a line is not as expected; the error names file and line.
    """
    meta = folder / META
    points_file = meta / f"{protocol}_name_5pts_score.txt"
    template_file = meta / f"{protocol}_face_tid_mid.txt"
    pair_file = meta / f"{protocol}_template_pair_label.txt"
    for path in (points_file, template_file, pair_file):
        _check_there(path, folder)
    names, landmarks, detector = _read_points(points_file)
    templates, media = _read_templates(template_file, names)
    first, second, same = _read_pairs(pair_file)
    known = np.unique(templates)
    for column in (first, second):
        _check_known(column, known, pair_file, template_file)
    galleries, probes = _read_enrolled(meta, protocol, known=known, template_file=template_file)
    images = tuple(folder / IMAGES / name for name in names)
    return IjbSet(
        name=protocol,
        images=images,
        landmarks=landmarks,
        detector=detector,
        templates=templates,
        media=media,
        first=first,
        second=second,
        same=same,
        galleries=galleries,
        probes=probes,
    )


def _check_there(path: Path, folder: Path) -> None:
    if path.is_file():
        return
    near = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
    raise DataError(
        f"{path} is missing (in that folder: {', '.join(near[:6]) or 'nothing'}): give the folder "
        f"that holds {META}/ and {IMAGES}/, here {folder}, and the protocol that its files are "
        "named after, ijbb or ijbc"
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines with their numbers from 1, without empty ones.

    Raises:
      DataError: the file is not text.
    """
    text = tables.read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _fields(path: Path, number: int, line: str, *, expected: str) -> list[str]:
    fields = line.split()
    if len(fields) != len(expected.split()):
        raise _malformed(path, number, line, expected)
    return fields


def _malformed(path: Path, number: int, line: str, expected: str) -> DataError:
    shown = line.strip()[:80]
    return DataError(
        f"{path}, line {number}: {shown!r} is not `{expected}`; fix the line, or fetch the file "
        "again"
    )


def _read_points(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    expected = "file x1 y1 x2 y2 x3 y3 x4 y4 x5 y5 score"
    names, numbers = [], []
    for row in point_files.rows(path):
        line = " ".join(map(str, (row.name, *row.words)))
        try:
            points, (score,) = point_files.parse(row.words[:10]), row.words[10:]
            values = np.array([*points.ravel(), float(str(score))], np.float32)
        except (DataError, ValueError):
            raise _malformed(path, row.number, line, expected) from None
        if not np.isfinite(values).all():
            raise _malformed(path, row.number, line, expected + ", all finite")
        names.append(row.name)
        numbers.append(values)
    if not names:
        raise DataError(f"{path} is empty: fetch it again")
    table = np.stack(numbers)
    return names, table[:, :10].reshape(-1, 5, 2), table[:, 10]


def _read_templates(path: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    expected = "file template media"
    rows = []
    for number, line in _lines(path):
        name, *values = _fields(path, number, line, expected=expected)
        try:
            rows.append([_number(value) for value in values])
        except ValueError:
            raise _malformed(path, number, line, expected) from None
        if len(rows) <= len(names) and name != names[len(rows) - 1]:
            raise DataError(
                f"{path}, line {number}: {name} is where the file with the landmarks has "
                f"{names[len(rows) - 1]}; both must list the same images in the same order"
            )
    if len(rows) != len(names):
        raise DataError(
            f"{path} lists {len(rows)} images, the file with the landmarks {len(names)}; both must "
            "list the same images in the same order"
        )
    table = np.array(rows, np.int64)
    return table[:, 0], table[:, 1]


def _read_pairs(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads millions of lines in C; reads them one by one only to locate an error."""
    if not path.stat().st_size:
        raise DataError(f"{path} is empty: fetch it again")
    try:
        table = np.loadtxt(path, np.int64, ndmin=2, comments=None)
    except ValueError as error:
        raise _first_wrong_pair(path) or DataError(f"{path}: {error}") from None
    if table.shape[1] != 3 or not np.isin(table[:, 2], (0, 1)).all():
        raise _first_wrong_pair(path) or DataError(f"{path}: {table.shape[1]} columns, not 3")
    return table[:, 0], table[:, 1], table[:, 2] == 1


def _first_wrong_pair(path: Path) -> DataError | None:
    expected = "template template 0|1"
    for number, line in _lines(path):
        fields = line.split()
        if len(fields) != 3 or not _whole(fields) or fields[2] not in ("0", "1"):
            return _malformed(path, number, line, expected)
    return None


def _number(text: str) -> int:
    """Parses an int64.

    Raises:
      ValueError: it is not one.
    """
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{text} does not fit into 64 bits")
    return value


def _whole(fields: Iterable[str]) -> bool:
    return all(field.removeprefix("-").isdecimal() for field in fields)


def _check_known(wanted: np.ndarray, known: np.ndarray, path: Path, template_file: Path) -> None:
    wrong = np.flatnonzero(~np.isin(wanted, known))
    if len(wrong):
        template = wanted[wrong[0]]
        line = _first_line(path, lambda fields: str(template) in fields)
        raise DataError(
            f"{path}, line {line}: template {template} has no image in {template_file.name}; "
            f"the two files belong to different releases, or one is truncated"
        )


def _first_line(path: Path, holds: Callable[[list[str]], bool]) -> int:
    return next(n for n, line in _lines(path) if holds(line.replace(",", " ").split()))


def _read_enrolled(
    meta: Path, protocol: IjbProtocol, *, known: np.ndarray, template_file: Path
) -> tuple[tuple[Enrolled, ...], Enrolled | None]:
    names = [f"gallery_{gallery}" for gallery in GALLERIES[protocol]] + ["probe_mixed"]
    paths = [meta / f"{protocol}_1N_{name}.csv" for name in names]
    there = [path for path in paths if path.is_file()]
    if not there:
        return (), None
    if len(there) < len(paths):
        missing = ", ".join(path.name for path in paths if path not in there)
        raise DataError(
            f"{meta}: identification needs {len(paths)} csv files, and {missing} is missing; "
            f"add it, or remove the others to verify pairs only"
        )
    read = [
        _read_csv(path, name.removeprefix("gallery_"))
        for path, name in zip(paths, names, strict=True)
    ]
    for path, enrolled in zip(paths, read, strict=True):
        _check_known(enrolled.templates, known, path, template_file)
    return tuple(read[:-1]), read[-1]


def _read_csv(path: Path, name: str) -> Enrolled:
    """Reads the first two columns; a template has a line for each of its images."""
    expected = "TEMPLATE_ID,SUBJECT_ID,..."
    subject_of: dict[int, int] = {}
    for number, line in _lines(path):
        fields = [field.strip() for field in line.split(",")][:2]
        if number == 1:
            if len(fields) < 2 or _whole(fields):
                raise _malformed(path, number, line, f"the heading {expected}")
            continue
        if len(fields) < 2 or not _whole(fields):
            raise _malformed(path, number, line, expected)
        try:
            template, subject = _number(fields[0]), _number(fields[1])
        except ValueError:
            raise _malformed(path, number, line, expected) from None
        if subject_of.setdefault(template, subject) != subject:
            raise DataError(
                f"{path}, line {number}: template {template} shows subject {subject} here and "
                f"{subject_of[template]} above; a template is of one person"
            )
    if not subject_of:
        raise DataError(f"{path} lists no templates: fetch it again")
    templates = np.array(sorted(subject_of), np.int64)
    return Enrolled(name, templates, np.array([subject_of[t] for t in templates.tolist()]))
