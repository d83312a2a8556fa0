"""Faces as people have them, files or arrays, raw or aligned, made ready for a network."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from arcface_jax.data import align, interface
from arcface_jax.errors import DataError
from arcface_jax.models import IMAGE_SIZE

Face = np.ndarray | str | Path
"""(H, W, 3) uint8 RGB, or the file of an image."""
Faces = Face | Sequence[Face]
"""One face, an array (n, H, W, 3) of several, or a list of arrays and files in any order."""
OtherSize = Literal["refuse", "resize"]
"""What becomes of an image that is not 112 x 112 and has no points to align it by."""

_ALIGNED = (IMAGE_SIZE, IMAGE_SIZE, 3)
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def each(faces: Faces) -> list[Face]:
    """One entry a face."""
    if isinstance(faces, str | Path) or (isinstance(faces, np.ndarray) and faces.ndim == 3):
        return [faces]
    return list(faces)


def each_points(points: np.ndarray | Sequence | None, count: int) -> Sequence[np.ndarray | None]:
    """The points of each face, None for those that are aligned.

    Args:
      points: (5, 2) for one face, (n, 5, 2), or a list with None for faces that are aligned.
      count: n.

    Raises:
      DataError: there are more or fewer than faces.
    """
    if points is None:
        return [None] * count
    if count == 1 and np.shape(points) == align.TEMPLATE.shape:
        return [np.asarray(points, np.float64)]
    if len(points) != count:
        raise DataError(
            f"{len(points)} sets of points for {count} faces: give one a face, (n, 5, 2), or None "
            "for a face that is aligned"
        )
    return [None if each is None else np.asarray(each, np.float64) for each in points]


def prepare(
    face: Face, points: np.ndarray | None = None, *, other_size: OtherSize = "refuse"
) -> np.ndarray:
    """Reads one face where it is a file, and aligns it where points are given.

    Args:
      face: the image.
      points: (5, 2), as `align.align`; None where the image is an aligned face.
      other_size: for images of another size without points.

    Returns:
      (112, 112, 3) uint8 RGB.

    Raises:
      DataError: the file or array is no such image, or its points are no points of a face.

    Warns:
      UserWarning: the image was resized.
    """
    image, where = (face, "an array") if isinstance(face, np.ndarray) else (read(face), str(face))
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(
            f"a face is {image.shape} {image.dtype}; expected (height, width, 3) uint8, RGB"
        )
    if points is not None:
        return align.align(image, points)
    if image.shape == _ALIGNED:
        return image
    if other_size == "refuse":
        raise DataError(
            f"{where} is {image.shape[1]} x {image.shape[0]}; expected an aligned face of "
            f"{IMAGE_SIZE} x {IMAGE_SIZE}: give its five points, or ask for other sizes to be "
            "resized"
        )
    # One text for all images, so that Python shows it once.
    warnings.warn(
        f"images that are not {IMAGE_SIZE} x {IMAGE_SIZE} are resized; the network expects aligned "
        "faces: give five points each to have them aligned",
        stacklevel=2,
    )
    return cv2.resize(image, (IMAGE_SIZE, IMAGE_SIZE))


def read(path: str | Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB.

    Raises:
      DataError: there is no such file, or it is no image.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"no image at {path} ({error.strerror}): name an existing file") from error
    return interface.decode_any_size(data, where=str(path))


def find(folder: Path) -> list[str]:
    """The image files below a folder, as paths from there, sorted.

    Raises:
      DataError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}: name an existing folder of images")
    found = [p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file()]
    if not found:
        raise DataError(f"{folder} holds no image ({', '.join(sorted(_SUFFIXES))})")
    return sorted(p.relative_to(folder).as_posix() for p in found)


def parse_points(words: Sequence[str]) -> np.ndarray:
    """(5, 2) float64 of ten numbers x1 y1 ... x5 y5.

    Raises:
      DataError: they are not ten numbers.
    """
    try:
        return np.array(words, np.float64).reshape(align.TEMPLATE.shape)
    except ValueError as error:
        raise DataError(
            f"{' '.join(words)[:80]!r} are not five points, the ten numbers x1 y1 x2 y2 x3 y3 x4 "
            f"y4 x5 y5: {', '.join(align.POINT_NAMES)}"
        ) from error


def read_points(path: Path) -> dict[str, np.ndarray]:
    """Five points of many images: lines `file x1 y1 ... x5 y5`, what follows is ignored.

    IJB's `name_5pts_score.txt` is such a list.

    Returns:
      (5, 2) float64 by file.

    Raises:
      DataError: there is no such file, or a line is not of that form.
    """
    if not path.is_file():
        raise DataError(f"no list of points at {path}: name an existing file")
    points = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if words := line.split():
            try:
                points[words[0]] = parse_points(words[1:11])
            except DataError as error:
                raise DataError(f"{path}, line {number}, {words[0]}: {error}") from error
    return points
