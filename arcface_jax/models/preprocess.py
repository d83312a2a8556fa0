"""From stored images to the backbone's input: one place for training, evaluation and export.

Images are RGB, 112 x 112, uint8, from the file to the device; only there they become floats in
[-1, 1].
"""

import jax
import jax.numpy as jnp

MEAN = 127.5
SCALE = 127.5


def normalize(images: jax.Array) -> jax.Array:
    """uint8 RGB to float32 (x - 127.5) / 127.5, insightface's (x / 255 - 0.5) / 0.5."""
    return (images.astype(jnp.float32) - MEAN) / SCALE


def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors each image (B, H, W, 3) left to right with probability one half."""
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)
