"""Image files: which files are images, and the one place that decodes, encodes and resizes."""

import glob
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from arcface_jax.errors import DataError, ImageError

IMAGE_SIZE = 112
"""Side of an aligned face in pixels, the input of every backbone."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Of the files that count as images, in upper or lower case."""


def is_image(path: str | Path) -> bool:
    """Whether a file's name is that of an image."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def find_below(folder: Path) -> list[Path]:
    """The image files of a folder and its sub-folders, sorted.

    Raises:
      DataError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}: name an existing folder of images")
    found = sorted(path for path in folder.rglob("*") if is_image(path) and path.is_file())
    if not found:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise DataError(f"{folder} holds no image ({suffixes}), nor do its sub-folders")
    return found


def find_named(stem: Path) -> Path | None:
    """The image file of a name without its suffix, FOLDER/NAME.jpg for FOLDER/NAME."""
    usual = (stem.with_name(stem.name + suffix) for suffix in IMAGE_SUFFIXES)
    if found := next((path for path in usual if path.is_file()), None):
        return found
    others = sorted(stem.parent.glob(f"{glob.escape(stem.name)}.*"))
    return next((path for path in others if path.stem == stem.name and is_image(path)), None)


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


def square(data: bytes, *, where: str) -> np.ndarray:
    """An encoded image of any size as (112, 112, 3) uint8 RGB: its middle square, resized.

    Args:
      data: JPEG, PNG, or what else OpenCV reads.
      where: what the image is, for the error message.

    Raises:
      ImageError: it cannot be decoded.
    """
    image = decode_any_size(data, where=where)
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side])


def resize(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 stretched to (112, 112, 3), bilinear; itself where it has that size."""
    if image.shape[:2] == (IMAGE_SIZE, IMAGE_SIZE):
        return image
    return cv2.resize(image, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_LINEAR)


def encode(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB as a PNG, which loses nothing."""
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def encode_jpeg(image: np.ndarray, *, quality: int) -> bytes:
    """(H, W, 3) uint8 RGB as a JPEG of a quality from 0 to 100."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
