"""Alignment: the similarity that moves a face's five points to where networks expect them."""

from collections.abc import Sequence

import cv2
import numpy as np

from arcface_jax.errors import DataError
from arcface_jax.models import IMAGE_SIZE

POINT_NAMES = ("left eye", "right eye", "nose", "left mouth corner", "right mouth corner")
"""Left and right as the viewer sees them; the order of all five points here."""

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
    """The rotation, scale and shift that best move points to points, for many faces at once.

    Minimises the sum of squared distances between the moved source points and the target points,
    without mirroring: the transform of S. Umeyama, "Least-squares estimation of transformation
    parameters between two point patterns" (1991). In the plane, with points as complex numbers
    s_i and t_i less their means, rotation and scale are one complex number

        a = sum_i conj(s_i) t_i / sum_i |s_i|^2

    and no singular value decomposition is needed.

    Args:
      source: (..., k, 2) x, y in pixels, k at least 2.
      target: (..., k, 2); the leading axes broadcast against those of source.

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
    s_centred, t_centred = s - s_mean, t - t_mean
    spread = np.sum(np.abs(s_centred) ** 2, -1)
    product = np.sum(s_centred.conj() * t_centred, -1)
    # As shares of what rounding leaves of points that coincide, and of the largest |product|.
    coincide = spread <= 1e-18 * np.sum(np.abs(s) ** 2, -1)
    limit = 1e-9 * np.sqrt(spread * np.sum(np.abs(t_centred) ** 2, -1))
    degenerate = coincide | (np.abs(product) <= limit)
    if degenerate.any():
        faces = np.broadcast_to(source, (*degenerate.shape, *source.shape[-2:]))
        raise DataError(
            f"the points of {np.count_nonzero(degenerate)} of {degenerate.size} faces determine no "
            "similarity (they coincide, or no rotation fits better than another); the first are "
            f"{faces[degenerate][0].tolist()}; give {', '.join(POINT_NAMES)}"
        )
    a = product / spread
    b = t_mean[..., 0] - a * s_mean[..., 0]
    rows = [np.stack([a.real, -a.imag, b.real], -1), np.stack([a.imag, a.real, b.imag], -1)]
    return np.stack(rows, -2)


def align(
    image: np.ndarray, points: np.ndarray | Sequence[Sequence[float]], *, size: int = IMAGE_SIZE
) -> np.ndarray:
    """A face moved to the template, as insightface aligns: bilinear, black where nothing is.

    Args:
      image: (H, W, 3) uint8 RGB.
      points: (5, 2) x, y in pixels of `image`, in the order of `POINT_NAMES`.
      size: side of the result in pixels; the template grows with it.

    Returns:
      (size, size, 3) uint8 RGB.

    Raises:
      DataError: the points are not five, or as `similarity`.
    """
    points = np.asarray(points, np.float64)
    if points.shape != TEMPLATE.shape:
        raise DataError(
            f"points of shape {points.shape}; expected (5, 2): x, y of {', '.join(POINT_NAMES)}"
        )
    matrix = similarity(points, TEMPLATE * (size / IMAGE_SIZE))
    return cv2.warpAffine(image, matrix, (size, size), borderValue=(0, 0, 0))
