"""Blur and pose of a face, as rough numbers to sort and filter by."""

import cv2
import numpy as np

from arcface_jax.data.faces import TEMPLATE

_WINDOW = 9  # size of the mean filter in pixels, as in F. Crete et al.
# The template's points in 3D, in its pixels: x and y, and how far each is in front of the eyes.
_DEPTHS = np.array([0.0, 0.0, 18.0, 4.0, 4.0])


def blur(face: np.ndarray) -> float:
    """Returns how blurred an image is: 0 is as sharp as noise, 1 has no detail at all.

    Blurring a sharp image removes most of the difference between neighboring pixels; blurring a
    blurred one removes little. The measure is the share of the differences that remains, in the
    worse of the two directions (F. Crete et al., "The blur effect: perception and estimation with a
    new no-reference perceptual blur metric", 2007).

    Args:
      face: (H, W, 3) uint8 RGB; an aligned face, to make faces of all sizes comparable.
    """
    gray = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY).astype(np.float64)
    left = []
    for axis, window in (
        (0, (1, _WINDOW)),
        (1, (_WINDOW, 1)),
    ):  # OpenCV's sizes are (width, height)
        before = np.abs(np.diff(gray, axis=axis))
        after = np.abs(np.diff(cv2.blur(gray, window), axis=axis))
        total = before.sum()
        lost = np.maximum(0, before - after).sum()
        left.append(1.0 if total == 0 else (total - lost) / total)
    return float(max(left))


def pose(points: np.ndarray) -> tuple[float, float, float]:
    """Estimates yaw, pitch and roll in degrees from five points, to about ten degrees.

    Fits an orthographic camera to an average face: with X the face's points in space and p those in
    the image, both minus their means, the rows of p = X A are the first two axes of the rotation
    times the scale (D. DeMenthon, L. Davis, "Model-based object pose in 25 lines of code", 1995,
    without the iteration). The template's points stand for a face that looks straight into the
    camera.

    Args:
      points: (5, 2) x, y in pixels, in the order of `faces.POINT_NAMES`.

    Returns:
      Yaw, positive where the face looks to the viewer's right; pitch, positive where it looks up;
      roll, positive where it is turned clockwise.
    """
    model = np.column_stack([TEMPLATE, -_DEPTHS])  # x to the right, y down, z away from the camera
    rows, *_ = np.linalg.lstsq(model - model.mean(0), points - points.mean(0), rcond=None)
    first, second = (row / max(np.linalg.norm(row), 1e-12) for row in rows.T)
    third = np.cross(first, second)
    third /= max(np.linalg.norm(third), 1e-12)
    # The head is turned by yaw, then pitch, then roll.
    yaw, pitch = np.arctan2(third[0], third[2]), -np.arcsin(np.clip(third[1], -1, 1))
    roll = np.arctan2(-first[1], second[1])
    return float(np.degrees(yaw)), float(np.degrees(pitch)), float(np.degrees(roll))
