"""Margins against arccos in float64, finite differences, and at the ends of the range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcface_jax.config import HeadConfig
from arcface_jax.heads import margins

COSINES = np.linspace(-0.999, 0.999, 201)
MARGIN = 0.5


def value_and_slope(margin, cosine):
    value, pull = jax.vjp(margin, jnp.asarray(cosine, jnp.float32))
    return np.asarray(value), np.asarray(pull(jnp.ones_like(value))[0])


def test_cosface_subtracts_the_margin_and_passes_the_gradient():
    value, slope = value_and_slope(margins.cosface(0.4), COSINES)
    np.testing.assert_allclose(value, COSINES - 0.4, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(slope, 1)


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_arcface_adds_the_margin_to_the_angle(gradient):
    value, _ = value_and_slope(margins.arcface(MARGIN, gradient=gradient), COSINES)
    np.testing.assert_allclose(value, np.cos(np.arccos(COSINES) + MARGIN), rtol=0, atol=1e-6)


def test_the_exact_gradient_is_that_of_the_formula():
    step = 1e-6
    ahead, behind = (np.cos(np.arccos(COSINES + d) + MARGIN) for d in (step, -step))
    _, slope = value_and_slope(margins.arcface(MARGIN, gradient="exact"), COSINES)
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=2e-4, atol=1e-4)


def test_the_straight_through_gradient_is_one():
    _, slope = value_and_slope(margins.arcface(MARGIN, gradient="straight_through"), COSINES)
    np.testing.assert_array_equal(slope, 1)


def test_beyond_pi_linear_continues_with_a_line_that_falls_with_the_cosine():
    value, slope = value_and_slope(
        margins.arcface(MARGIN, gradient="exact", beyond_pi="linear"), COSINES
    )
    angle = np.arccos(COSINES)
    beyond = angle + MARGIN > np.pi
    assert 10 < beyond.sum() < 190
    expected = np.where(beyond, COSINES - MARGIN * np.sin(np.pi - MARGIN), np.cos(angle + MARGIN))
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(slope[beyond], 1)
    assert np.all(np.diff(value) > 0)


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("beyond_pi", ["none", "linear"])
def test_both_ends_of_the_range_are_finite(gradient, beyond_pi):
    margin = margins.arcface(MARGIN, gradient=gradient, beyond_pi=beyond_pi)
    value, slope = value_and_slope(margin, [-1.0, 1.0])
    assert np.isfinite(value).all() and np.isfinite(slope).all()
    assert value[1] == pytest.approx(np.cos(MARGIN), abs=1e-6)


def test_the_configuration_names_the_margin():
    cosine = jnp.array([0.3])
    made = margins.make(HeadConfig(loss="cosface", margin=0.35))(cosine)
    assert float(made[0]) == pytest.approx(-0.05, abs=1e-7)
    made = margins.make(HeadConfig(loss="arcface", margin=0.2))(cosine)
    assert float(made[0]) == pytest.approx(np.cos(np.arccos(0.3) + 0.2), abs=1e-6)
