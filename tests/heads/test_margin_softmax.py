"""The sharded head against the dense formula in float64, in every form it can take."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import KEY, Case, assert_equal, error, expected, make_case, run

from arcface_jax.config import HeadConfig, OptimizerConfig
from arcface_jax.heads import margins, partial_fc

SGD = OptimizerConfig()
ADAMW = OptimizerConfig(kind="adamw", weight_decay=0.1)
OPTIMIZERS = {"sgd": SGD, "adamw": ADAMW}
slow = pytest.mark.slow
EXACT = HeadConfig(dtype="float32", gradient="exact", block_size=8)


def pairs_quick_rest_slow(first, second, third, *, quick: int) -> list:
    """All combinations of values, two of the second and third; `quick` of them are not slow.

    Of each value of the first there are two quick ones, which differ in both of the others and
    whose pairs alternate: so the quick ones hold all pairs of two values.
    """
    params = []
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            for k, c in enumerate(third):
                is_quick = 2 * i < quick and (i + j + k) % 2 == 0
                params.append(pytest.param(a, b, c, marks=() if is_quick else slow))
    return params


def head(**changes) -> HeadConfig:
    return HeadConfig(**({"dtype": "float32", "gradient": "exact", "block_size": 8} | changes))


# 101 is divided by no device count; with 7, one of eight devices has no class at all.
@pytest.mark.parametrize(
    ("devices", "num_classes", "optimizer"),
    pairs_quick_rest_slow([1, 3, 8, 2], [101, 7], OPTIMIZERS, quick=6),
)
def test_any_number_of_devices_equals_the_dense_formula(devices, num_classes, optimizer):
    optimizer = OPTIMIZERS[optimizer]
    case = make_case(num_classes, EXACT, optimizer)
    out = run(case, EXACT, optimizer, devices=devices, step=3)
    assert_equal(out, expected(case, EXACT, optimizer, step=3), tolerance=1e-5)


EVERY_LOSS = {
    "straight-through": head(gradient="straight_through"),
    "beyond-pi": head(beyond_pi="linear", margin=1.2),
    "cosface": head(loss="cosface", margin=0.4),
    "combined": head(loss="combined", margins=(1.1, 0.2, 0.1), scale=30.0),
    "adaface": head(loss="adaface", margin=0.4),
    "magface": head(loss="magface"),
    "curricularface": head(loss="curricularface"),
    "filtered": head(interclass_filtering_threshold=0.3),
    "subcenters": head(subcenters=3),
    "subcenters-curricular-filtered": head(
        loss="curricularface", subcenters=2, interclass_filtering_threshold=0.4
    ),
    "magface-subcenters": head(loss="magface", subcenters=2, magface_norms=(5.0, 14.0)),
}


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_every_margin_equals_the_dense_formula(name):
    config = EVERY_LOSS[name]
    case = make_case(101, config, SGD)
    out = run(case, config, SGD, devices=3)
    assert_equal(out, expected(case, config, SGD), tolerance=1e-5)


@pytest.mark.parametrize("block_size", [1, 51, pytest.param(64, marks=slow), 4096])
def test_the_block_size_changes_no_result(block_size):
    case = make_case(101, EXACT, SGD)
    out = run(case, head(block_size=block_size), SGD, devices=2)
    assert_equal(out, expected(case, EXACT, SGD), tolerance=1e-5)


def sampled_classes(case: Case, config: HeadConfig, *, devices: int, step: int) -> np.ndarray:
    """Which classes the head draws; that they are well drawn is test_partial_fc's matter."""
    num_classes = len(case.centers.rows) // config.subcenters
    counts = partial_fc.classes_by_device(num_classes, devices)
    sizes = partial_fc.sample_sizes(num_classes, devices, config.sample_rate)
    stored = int(counts.max())
    key = jax.random.fold_in(jax.random.key(KEY), step)
    slots = partial_fc.num_slots(stored, len(case.labels), int(sizes.max()))
    draw = jax.jit(partial(partial_fc.draw, stored=stored, slots=slots))
    drawn = []
    for device in range(devices):
        local = case.labels - device * stored
        target = np.where((local >= 0) & (local < counts[device]), local, -1)
        sample = draw(
            jax.random.fold_in(key, device), target, used=counts[device], wanted=sizes[device]
        )
        listed = np.asarray(sample.listed)
        drawn.append(listed[listed >= 0] + device * stored)
    return np.concatenate(drawn)


@pytest.mark.parametrize(
    ("given", "unsampled", "optimizer"),
    pairs_quick_rest_slow(
        [(1, 0.1), (3, 0.0), (8, 0.5)], ["untouched", "decayed"], OPTIMIZERS, quick=6
    ),
)
def test_a_sampled_head_is_the_dense_formula_of_its_classes(given, unsampled, optimizer):
    (devices, rate), optimizer = given, OPTIMIZERS[optimizer]
    config = head(sample_rate=rate, unsampled=unsampled)
    case = make_case(301, config, optimizer)
    classes = sampled_classes(case, config, devices=devices, step=2)
    assert len(classes) < 301 and set(case.labels) <= set(classes.tolist())
    out = run(case, config, optimizer, devices=devices, step=2)
    wanted = expected(case, config, optimizer, classes=classes, step=2)
    assert_equal(out, wanted, tolerance=1e-5)
    if unsampled == "untouched":
        rest = np.setdiff1d(np.arange(301), classes)
        np.testing.assert_array_equal(out["centers"][rest], case.centers.rows[rest])
        for name, moment in case.centers.moments.items():
            np.testing.assert_array_equal(out[name][rest], moment[rest])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["subcenters-curricular-filtered", "magface-subcenters"])
def test_sampling_goes_with_every_margin(name):
    config = head(**vars(EVERY_LOSS[name]) | {"sample_rate": 0.3})
    case = make_case(101, config, SGD)
    classes = sampled_classes(case, config, devices=3, step=0)
    out = run(case, config, SGD, devices=3)
    assert_equal(out, expected(case, config, SGD, classes=classes), tolerance=1e-5)


def test_other_steps_draw_other_negatives():
    config = head(sample_rate=0.3)
    case = make_case(301, config, SGD)
    first, again, second = (run(case, config, SGD, devices=3, step=step) for step in (0, 0, 1))
    np.testing.assert_array_equal(first["centers"], again["centers"])
    moved = [np.any(out["centers"] != case.centers.rows, axis=1) for out in (first, second)]
    assert (moved[0] != moved[1]).sum() > 50


@pytest.mark.parametrize(
    ("devices", "rate"), [(8, 1.0), (8, 0.3), pytest.param(1, 0.3, marks=slow)]
)
def test_a_label_outside_the_classes_takes_no_part(devices, rate):
    config = head(sample_rate=rate)
    case = make_case(101, config, SGD)
    case.labels[:3] = [-1, 101, 103]  # 103 is a row of padding on eight devices
    classes = None if rate == 1 else sampled_classes(case, config, devices=devices, step=0)
    out = run(case, config, SGD, devices=devices)
    assert_equal(out, expected(case, config, SGD, classes=classes), tolerance=1e-5)
    np.testing.assert_array_equal(out["d_embeddings"][:3], 0)
    assert out["invalid_labels"] == 3


def test_a_batch_of_unknown_labels_changes_centers_by_momentum_and_decay_alone():
    case = make_case(101, EXACT, SGD)
    case.labels[:] = -1
    out = run(case, EXACT, SGD, devices=2)
    assert out["loss"] == 0 and not out["d_embeddings"].any()
    momentum = SGD.momentum * case.centers.moments["momentum"]
    momentum += SGD.weight_decay * case.centers.rows
    np.testing.assert_allclose(out["momentum"], momentum, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("optimizer", "rate", "unsampled"),
    [
        pytest.param(SGD, 1.0, "untouched", id="full"),
        pytest.param(ADAMW, 0.3, "untouched", id="sampled", marks=slow),
        pytest.param(ADAMW, 0.3, "decayed", id="decayed"),
    ],
)
def test_an_embedding_that_is_not_finite_leaves_the_centers_alone(optimizer, rate, unsampled):
    config = head(loss="curricularface", sample_rate=rate, unsampled=unsampled)
    case = make_case(101, config, optimizer)
    case.embeddings[5, 3] = np.nan
    out = run(case, config, optimizer, devices=3)
    assert np.isnan(out["loss"])
    for name, before in [
        ("centers", case.centers.rows),
        *case.centers.moments.items(),
        *case.centers.state.items(),
    ]:
        np.testing.assert_array_equal(out[name], before)


def test_a_class_that_is_all_alone_has_no_loss():
    case = make_case(1, EXACT, SGD)
    out = run(case, EXACT, SGD, devices=1)
    assert out["loss"] == 0 and out["accuracy"] == 1
    assert not out["d_embeddings"].any()


def test_curricularface_reaches_beyond_what_exp_can_hold():
    """Its others reach 2 s = 128, and exp(128) is no float32."""
    config = head(loss="curricularface")
    case = make_case(101, config, SGD)
    case.centers.rows[50] = case.embeddings[0]
    case.centers.state["curriculum"] = np.float32(1.0)
    case.labels[0] = 7
    out = run(case, config, SGD, devices=3)
    assert out["loss"] > 5 and np.isfinite(out["d_embeddings"]).all()
    assert_equal(out, expected(case, config, SGD), tolerance=1e-5)


def trained(case: Case, *, cosine: float) -> Case:
    """Embeddings at the cosine given to their centers."""
    centers = case.centers.rows[case.labels]
    centers = centers / np.linalg.norm(centers, axis=1, keepdims=True)
    noise = case.embeddings - centers * np.sum(case.embeddings * centers, axis=1, keepdims=True)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    mixed = cosine * centers + np.sqrt(1 - cosine**2) * noise
    return case._replace(embeddings=(20 * mixed).astype(np.float32))


def test_a_trained_head_keeps_its_precision():
    """Targets near cosine 1: the loss is small, and exp() of the target large."""
    case = trained(make_case(101, EXACT, SGD, size=64), cosine=0.97)
    wanted = expected(case, EXACT, SGD)
    assert wanted["loss"] < 1e-3
    assert_equal(run(case, EXACT, SGD, devices=8), wanted, tolerance=2e-5)


# The largest errors allowed, relative for gradients and absolute for the loss (docs/head.md).
ALLOWED = {
    "float32": {"loss": 5e-5, "d_embeddings": 1e-5, "momentum": 1e-5},
    "bfloat16": {"loss": 2e-2, "d_embeddings": 2e-2, "momentum": 2e-2},
    "float16": {"loss": 3e-3, "d_embeddings": 3e-3, "momentum": 3e-3},
}


def assert_precise(
    dtype: str, *, num_classes: int, size: int, cosine: float | None, form: str = "unit"
) -> None:
    config = head(dtype=dtype, block_size=2048, block_form=form, loss="cosface", margin=0.4)
    optimizer = OptimizerConfig(momentum=0.0, weight_decay=0.0)  # the momentum is the gradient
    case = make_case(num_classes, config, optimizer, batch=32, size=size)
    if cosine is not None:
        case = trained(case, cosine=cosine)
    out, wanted = run(case, config, optimizer, devices=2), expected(case, config, optimizer)
    assert abs(out["loss"] - wanted["loss"]) <= ALLOWED[dtype]["loss"]
    for name in ("d_embeddings", "momentum"):
        assert error(out[name], wanted[name]) <= ALLOWED[dtype][name], name
    # What is flushed to zero, as float16 does below 7e-12 of probability, is next to nothing.
    gradient = np.linalg.norm(wanted["momentum"], axis=1)
    flushed = ~np.any(out["momentum"], axis=1) & (gradient > 1e-12)
    assert gradient[flushed].sum() <= 1e-8 * gradient.sum()
    assert flushed.sum() <= (0.001 if num_classes < 1e6 else 0.1) * num_classes


@pytest.mark.parametrize(
    ("dtype", "cosine"),
    [
        pytest.param("float32", None, id="untrained-float32"),
        pytest.param("float32", 0.75, id="trained-float32", marks=slow),
        pytest.param("bfloat16", None, id="untrained-bfloat16"),
        pytest.param("bfloat16", 0.75, id="trained-bfloat16"),
        pytest.param("float16", None, id="untrained-float16", marks=slow),
        pytest.param("float16", 0.75, id="trained-float16"),
    ],
)
def test_operands_of_every_type_are_as_precise_as_promised(dtype, cosine):
    assert_precise(dtype, num_classes=20_000, size=512, cosine=cosine)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["scaled", "powers"])
@pytest.mark.parametrize("cosine", [None, 0.75], ids=["untrained", "trained"])
def test_the_forms_of_gpus_are_as_precise_as_promised(form, cosine):
    assert_precise("bfloat16", num_classes=20_000, size=512, cosine=cosine, form=form)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("cosine", [None, 0.75], ids=["untrained", "trained"])
def test_a_million_classes_are_as_precise(dtype, cosine):
    assert_precise(dtype, num_classes=1_000_000, size=64, cosine=cosine)  # 512 take 30 GiB


def arccos_without_a_bound(config: HeadConfig) -> margins.Margin:
    return margins.Margin(lambda cosine, norm, state: jnp.cos(jnp.arccos(cosine) + config.margin))


def test_a_finite_loss_with_an_infinite_gradient_leaves_the_centers():
    config = head(loss=f"{__name__}:arccos_without_a_bound")
    case = make_case(101, config, SGD)
    case.embeddings[0] = case.centers.rows[case.labels[0]] = 1  # a cosine of exactly 1
    out = run(case, config, SGD, devices=2)
    assert np.isfinite(out["loss"])
    assert np.isnan(out["d_embeddings"]).all()  # so that the backbone skips the step
    np.testing.assert_array_equal(out["centers"], case.centers.rows)
    np.testing.assert_array_equal(out["momentum"], case.centers.moments["momentum"])


def shrinking(config: HeadConfig) -> margins.Margin:
    """The others' cosines times a state that the first update lowers from 1 to 0.5."""
    return margins.Margin(
        lambda cosine, norm, state: cosine,
        negatives=lambda cosine, own, state: cosine * state["factor"],
        initial_state={"factor": 1.0},
        update=lambda state, *_: {"factor": state["factor"] / 2},
    )


def halving(config: HeadConfig) -> margins.Margin:
    return margins.Margin(
        lambda cosine, norm, state: cosine, negatives=lambda cosine, own, state: cosine / 2
    )


def test_negatives_see_the_updated_state_also_if_they_need_no_target():
    config = head(loss=f"{__name__}:shrinking")
    case = make_case(101, replace(config, loss="arcface"), SGD)
    stateful = case._replace(centers=case.centers._replace(state={"factor": np.float32(1)}))
    out = run(stateful, config, SGD, devices=2)
    wanted = run(case, head(loss=f"{__name__}:halving"), SGD, devices=2)
    assert out.pop("factor") == 0.5
    assert_equal(out, wanted, tolerance=1e-6)


def test_filtering_does_not_make_the_others_wait_for_the_state():
    filtered = {"interclass_filtering_threshold": 0.4}
    assert not margins.make(head(loss="adaface", **filtered)).negatives_need_state
    assert margins.make(head(loss="curricularface", **filtered)).negatives_need_state


def test_every_loss_of_the_configuration_is_tested():
    losses = {config.loss for config in EVERY_LOSS.values()}
    assert losses == {"arcface", "cosface", "combined", "adaface", "magface", "curricularface"}
    assert all(margins.make(config) for config in EVERY_LOSS.values())
