"""Convert stored images to the backbone's input, for training, evaluation and export.

Images are RGB, 112 x 112, uint8, from the file to the device; they are converted to floats in [-1,
1] only there.
"""

import jax
import jax.numpy as jnp

MEAN = 127.5
SCALE = 127.5


def normalize(images: jax.Array) -> jax.Array:
    """Converts uint8 RGB to float32 (x - 127.5) / 127.5, insightface's (x / 255 - 0.5) / 0.5."""
    return (images.astype(jnp.float32) - MEAN) / SCALE


def draw_mirrored(count: int, key: jax.Array) -> jax.Array:
    """Returns (B,) bool, each true with probability one half: which images of a batch to mirror."""
    return jax.random.bernoulli(key, 0.5, (count,))


def mirror(images: jax.Array, mirrored: jax.Array) -> jax.Array:
    """Mirrors left to right the images (B, H, W, 3) for which `mirrored` (B,) is true."""
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
