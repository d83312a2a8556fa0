"""`data.py align`: photographs to faces of 112 x 112, by five points from a list or a detector."""

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.config.choices import FaceChoice
from arcface_jax.data import detectors, point_files
from arcface_jax.data import names as identities
from arcface_jax.data.detectors import Detector, Faces
from arcface_jax.data.faces import align
from arcface_jax.data.files import names_of
from arcface_jax.data.images import decode_any_size, encode_jpeg, find_below, read_file
from arcface_jax.data.tools import reading
from arcface_jax.errors import DataError, ImageError
from arcface_jax.runtime.files import atomic, write_atomic

PointsOf = Callable[[str, np.ndarray], Faces]
"""The faces of an image, of which the path relative to the folder is given too."""


class Aligned(NamedTuple):
    """What was written."""

    written: int
    rejected: dict[str, str]
    """Why, by path."""
    report: Path
    ignored: dict[str, int]
    """Entries that are no images, by kind."""
    identities: int
    """Folders that have a face."""


def align_folder(
    folder: Path,
    output: Path,
    points_of: PointsOf,
    *,
    choose: FaceChoice = "largest",
    min_eyes: float = 0.0,
    quality: int = 95,
    threads: int = 0,
) -> Aligned:
    """Aligns every image under a folder, and keeps the folders' structure.

    Args:
      folder: of photographs, in sub-folders or not.
      output: where the faces go, as JPEG, `rejects.csv` with what was left out, and why, and the
        names of the folders that have faces, which are the identities.
      points_of: the five points of the faces of an image.
      choose: which face where there are several.
      min_eyes: smallest distance of the eyes in pixels of the photograph; below, it is rejected.
      quality: of the JPEG files.
      threads: 0 for as many as there are processors.

    Raises:
      DataError: there is no image.
    """
    ignored: Counter[str] = Counter()
    files = find_below(folder, ignored=ignored)
    names = [path.relative_to(folder).as_posix() for path in files]
    stems = Counter(path.with_suffix("") for path in files)

    def look(number: int) -> None:
        name = names[number]
        image = decode_any_size(read_file(files[number]), where=name)
        points = detectors.choose(points_of(name, image), image.shape, choose, where=name)
        eyes = float(np.linalg.norm(points[1] - points[0]))
        if eyes < min_eyes:
            raise ImageError(name, f"the eyes are {eyes:.1f} pixels apart, fewer than {min_eyes:g}")
        try:
            face = align(image, points)
        except DataError as error:
            raise ImageError(name, str(error)) from error
        target = output / name
        only = stems[files[number].with_suffix("")] == 1  # not beside a.png where a.jpg is too
        target = target.with_suffix(".jpg") if only else target.with_name(f"{target.name}.jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, encode_jpeg(face, quality=quality), durable=False)

    rejected = {}
    for number, found in reading.in_order(
        range(len(files)), look, what="aligning", threads=threads
    ):
        if isinstance(found, ImageError):
            rejected[names[number]] = found.problem
    output.mkdir(parents=True, exist_ok=True)
    report = output / "rejects.csv"
    with atomic(report, newline="") as file:
        csv.writer(file).writerows([("path", "reason"), *rejected.items()])
    people = {name.partition("/")[0] for name in names if "/" in name and name not in rejected}
    if people:
        identities.write(output, names_of(folder, sorted(people)))
    return Aligned(len(files) - len(rejected), rejected, report, dict(ignored), len(people))


def detected(detector: Detector) -> PointsOf:
    """Points as a detector finds them."""
    return lambda _, image: detector(image)


def listed(path: Path) -> PointsOf:
    """Points from a file, in any form of `point_files`.

    Paths are relative to the photographs' folder; one may be listed several times, once for each
    face.

    Raises:
      DataError: the file has none of the forms.
    """
    points = point_files.by_name(path)

    def look_up(name: str, _: np.ndarray) -> Faces:
        if name not in points:
            raise ImageError(name, f"no points in {path.name}")
        return Faces(points[name], np.ones(len(points[name])))

    return look_up
