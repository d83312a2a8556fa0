"""Encoded images to pixels and back: the one place that decodes."""

from collections.abc import Callable

import cv2
import numpy as np

from arcface_jax.errors import ImageError

IMAGE_SIZE = 112
"""Side of an aligned face in pixels, the input of every backbone."""


def decode(data: bytes, *, where: Callable[[], str]) -> np.ndarray:
    """An encoded image as (112, 112, 3) uint8 RGB.

    Args:
      data: JPEG, PNG, or what else OpenCV reads.
      where: says what the image is, for the error message.

    Raises:
      ImageError: it cannot be decoded, or has another size.
    """
    image = pixels(np.frombuffer(data, np.uint8))
    if image is None:
        raise _not_an_image(data, where())
    if image.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
        raise ImageError(
            where(),
            f"the image is {image.shape[1]} x {image.shape[0]} pixels, training takes "
            f"faces aligned to {IMAGE_SIZE} x {IMAGE_SIZE}: align and crop the images first "
            "(`arcface-jax data align`)",
        )
    return image


def decode_any_size(data: bytes, *, where: str) -> np.ndarray:
    """An encoded image as (H, W, 3) uint8 RGB.

    Raises:
      ImageError: it cannot be decoded.
    """
    image = pixels(np.frombuffer(data, np.uint8))
    if image is None:
        raise _not_an_image(data, where)
    return image


def pixels(data: np.ndarray) -> np.ndarray | None:
    """(n,) uint8, an encoded image, as (H, W, 3) uint8 RGB; None where it is none."""
    try:
        return cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) if data.size else None
    except cv2.error:  # for instance a damaged header that announces a billion pixels
        return None


def _not_an_image(data: bytes, where: str) -> ImageError:
    return ImageError(where, f"{len(data)} bytes that are not an image; remove or replace it")


def encode(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB as a PNG, which loses nothing."""
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
