"""`data.py align`: align photographs to 112 x 112 by five points from a list or a detector.

OUTPUT gets the faces, `faces.csv` with the measures of each, `rejects.csv` with the rejected
photographs, and a journal, `.align.jsonl`: the settings, then a line for each finished photograph.
A second run into the folder keeps the faces of unchanged photographs, and removes those whose
photographs no longer exist or are now rejected.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from arcface_jax.config.choices import FaceChoice
from arcface_jax.data import detectors, face_measures, point_files
from arcface_jax.data import names as identities
from arcface_jax.data.detectors import Detector, Faces
from arcface_jax.data.faces import TEMPLATE, align, similarity
from arcface_jax.data.files import names_of
from arcface_jax.data.images import (
    IMAGE_SIZE,
    Walk,
    decode_any_size,
    encode,
    encode_jpeg,
    find_below,
    read_file,
)
from arcface_jax.data.tools import reading
from arcface_jax.errors import DataError, ImageError
from arcface_jax.runtime import foreign
from arcface_jax.runtime.files import atomic, below, open_own, write_atomic
from arcface_jax.runtime.text import cells

PointsOf = Callable[[str, np.ndarray], Faces]
"""Finds the faces of an image, given its path relative to the folder and its pixels."""
Format = Literal["jpeg", "png"]
"""Format of the faces' files; PNG is lossless."""

FACES, REJECTS, JOURNAL = "faces.csv", "rejects.csv", ".align.jsonl"
_MEASURES = ("choice", "faces", "score", "x", "y", "size", "blur", "yaw", "pitch", "roll")
_SUFFIXES = {"jpeg": ".jpg", "png": ".png"}


class Aligned(NamedTuple):
    """Contents of an output folder."""

    written: int
    """Number of faces, including earlier runs'."""
    rejected: dict[str, str]
    """Reason for each rejected photograph, by path."""
    report: Path
    """The list of rejects."""
    ignored: dict[str, int]
    """Entries that are not images, by kind."""
    identities: int
    """Number of folders that have a face."""
    kept: int
    """Number of faces kept from an earlier run."""
    removed: int
    """Number of faces removed because their photographs are gone or now rejected."""
    choices: dict[FaceChoice, int]
    """How often each way to choose a face was used."""


class _Done(NamedTuple):
    """A photograph whose face was written."""

    path: str
    """Path relative to the photographs' folder."""
    state: tuple[int, int]
    """Size in bytes and modification time of the photograph."""
    face: str
    """Path relative to the output folder."""
    measures: tuple[Any, ...]
    """Values of the columns in `_MEASURES`."""


class _Job(NamedTuple):
    """Settings by which photographs become faces."""

    folder: Path
    output: Path
    points_of: PointsOf
    choose: FaceChoice
    min_eyes: float
    quality: int
    format: Format

    def settings(self, points: str) -> dict[str, Any]:
        """Returns the settings that determine the faces."""
        return {
            "photographs": str(self.folder.resolve()),
            "points": points,
            "choose": self.choose,
            "min_eyes": self.min_eyes,
            "quality": self.quality if self.format == "jpeg" else 0,
            "format": self.format,
        }

    def make(self, name: str, face_name: str) -> _Done:
        """Aligns one photograph.

        Raises:
          ImageError: the file is not an image, shows no face, or shows a face that is too small.
        """
        state = _state(self.folder / name)
        image = decode_any_size(read_file(self.folder / name), where=name)
        found = self.points_of(name, image)
        inside = "/" in name
        number = detectors.choose(
            found, image.shape, self.choose, where=name, in_identity_folder=inside
        )
        points = found.points[number]
        eyes = float(np.linalg.norm(points[1] - points[0]))
        if eyes < self.min_eyes:
            raise ImageError(
                name, f"the eyes are {eyes:.1f} pixels apart, fewer than {self.min_eyes:g}"
            )
        try:
            face = align(image, points)
        except DataError as error:
            raise ImageError(name, str(error)) from error
        target = below(self.output, face_name)
        png = self.format == "png"
        encoded = encode(face) if png else encode_jpeg(face, quality=self.quality)
        write_atomic(target, encoded, durable=False)
        choice = detectors.resolve(self.choose, in_identity_folder=inside)
        measures = (choice, len(found.points), *_measures(face, points, found.scores[number]))
        return _Done(name, state, face_name, measures)


def align_folder(
    folder: Path,
    output: Path,
    points_of: PointsOf,
    *,
    points: str = "",
    choose: FaceChoice = "auto",
    min_eyes: float = 0.0,
    quality: int = 95,
    format: Format = "jpeg",
    threads: int = 0,
) -> Aligned:
    """Aligns every image under a folder, and keeps the folders' structure.

    Args:
      folder: folder of photographs, in sub-folders or not.
      output: folder for the faces, `faces.csv`, `rejects.csv` and the names of the identities,
        which are the folders that have faces. The same call resumes.
      points_of: finds the five points of an image's faces.
      points: identifies `points_of`, such as a digest of the file it reads; must match to resume.
      choose: which face to take if there are several; `auto` assumes that sub-folders are
        identities.
      min_eyes: smallest distance of the eyes in pixels of the photograph; smaller faces are
          rejected.
      quality: quality of JPEG files.
      format: format of the faces' files.
      threads: 0 for one per processor.

    Raises:
      DataError: there is no image, or the output has faces made with other settings or foreign
        images, or is inside the folder.
    """
    job = _Job(folder, output, points_of, choose, min_eyes, quality, format)
    if output.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{output} is inside {folder}, the folder to align: name another folder")
    ignored: Counter[str] = Counter()
    files = find_below(folder, ignored=ignored)
    targets = _targets([path.relative_to(folder).as_posix() for path in files], format)
    settings = job.settings(points)
    before = _before(output, settings)
    kept = {name: done for name, done in before.items() if _still_good(done, job, targets)}
    todo = [name for name in targets if name not in kept]

    done, rejected = dict(kept), {}
    output.mkdir(parents=True, exist_ok=True)
    with (
        _journal(output, settings, before.values()) as note,
        reading.in_order(
            range(len(todo)),
            lambda number: job.make(todo[number], targets[todo[number]]),
            what="aligning",
            threads=threads,
            done=len(kept),
            total=len(targets),
        ) as looked,
    ):
        for number, found in looked:
            if isinstance(found, ImageError):
                rejected[todo[number]] = found.problem
            else:
                done[found.path] = found
                note(found)
    faces = [done[name] for name in targets if name in done]
    removed = _remove(output, {one.face for one in before.values()} - {one.face for one in faces})
    people = _write_lists(job, faces, rejected, settings)
    choices = Counter(one.measures[0] for one in faces)
    return Aligned(
        len(faces),
        rejected,
        output / REJECTS,
        dict(ignored),
        people,
        kept=len(kept),
        removed=removed,
        choices=dict(choices),
    )


def read_rows(output: Path) -> list[dict[str, str]]:
    """Reads the rows of `faces.csv` by column, one for each face, with unescaped names."""
    lines = (output / JOURNAL).read_text(encoding="utf-8").splitlines()[1:]
    columns = ("path", "face", *_MEASURES)
    return [
        dict(zip(columns, map(str, (one.path, one.face, *one.measures)), strict=True))
        for line in lines
        if (one := _parsed(line))
    ]


def detected(detector: Detector) -> PointsOf:
    """Returns points as found by a detector."""
    return lambda _, image: detector(image)


def listed(path: Path) -> PointsOf:
    """Returns points from a file, in any format of `point_files`.

    Paths are relative to the photographs' folder; one may be listed several times, once for each
    face.

    Raises:
      DataError: the file has another format.
    """
    points = point_files.by_name(path)

    def look_up(name: str, _: np.ndarray) -> Faces:
        if name not in points:
            raise ImageError(name, f"no points in {path.name}")
        return Faces(points[name], np.ones(len(points[name])))

    return look_up


def _targets(names: list[str], format: Format) -> dict[str, str]:
    """Returns the face's file for each photograph, both relative to their folders."""
    suffix = _SUFFIXES[format]
    stems = Counter(os.path.splitext(name)[0] for name in names)

    def target(name: str) -> str:
        stem = os.path.splitext(name)[0]
        return f"{stem if stems[stem] == 1 else name}{suffix}"  # a.png must not overwrite a.jpg

    return {name: target(name) for name in names}


def _measures(face: np.ndarray, points: np.ndarray, score: float) -> tuple[float, ...]:
    """Returns score, center, crop side in pixels of the photograph, blur, yaw, pitch and roll."""
    matrix = similarity(points, TEMPLATE)
    x, y = points.mean(axis=0)
    size = IMAGE_SIZE / float(np.hypot(matrix[0, 0], matrix[1, 0]))
    rounded = (round(float(value), 1) for value in (x, y, size))
    angles = (round(angle, 1) + 0.0 for angle in face_measures.pose(points))  # never -0.0
    return (round(float(score), 4), *rounded, round(face_measures.blur(face), 4), *angles)


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _still_good(done: _Done, job: _Job, targets: Mapping[str, str]) -> bool:
    """Returns whether the photograph is unchanged and its face exists."""
    return (
        targets.get(done.path) == done.face
        and _state(job.folder / done.path) == done.state
        and (job.output / done.face).is_file()
    )


def _before(output: Path, settings: Mapping[str, Any]) -> dict[str, _Done]:
    """Returns what earlier runs did; empty in a new folder.

    Raises:
      DataError: as `align_folder`.
    """
    try:
        lines = (output / JOURNAL).read_text(encoding="utf-8").splitlines()
        stored = foreign.parse_json(lines[0])
    except (FileNotFoundError, IndexError, ValueError):
        other = next(Walk(output).files(), None) if output.is_dir() else None
        if other is None:
            return {}
        raise DataError(
            f"{output} holds images that align did not write, such as {other}: name a new or "
            "empty folder"
        ) from None
    differs = [
        f"{name} was {stored.get(name)!r} and is {value!r}"
        for name, value in settings.items()
        if stored.get(name) != value
    ]
    if differs:
        raise DataError(
            f"{output} was made with other settings: {'; '.join(differs)}; match them to resume, "
            "or name a new folder"
        )
    return {done.path: done for line in lines[1:] if (done := _parsed(line))}


def _parsed(line: str) -> _Done | None:
    """Parses a journal line; None for the last line of a run that was killed while writing it."""
    try:
        path, state, face, measures = foreign.parse_json(line)
        return _Done(path, tuple(state), face, tuple(measures))
    except (ValueError, TypeError):
        return None


@contextmanager
def _journal(
    output: Path, settings: Mapping[str, Any], before: Iterable[_Done]
) -> Iterator[Callable[[_Done], None]]:
    """Starts the journal with what is already done; yields a function that adds a photograph."""
    _write_journal(output, settings, before)
    with open_own(output / JOURNAL, "a") as file:

        def note(done: _Done) -> None:
            file.write(json.dumps(done) + "\n")
            file.flush()

        yield note


def _write_journal(output: Path, settings: Mapping[str, Any], done: Iterable[_Done]) -> None:
    lines = [json.dumps(settings), *map(json.dumps, done)]
    write_atomic(output / JOURNAL, "\n".join(lines) + "\n")


def _remove(output: Path, faces: Iterable[str]) -> int:
    """Removes faces, and the folders that become empty."""
    count = 0
    for face in faces:
        path = output / face
        if path.is_file():
            path.unlink()
            count += 1
        for folder in list(path.parents)[: face.count("/")]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    return count


def _write_lists(
    job: _Job, faces: list[_Done], rejected: Mapping[str, str], settings: Mapping[str, Any]
) -> int:
    """Writes the CSV files, the identities' names and the journal; returns the identities'
    count.
    """
    output = job.output
    with atomic(output / FACES, newline="") as file:
        rows = ((one.path, one.face, *one.measures) for one in faces)
        csv.writer(file).writerows([("path", "face", *_MEASURES), *map(cells, rows)])
    with atomic(output / REJECTS, newline="") as file:
        csv.writer(file).writerows([("path", "reason"), *map(cells, rejected.items())])
    people = {one.path.partition("/")[0] for one in faces if "/" in one.path}
    if people:
        identities.write(output, names_of(job.folder, sorted(people)))
    else:
        (output / identities.FILE).unlink(missing_ok=True)
    _write_journal(output, settings, faces)
    return len(people)
