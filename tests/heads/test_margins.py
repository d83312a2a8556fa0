"""Margins against the papers' formulas in float64, finite differences, and at the range's ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcface_jax.config import HeadConfig
from arcface_jax.heads import margins

COSINES = np.linspace(-0.999, 0.999, 201)
NORMS = np.linspace(0.5, 120, 201)
STATE = {"norm_mean": 60.0, "norm_std": 20.0, "curriculum": 0.3}
M = 0.5


def value_and_slopes(margin, cosine=COSINES, norm=NORMS):
    """The target's value, and its derivatives in the cosine and the norm."""
    state = {name: jnp.float32(STATE[name]) for name in margin.initial_state}
    value, vjp = jax.vjp(
        lambda z, n: margin.target(z, n, state),
        jnp.asarray(cosine, jnp.float32),
        jnp.asarray(norm, jnp.float32),
    )
    return tuple(np.asarray(a) for a in (value, *vjp(jnp.ones_like(value))))


def adaface(cosine, norm):
    quality = np.clip((np.clip(norm, 1e-3, 100) - 60) / (20 + 1e-3) * 0.333, -1, 1)
    angle = np.clip(np.arccos(cosine) - M * quality, 1e-3, np.pi - 1e-3)
    return np.cos(angle) - (M * quality + M)


def magface(cosine, norm):
    m = 0.45 + (0.8 - 0.45) * (np.clip(norm, 10, 110) - 10) / 100
    angle = np.arccos(cosine)
    return np.where(angle + m < np.pi, np.cos(angle + m), cosine - m * np.sin(m))


def curricularface(cosine, _):
    angle = np.arccos(cosine)
    return np.where(angle + M < np.pi, np.cos(angle + M), cosine - M * np.sin(M))


FORMULAS = {
    "arcface": (
        HeadConfig(loss="arcface", gradient="exact"),
        lambda c, n: np.cos(np.arccos(c) + M),
    ),
    "arcface-2022": (
        HeadConfig(loss="arcface", gradient="exact", beyond_pi="linear"),
        curricularface,
    ),
    "cosface": (HeadConfig(loss="cosface", margin=0.4), lambda c, n: c - 0.4),
    "combined": (
        HeadConfig(loss="combined", margins=(1.2, 0.3, 0.1), gradient="exact"),
        lambda c, n: np.cos(1.2 * np.arccos(c) + 0.3) - 0.1,
    ),
    "adaface": (HeadConfig(loss="adaface"), adaface),
    "magface": (HeadConfig(loss="magface"), magface),
    "curricularface": (HeadConfig(loss="curricularface"), curricularface),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_value_is_that_of_the_formula(name):
    config, formula = FORMULAS[name]
    value, *_ = value_and_slopes(margins.make(config))
    np.testing.assert_allclose(value, formula(COSINES, NORMS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_exact_slopes_are_those_of_finite_differences(name):
    config, formula = FORMULAS[name]
    step = 1e-6
    by_cosine = (formula(COSINES + step, NORMS) - formula(COSINES - step, NORMS)) / (2 * step)
    by_norm = (formula(COSINES, NORMS + step) - formula(COSINES, NORMS - step)) / (2 * step)
    if name == "adaface":  # no gradient passes through the quality
        by_norm = np.zeros_like(by_norm)
    _, slope, norm_slope = value_and_slopes(margins.make(config))
    smooth = np.abs(by_cosine) < 100  # not across a jump at pi
    assert smooth.sum() > 195
    np.testing.assert_allclose(slope[smooth], by_cosine[smooth], rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(norm_slope[smooth], by_norm[smooth], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", ["arcface", "combined"])
def test_the_straight_through_gradient_is_one(loss):
    config = HeadConfig(loss=loss, gradient="straight_through")
    exact = HeadConfig(loss=loss, gradient="exact")
    value, slope, _ = value_and_slopes(margins.make(config))
    np.testing.assert_array_equal(slope, 1)
    np.testing.assert_allclose(value, value_and_slopes(margins.make(exact))[0], atol=2e-7)


def test_beyond_pi_linear_rises_with_the_cosine_everywhere():
    none, linear = (
        value_and_slopes(margins.make(HeadConfig(gradient="exact", beyond_pi=name)))[:2]
        for name in ("none", "linear")
    )
    beyond = np.arccos(COSINES) + M > np.pi
    assert 10 < beyond.sum() < 190
    assert np.all(np.diff(linear[0]) > 0) and not np.all(np.diff(none[0]) > 0)
    np.testing.assert_array_equal(linear[1][beyond], 1)
    np.testing.assert_array_equal(linear[0][~beyond], none[0][~beyond])


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("norm", [0.0, 1e-3, 1e6])
def test_both_ends_of_the_range_are_finite(name, norm):
    ends = np.array([-1.0, -1 + 1e-7, 1 - 1e-7, 1.0])
    outcome = value_and_slopes(margins.make(FORMULAS[name][0]), ends, np.full(4, norm))
    assert all(np.isfinite(array).all() for array in outcome)


def test_magface_pulls_the_length_of_embeddings_upwards():
    extra = margins.make(HeadConfig(loss="magface", magface_weight=2.0)).extra_loss
    assert extra is not None
    a = np.clip(NORMS, 10, 110)
    given = extra(jnp.asarray(NORMS, jnp.float32))
    np.testing.assert_allclose(given, 2 * (a / 110**2 + 1 / a), rtol=1e-6)
    assert (np.diff(given) <= 0).all()


def test_adaface_keeps_running_statistics_of_the_batch():
    margin = margins.make(HeadConfig(loss="adaface", ema=0.1))
    norm = jnp.asarray([10.0, 20.0, 60.0, 999.0])
    counts = jnp.asarray([True, True, True, False])
    state = {name: jnp.float32(value) for name, value in margin.initial_state.items()}
    moved = margin.update(state, jnp.zeros(4), norm, counts)
    assert float(moved["norm_mean"]) == pytest.approx(0.9 * 20 + 0.1 * 30)
    assert float(moved["norm_std"]) == pytest.approx(0.9 * 100 + 0.1 * np.std([10, 20, 60], ddof=1))
    unmoved = margin.update(state, jnp.zeros(4), norm, jnp.zeros(4, bool))
    assert unmoved == state


def test_curricularface_raises_the_others_that_are_too_near():
    margin = margins.make(HeadConfig(loss="curricularface", ema=0.2))
    assert margin.negatives is not None and margin.negatives_need_target
    target = jnp.asarray([[0.8], [0.1]])
    others = jnp.asarray([[0.9, 0.3, -0.2], [0.9, 0.3, -0.5]])
    given = margin.negatives(others, target, {"curriculum": jnp.float32(0.3)})
    # cos(arccos(0.8) + 0.5) = 0.414, cos(arccos(0.1) + 0.5) = -0.389
    expected = [[0.9 * 1.2, 0.3, -0.2], [0.9 * 1.2, 0.3 * 0.6, -0.5]]
    np.testing.assert_allclose(given, expected, rtol=1e-6)
    state = margin.update(
        {"curriculum": jnp.float32(0.3)},
        jnp.asarray([0.8, 0.1, 9.0]),
        jnp.ones(3),
        jnp.arange(3) < 2,
    )
    assert float(state["curriculum"]) == pytest.approx(0.8 * 0.3 + 0.2 * 0.45)


def test_filtered_cosines_count_as_zero_in_front_of_the_margin():
    margin = margins.make(HeadConfig(interclass_filtering_threshold=0.4))
    assert margin.negatives is not None
    cosine = jnp.asarray([[0.5, 0.4, -0.9]])
    np.testing.assert_allclose(margin.negatives(cosine, jnp.ones((1, 1)), {}), [[0, 0.4, -0.9]])
    both = margins.make(HeadConfig(loss="curricularface", interclass_filtering_threshold=0.4))
    assert both.negatives is not None and both.negatives_need_target
    given = both.negatives(cosine, -jnp.ones((1, 1)), {"curriculum": jnp.float32(0.1)})
    np.testing.assert_allclose(given, [[0, 0.4 * 0.5, -0.9]], rtol=1e-6)
