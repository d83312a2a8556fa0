"""Augmentation of training images on the host: published sets of operations, by name.

An image's augmentation depends only on the seed, the step and the image's position in the global
batch. All random numbers of a batch are drawn at once, a row per image, and every operation has its
own columns, so operations do not influence each other.

Sources: "dali" is arcface_torch's `dali_aug` (insightface, recognition/arcface_torch/dataset.py;
hue and saturation as NVIDIA DALI defines them, by a rotation and a scaling in YIQ); "adaface" are
the augmentations of Kim et al., "AdaFace: Quality Adaptive Margin for Face Recognition" (CVPR 2022)
with the numbers of its code (mk-minchul/AdaFace, data.py; brightness, contrast and saturation as
torchvision's ColorJitter defines them); "erasing" is Zhong et al., "Random Erasing Data
Augmentation" (AAAI 2020).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from arcface_jax.config import AugmentConfig

Draws = list[float]
"""Uniform random numbers in [0, 1)."""
Image = np.ndarray
"""(H, W, 3) uint8 RGB."""

# ITU-R BT.601 luma, as used by DALI, torchvision and Pillow.
LUMA = (0.299, 0.587, 0.114)
_RGB_TO_YIQ = np.array((LUMA, (0.596, -0.274, -0.321), (0.211, -0.523, 0.311)))
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)
_INTERPOLATIONS = (
    cv2.INTER_NEAREST,
    cv2.INTER_LINEAR,
    cv2.INTER_AREA,
    cv2.INTER_CUBIC,
    cv2.INTER_LANCZOS4,
)
_STREAM = 1  # distinct from the stream of the order, which is drawn from (seed, epoch)


class Operation(NamedTuple):
    """One augmentation."""

    name: str
    """Name of its probability in the configuration."""
    draws: int
    """Number of random numbers that it takes."""
    apply: Callable[[Image, Draws], Image]


class Augment:
    """Augments batches in place; can be pickled and sent to another process.

    Args:
      names: names of the operations, in their order.
      probabilities: probability of each.
      seed: random seed of the random numbers.
    """

    def __init__(self, names: tuple[str, ...], probabilities: tuple[float, ...], *, seed: int):
        self._operations = [OPERATIONS[name] for name in names]
        self._probabilities = probabilities
        self._seed = seed

    def __call__(self, images: np.ndarray, *, step: int, batch_size: int, part: slice) -> None:
        """Augments a host's part of a step's batch.

        Args:
          images: (b, H, W, 3) uint8 RGB, changed in place.
          step: number of the batch.
          batch_size: B, images in the global batch.
          part: which of them these images are.
        """
        columns = sum(1 + operation.draws for operation in self._operations)
        stream = np.random.default_rng((self._seed, step, _STREAM))
        rows = stream.random((batch_size, columns))[part].tolist()
        for image, row in zip(images, rows, strict=True):
            at = 0
            for operation, probability in zip(self._operations, self._probabilities, strict=True):
                end = at + 1 + operation.draws
                if row[at] < probability:
                    image[:] = operation.apply(image, row[at + 1 : end])
                at = end


def make(config: AugmentConfig, *, seed: int) -> Augment | None:
    """Returns the augmentation of a configuration; None if it has none."""
    names = tuple(name for name in OPERATIONS if name.split("_")[0] in config.sets)
    if not names:
        return None
    return Augment(names, tuple(getattr(config, name) for name in names), seed=seed)


def _between(draw: float, low: float, high: float) -> float:
    return low + draw * (high - low)


def _resize_and_back(image: Image, side: int, down: int, up: int) -> Image:
    small = cv2.resize(image, (side, side), interpolation=down)
    return cv2.resize(small, image.shape[1::-1], interpolation=up)


def _dali_low_resolution(image: Image, draws: Draws) -> Image:
    side = int(len(image) * _between(draws[0], 0.5, 0.8))
    # DALI's linear interpolation averages when shrinking; OpenCV's would skip pixels.
    return _resize_and_back(image, side, cv2.INTER_AREA, cv2.INTER_LINEAR)


def _dali_blur(image: Image, draws: Draws) -> Image:
    radius = 1 if draws[0] < 0.5 else 2
    sigma = 0.3 * (radius - 1) + 0.8  # as in DALI; OpenCV's default differs for small windows
    return cv2.GaussianBlur(image, (2 * radius + 1,) * 2, sigma)


def color_matrix(*, hue: float, saturation: float) -> np.ndarray:
    """Returns (3, 3) float32 matrix on RGB columns: rotates and scales the chroma of YIQ.

    Args:
      hue: degrees.
      saturation: factor; 0 leaves gray.
    """
    cos = saturation * math.cos(math.radians(hue))
    sin = saturation * math.sin(math.radians(hue))
    turn = np.array(((1.0, 0.0, 0.0), (0.0, cos, sin), (0.0, -sin, cos)))
    return (_YIQ_TO_RGB @ turn @ _RGB_TO_YIQ).astype(np.float32)


def _dali_color(image: Image, draws: Draws) -> Image:
    hue, saturation = _between(draws[0], 0.0, 20.0), _between(draws[1], 1.0, 1.2)
    return cv2.transform(image, color_matrix(hue=hue, saturation=saturation))


def _dali_gray(image: Image, _: Draws) -> Image:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _rectangle(
    shape: tuple[int, ...], draws: Draws, *, area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[slice, slice]:
    """Draws a rectangle with a given share of the area and a log-uniform aspect ratio.

    The code of both papers draws again when it does not fit; here the side that is too long is cut.
    """
    height, width = shape[:2]
    wanted = height * width * _between(draws[0], *area)
    aspect = math.exp(_between(draws[1], *map(math.log, ratio)))
    h = max(1, min(height, round(math.sqrt(wanted / aspect))))
    w = max(1, min(width, round(math.sqrt(wanted * aspect))))
    top, left = int(draws[2] * (height - h + 1)), int(draws[3] * (width - w + 1))
    return slice(top, top + h), slice(left, left + w)


def _adaface_crop(image: Image, draws: Draws) -> Image:
    kept = _rectangle(image.shape, draws, area=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    out = np.zeros_like(image)
    out[kept] = image[kept]
    return out


def _adaface_low_resolution(image: Image, draws: Draws) -> Image:
    side = max(1, int(len(image) * _between(draws[0], 0.2, 1.0)))
    down, up = (_INTERPOLATIONS[int(draw * len(_INTERPOLATIONS))] for draw in draws[1:])
    return _resize_and_back(image, side, down, up)


def _adaface_photometric(image: Image, draws: Draws) -> Image:
    """Changes brightness, contrast and saturation, in random order."""
    brightness, contrast, saturation = (_between(draw, 0.5, 1.5) for draw in draws[:3])
    identity = np.eye(3, dtype=np.float32)
    for turn in sorted(range(3), key=lambda i: draws[3 + i]):
        if turn == 0:
            image = cv2.convertScaleAbs(image, alpha=brightness)
        elif turn == 1:
            mean = round(float(np.dot(LUMA, cv2.mean(image)[:3])))
            image = cv2.addWeighted(image, contrast, image, 0.0, (1.0 - contrast) * mean)
        else:
            gray = (1.0 - saturation) * np.array((LUMA,) * 3, np.float32)
            image = cv2.transform(image, saturation * identity + gray)
    return image


def _erasing(image: Image, draws: Draws) -> Image:
    hidden = _rectangle(image.shape, draws, area=(0.02, 0.4), ratio=(0.3, 1 / 0.3))
    noise = np.random.default_rng(int(draws[4] * 2**53))
    out = image.copy()
    out[hidden] = noise.integers(0, 256, out[hidden].shape, np.uint8)
    return out


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("dali_low_resolution", 1, _dali_low_resolution),
        Operation("dali_blur", 1, _dali_blur),
        Operation("dali_color", 2, _dali_color),
        Operation("dali_gray", 0, _dali_gray),
        Operation("adaface_crop", 4, _adaface_crop),
        Operation("adaface_low_resolution", 3, _adaface_low_resolution),
        Operation("adaface_photometric", 6, _adaface_photometric),
        Operation("erasing", 5, _erasing),
    )
}
"""All operations, in the order in which they are applied."""
