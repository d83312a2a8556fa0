"""From stored images to the backbone's input: one place for training, evaluation and export.

Images are RGB, 112 x 112, uint8, from the file to the device; only there they become floats in
[-1, 1].
"""

import jax
import jax.numpy as jnp
import numpy as np

MEAN = 127.5
SCALE = 127.5


def normalize(images: jax.Array) -> jax.Array:
    """uint8 RGB to float32 (x - 127.5) / 127.5, insightface's (x / 255 - 0.5) / 0.5."""
    return (images.astype(jnp.float32) - MEAN) / SCALE


def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors each image (B, H, W, 3) left to right with probability one half."""
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


_SKIN = slice(28, 100, 2), slice(28, 84, 2)
"""Rows and columns of an aligned face from brow to mouth, every second: mostly skin."""
_LEAN = 0.05
_ENOUGH = 8


def color_lean(images: np.ndarray) -> np.ndarray:
    """(R - B) / (R + B) of the middle of each aligned face; skin of any tone is above 0.

    Args:
      images: (n, 112, 112, 3) uint8, believed to be RGB.

    Returns:
      (n,) float64, -1 .. 1.
    """
    sums = images[:, *_SKIN].sum((1, 2), dtype=np.int64)
    red, blue = sums[:, 0], sums[:, 2]
    return (red - blue) / np.maximum(red + blue, 1)


def looks_bgr(images: np.ndarray) -> bool:
    """Whether a batch of aligned faces seems to have red and blue exchanged.

    An image has a say where its lean is beyond 0.05 to either side, which gray and noise are not.
    True where eight images at least have one, half of all, and four in five of them say BGR.
    docs/inference.md says how often that is right.

    Args:
      images: (n, 112, 112, 3) uint8, believed to be RGB.
    """
    lean = color_lean(images)
    blue, red = np.count_nonzero(lean < -_LEAN), np.count_nonzero(lean > _LEAN)
    say = blue + red
    return bool(say >= max(_ENOUGH, len(images) / 2) and blue >= 0.8 * say)
