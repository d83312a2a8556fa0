"""Color order: real faces in both orders, and what is no evidence of either."""

import os
from pathlib import Path

import numpy as np
import pytest

from arcface_jax.data.colors import color_lean, looks_bgr
from arcface_jax.data.pairs import bins
from arcface_jax.data.synthetic import faces

LFW = os.environ.get("ARCFACE_JAX_LFW", "")


def test_the_lean_is_of_the_middle():
    image = np.zeros((1, 112, 112, 3), np.uint8)
    image[..., 2] = 255  # blue all around
    image[:, 28:100, 28:84] = (150, 90, 50)
    assert color_lean(image) == pytest.approx(0.5)
    assert color_lean(image[..., ::-1]) == pytest.approx(-0.5)


@pytest.mark.skipif(not LFW, reason="ARCFACE_JAX_LFW is unset")
def test_batches_of_real_faces_are_told_apart():
    images = bins.read_bin(Path(LFW) / "lfw_dev.bin").images
    assert (color_lean(images) > 0.05).mean() > 0.98
    for start in range(0, 2000, 16):
        batch = images[start : start + 16]
        assert not looks_bgr(batch)
        assert looks_bgr(batch[..., ::-1])


def test_neither_drawn_nor_gray_faces_nor_noise_nor_few_are_called_bgr():
    drawn = np.stack([faces.draw_face(seed=7, identity=i, index=0) for i in range(64)])
    gray = np.repeat(drawn[..., 1:2], 3, axis=3)
    noise = np.random.default_rng(0).integers(0, 256, drawn.shape, np.uint8)
    for images in (drawn, gray, noise, np.zeros_like(drawn), noise[:0]):
        assert not any(looks_bgr(images[i : i + 16]) for i in range(0, 64, 16))
    blue = np.full((8, 112, 112, 3), (50, 90, 150), np.uint8)
    assert looks_bgr(blue)
    assert not looks_bgr(blue[:7])  # too few to say so
    assert not looks_bgr(np.concatenate([blue, gray[:9]]))  # most have no say
