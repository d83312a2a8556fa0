"""Load and align face images from files or arrays."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import cv2
import numpy as np

from arcface_jax.data import images
from arcface_jax.data.images import IMAGE_SIZE, decode_any_size
from arcface_jax.errors import DataError
from arcface_jax.runtime import foreign


class Picture(Protocol):
    """A PIL image, or any object with the same two members."""

    @property
    def mode(self) -> str:
        """Pixel format, such as RGB."""
        ...

    def convert(self, mode: str, /) -> Any:
        """Returns the picture converted to another mode."""
        ...


Face = np.ndarray | str | Path | Picture
"""(H, W, 3) uint8 RGB, the file of an image, or a PIL image."""
Faces = Face | Iterable["Face | Sequence[Face]"]
"""One face, an array (n, H, W, 3) of several, or an iterable of faces and of batches of them."""
FindPoints = Callable[[np.ndarray, str], np.ndarray]
"""(H, W, 3) uint8 RGB and its name, for errors, to the (5, 2) points of the face in it."""
OtherSize = Literal["refuse", "resize"]
"""What to do with an image that is not 112 x 112 and has no points to align it by."""

_ALIGNED = (IMAGE_SIZE, IMAGE_SIZE, 3)


def with_points(
    faces: Faces, points: np.ndarray | Iterable | None
) -> Iterator[tuple[Face, np.ndarray | None]]:
    """Yields each face with its points, or None.

    Faces of an iterator are taken one by one; for a list or an array, the number of points is
    checked first.

    Args:
      faces: the faces.
      points: (5, 2) for one face, (n, 5, 2), or an iterable with None for faces that are aligned.

    Raises:
      DataError: there are more or fewer points than faces.
    """
    flat: Iterator[Any] = iter([faces]) if _is_one(faces) else _flat(cast("Iterable", faces))
    if points is None:
        return zip(flat, repeat(None), strict=False)
    if not isinstance(points, Sequence | np.ndarray):
        return _paired(flat, points)
    if np.ndim(points[0] if len(points) else ()) == 1:  # five points of one face
        points = [np.asarray(points)]
    if _is_one(faces) or isinstance(faces, Sequence | np.ndarray):
        listed = list(flat)
        if len(points) != len(listed):
            raise DataError(_unequal(f"{len(points)} sets of points for {len(listed)} faces"))
        flat = iter(listed)
    return _paired(flat, points)


def _paired(flat: Iterator[Face], points: Iterable) -> Iterator[tuple[Face, np.ndarray | None]]:
    pairs = zip(flat, points, strict=True)
    while True:
        try:
            face, five = next(pairs)
        except StopIteration:
            return
        except ValueError as error:
            raise DataError(
                _unequal("the numbers of faces and of sets of points differ")
            ) from error
        yield face, None if five is None else np.asarray(five, np.float64)


def _unequal(found: str) -> str:
    return f"{found}: pass one per face, (n, 5, 2), or None for an aligned face"


def _is_picture(face: object) -> bool:
    """Returns whether it is a PIL image, or can be converted like one."""
    return hasattr(face, "convert") and hasattr(face, "mode")


def _is_one(faces: object) -> bool:
    if isinstance(faces, np.ndarray):
        return faces.ndim in (2, 3)  # a gray image is one face, which is refused as such
    return isinstance(faces, str | Path) or _is_picture(faces)


def _flat(faces: Iterable) -> Iterator[Any]:
    """Yields the faces of an iterable, and of the batches in it."""
    for each in faces:
        batch = isinstance(each, list | tuple) or (isinstance(each, np.ndarray) and each.ndim == 4)
        yield from each if batch else (each,)


def prepare(
    face: Face,
    points: np.ndarray | None = None,
    *,
    other_size: OtherSize = "refuse",
    find_points: FindPoints | None = None,
    where: str | None = None,
) -> np.ndarray:
    """Reads a face if it is a file, and aligns it if points are given or found.

    Args:
      face: the image.
      points: (5, 2), as for `align`; None where the image is an aligned face.
      other_size: for images of another size without points.
      find_points: gives the points of images of another size that come without; such images are
        neither refused nor resized.
      where: the image's name for errors; by default its file.

    Returns:
      (112, 112, 3) uint8 RGB.

    Raises:
      DataError: the file or array is not such an image, its points are not a face's, or it shows no
        face.

    Warns:
      UserWarning: the image was resized.
    """
    image, name = _load(face)
    where = where or name
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(
            f"a face is {image.shape} {image.dtype}; expected (height, width, 3) uint8, RGB"
        )
    if points is None and find_points is not None and image.shape != _ALIGNED:
        points = find_points(image, where)
    if points is not None:
        return align(image, points)
    if image.shape == _ALIGNED:
        return image
    if other_size == "refuse":
        raise DataError(
            f"{where} is {image.shape[1]} x {image.shape[0]}; expected an aligned face of "
            f"{IMAGE_SIZE} x {IMAGE_SIZE}: align it first (`arcface-jax data align`), or pass "
            f"its five points or, to commands that take one, a detector (--detector FILE)"
        )
    # One text for all images, so that Python shows it once.
    warnings.warn(
        f"images that are not {IMAGE_SIZE} x {IMAGE_SIZE} are resized; the network expects "
        f"aligned faces: pass five points per face to align them",
        stacklevel=2,
    )
    return images.resize(image)


def _load(face: Face) -> tuple[np.ndarray, str]:
    """Returns a face as an array, and its name for errors."""
    if isinstance(face, np.ndarray):
        return face, "an array"
    if isinstance(face, str | Path):
        return read(face), str(face)
    if _is_picture(face):
        return _from_picture(face), "an image of PIL"
    raise DataError(
        f"a face is a {type(face).__name__}; expected an array (height, width, 3) uint8 RGB, a "
        "file, or a PIL image"
    )


def _from_picture(picture: Picture) -> np.ndarray:
    """Converts a PIL image to (H, W, 3) uint8 RGB, rotated by its EXIF data as files are."""
    if picture.mode.startswith(("I", "F")):  # PIL would clip 16-bit values to white
        raise DataError(
            f"a PIL image has mode {picture.mode}; expected 8 bits a channel, as RGB or L"
        )
    if type(picture).__module__.startswith("PIL."):
        from PIL import ImageOps  # a PIL image implies that PIL is installed

        picture = ImageOps.exif_transpose(cast(Any, picture))
    return np.asarray(picture.convert("RGB"))


def read(path: str | Path) -> np.ndarray:
    """Returns an image file as (H, W, 3) uint8 RGB.

    Raises:
      DataError: the file does not exist, or is not an image.
    """
    try:
        data = foreign.read(path)
    except OSError as error:
        raise DataError(f"no image at {path} ({error.strerror}): name an existing file") from error
    return decode_any_size(data, where=str(path))


def find(folder: Path) -> list[str]:
    """Returns the image files below a folder, as paths from there, sorted.

    Raises:
      DataError: the folder does not exist, or has no image.
    """
    return sorted(path.relative_to(folder).as_posix() for path in images.find_below(folder))


POINT_NAMES = ("left eye", "right eye", "nose", "left mouth corner", "right mouth corner")
"""The order of the five points used here; left and right are the viewer's."""

TEMPLATE = np.array(
    [
        (38.2946, 51.6963),
        (73.5318, 51.5014),
        (56.0252, 71.7366),
        (41.5493, 92.3655),
        (70.7299, 92.2041),
    ]
)
"""(5, 2) float64: x, y of the five points in an aligned image of 112 x 112 pixels (insightface)."""


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Finds the rotation, scale and shift that best move points to points, for many faces at once.

    Minimizes the sum of squared distances between the moved source points and the target points,
    without mirroring: the transform of S. Umeyama, "Least-squares estimation of transformation
    parameters between two point patterns" (1991). In the plane, with points as complex numbers s_i
    and t_i minus their means, rotation and scale are one complex number

        a = sum_i conj(s_i) t_i / sum_i |s_i|^2

    and no singular value decomposition is needed.

    Args:
      source: (..., k, 2) x, y in pixels, k at least 2.
      target: (..., k, 2); the leading axes broadcast against source's.

    Returns:
      (..., 2, 3) float64: matrices M with target ~ M[:, :2] @ source + M[:, 2].

    Raises:
      DataError: a coordinate is not finite, or the points determine no such transform: they all
        coincide, or every rotation fits them equally badly.
    """
    source, target = (np.asarray(points, np.float64) for points in (source, target))
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise DataError("a face's points are not finite: leave that face out, or detect it again")
    s, t = source[..., 0] + 1j * source[..., 1], target[..., 0] + 1j * target[..., 1]
    s_mean, t_mean = s.mean(-1, keepdims=True), t.mean(-1, keepdims=True)
    s_centered, t_centered = s - s_mean, t - t_mean
    spread = np.sum(np.abs(s_centered) ** 2, -1)
    product = np.sum(s_centered.conj() * t_centered, -1)
    # As shares of the rounding error of coinciding points, and of the largest |product|.
    coincide = spread <= 1e-18 * np.sum(np.abs(s) ** 2, -1)
    limit = 1e-9 * np.sqrt(spread * np.sum(np.abs(t_centered) ** 2, -1))
    degenerate = coincide | (np.abs(product) <= limit)
    if degenerate.any():
        faces = np.broadcast_to(source, (*degenerate.shape, *source.shape[-2:]))
        raise DataError(
            f"the points of {np.count_nonzero(degenerate)} of {degenerate.size} faces do not "
            f"determine a similarity transform (they coincide, or no rotation fits better than "
            f"another); the first are "
            f"{faces[degenerate][0].tolist()}; give {', '.join(POINT_NAMES)}"
        )
    a = product / spread
    b = t_mean[..., 0] - a * s_mean[..., 0]
    rows = [np.stack([a.real, -a.imag, b.real], -1), np.stack([a.imag, a.real, b.imag], -1)]
    return np.stack(rows, -2)


def align(
    image: np.ndarray, points: np.ndarray | Sequence[Sequence[float]], *, size: int = IMAGE_SIZE
) -> np.ndarray:
    """Aligns a face to the template as insightface does: bilinear, black outside the image.

    For the same matrix, insightface's `face_align.norm_crop` returns the same bytes: both make the
    same OpenCV call. insightface estimates the matrix in float32, which changes an embedding by up
    to 1.0e-3 of its length (docs/data.md).

    Args:
      image: (H, W, 3) uint8 RGB.
      points: (5, 2) x, y in pixels of `image`, in the order of `POINT_NAMES`.
      size: side of the result in pixels; the template grows with it.

    Returns:
      (size, size, 3) uint8 RGB.

    Raises:
      DataError: there are not five points, or as `similarity`.
    """
    points = np.asarray(points, np.float64)
    if points.shape != TEMPLATE.shape:
        raise DataError(
            f"points of shape {points.shape}; expected (5, 2): x, y of {', '.join(POINT_NAMES)}"
        )
    matrix = similarity(points, TEMPLATE * (size / IMAGE_SIZE))
    return cv2.warpAffine(image, matrix, (size, size), borderValue=(0, 0, 0))
