"""Detect gray images, and images with red and blue exchanged, from the colors of faces."""

import numpy as np

_SKIN = slice(28, 100, 2), slice(28, 84, 2)
"""Every second row and column of an aligned face from brow to mouth: mostly skin."""
_LEAN = 0.05
_ENOUGH = 8
_ROUNDING = 2  # of 255: JPEG's rounding of equal channels that are stored as color


def color_lean(images: np.ndarray) -> np.ndarray:
    """Returns (R - B) / (R + B) of the middle of each aligned face; skin of any tone is above 0.

    Args:
      images: (n, 112, 112, 3) uint8, believed to be RGB.

    Returns:
      (n,) float64, -1 .. 1.
    """
    sums = images[:, *_SKIN].sum((1, 2), dtype=np.int64)
    red, blue = sums[:, 0], sums[:, 2]
    return (red - blue) / np.maximum(red + blue, 1)


def looks_bgr(images: np.ndarray) -> bool:
    """Returns whether faces seem to have red and blue exchanged, by `lean_is_bgr`.

    docs/inference.md has the measured error rate.

    Args:
      images: (n, 112, 112, 3) uint8, believed to be RGB.
    """
    return lean_is_bgr(color_lean(images))


def lean_is_bgr(lean: np.ndarray) -> bool:
    """Returns whether aligned faces lean to blue, as BGR does.

    Images with a lean within 0.05 of zero, such as gray images and noise, do not count. True if at
    least eight images and half of all count, and four in five of these lean to blue.

    Args:
      lean: (n,) from `color_lean`.
    """
    blue, red = np.count_nonzero(lean < -_LEAN), np.count_nonzero(lean > _LEAN)
    counted = blue + red
    return bool(counted >= max(_ENOUGH, len(lean) / 2) and blue >= 0.8 * counted)


def is_gray(image: np.ndarray) -> bool:
    """Returns whether the three channels of an image are equal, up to the rounding of a color JPEG.

    Args:
      image: (H, W, 3) uint8.
    """
    sampled = image[::4, ::4].astype(np.int16)
    return bool(np.ptp(sampled, axis=-1).max(initial=0) <= _ROUNDING)
