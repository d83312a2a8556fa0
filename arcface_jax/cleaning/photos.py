"""Decide by their pixels whether two images are one photograph."""

import cv2
import numpy as np

SAME = 0.95
"""Lowest correlation between copies of one photograph."""
_SIDE = 24
_SHIFTS = (-1, 0, 1)  # shifts, in pixels of the small images, between crops of one photograph


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the highest correlation of two gray thumbnails, also mirrored and shifted by a pixel.

    Recompressed, rescaled and slightly moved copies correlate at 0.95 and more; two photographs of
    one person are well below.

    Args:
      first: (H, W, 3) uint8.
      second: (H, W, 3) uint8.

    Returns:
      -1 .. 1.
    """
    inner = _thumbnail(first)[1:-1, 1:-1]
    other = _thumbnail(second)
    best = -1.0
    for view in (other, other[:, ::-1]):
        for down in _SHIFTS:
            for right in _SHIFTS:
                part = view[1 + down : _SIDE - 1 + down, 1 + right : _SIDE - 1 + right]
                best = max(best, _correlation(inner, part))
    return best


def _thumbnail(image: np.ndarray) -> np.ndarray:
    gray = image.mean(axis=2).astype(np.float32)
    return cv2.resize(gray, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    a, b = first - first.mean(), second - second.mean()
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / length if length > 0 else 0.0
