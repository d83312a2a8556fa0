"""Lengths and normalization: the one implementation, against sums in longer floats."""

import numpy as np
import pytest

from arcface_jax.evaluation.embeddings import lengths, normalize


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_rows_are_of_length_1_to_the_last_digits(dtype, scale: float):
    x = (scale * np.random.default_rng(0).normal(size=(40, 96))).astype(dtype)
    exact = np.sqrt(np.sum(np.square(x.astype(np.longdouble)), axis=1))
    np.testing.assert_allclose(lengths(x), exact.astype(np.float64), rtol=1e-14)
    unit = normalize(x, dtype=np.float64)
    wanted = (x / exact[:, None]).astype(np.float64)
    np.testing.assert_allclose(unit, wanted, rtol=1e-14)
    np.testing.assert_array_equal(normalize(x), unit.astype(np.float32))
    assert (lengths(x).dtype, unit.dtype, normalize(x).dtype) == (
        np.float64,
        np.float64,
        np.float32,
    )


def test_zeros_stay_zeros_and_float32_does_not_overflow():
    x = np.zeros((3, 4), np.float32)
    x[1] = 1e30  # its square is no float32
    np.testing.assert_array_equal(normalize(x), [[0] * 4, [0.5] * 4, [0] * 4])
    assert lengths(x).tolist() == pytest.approx([0, 2e30, 0], rel=1e-6)
