"""The forms of a block's product and the tiles of a batch, against the dense formula in float64."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from dense import assert_equal, compile_head, error, expected, make_case, run

from arcface_jax.config import HeadConfig, OptimizerConfig
from arcface_jax.errors import ConfigError
from arcface_jax.heads import automatic, block_passes, margins
from arcface_jax.runtime import devices as meshes

SGD = OptimizerConfig()
ADAMW = OptimizerConfig(kind="adamw", weight_decay=0.1)


def head(form: str, **changes) -> HeadConfig:
    fixed = {"dtype": "float32", "gradient": "exact", "block_size": 8, "block_form": form}
    return HeadConfig(**(fixed | changes))


slow = pytest.mark.slow


# 101 classes on three devices: the last block overlaps the one before it, and there is padding.
@pytest.mark.parametrize(
    ("form", "optimizer", "devices"),
    [
        pytest.param("scaled", SGD, 3, id="scaled-sgd-3"),
        pytest.param("powers", ADAMW, 3, id="powers-adamw-3"),
        pytest.param("scaled", ADAMW, 1, id="scaled-adamw-1", marks=slow),
        pytest.param("powers", SGD, 1, id="powers-sgd-1", marks=slow),
        pytest.param("powers", SGD, 8, id="powers-sgd-8", marks=slow),
    ],
)
def test_every_form_equals_the_dense_formula(form, optimizer, devices):
    config = head(form)
    case = make_case(101, config, optimizer)
    case.labels[:2] = [-1, 101]
    out = run(case, config, optimizer, devices=devices, step=3)
    assert_equal(out, expected(case, config, optimizer, step=3), tolerance=1e-5)


def test_lengths_are_divided_out_after_the_product_under_every_change_of_the_others():
    config = head("scaled", loss="curricularface", subcenters=2, interclass_filtering_threshold=0.4)
    case = make_case(101, config, SGD)
    out = run(case, config, SGD, devices=3)
    assert_equal(out, expected(case, config, SGD), tolerance=1e-5)


@pytest.mark.parametrize(
    ("form", "unsampled"),
    [
        ("powers", "untouched"),
        pytest.param("powers", "decayed", marks=slow),
        pytest.param("scaled", "untouched", marks=slow),
        pytest.param("scaled", "decayed", marks=slow),
    ],
)
def test_a_sample_is_visited_in_every_form(form, unsampled):
    config = head(form, sample_rate=0.3, unsampled=unsampled)
    case = make_case(301, config, ADAMW)
    out = run(case, config, ADAMW, devices=3)
    wanted = run(case, replace(config, block_form="unit"), ADAMW, devices=3)
    assert_equal(out, wanted, tolerance=1e-5)


@pytest.mark.parametrize(
    ("form", "changes", "separate"),
    [
        pytest.param("powers", {}, False, id="powers-one-pass"),
        pytest.param("scaled", {"subcenters": 3, "loss": "adaface"}, True, id="scaled-own-pass"),
        pytest.param("powers", {}, True, id="powers-own-pass", marks=slow),
        pytest.param("powers", {"sample_rate": 0.5}, True, id="sampled-own-pass", marks=slow),
        pytest.param("unit", {"loss": "curricularface"}, True, id="unit-own-pass", marks=slow),
        pytest.param("unit", {"loss": "curricularface"}, False, id="unit-one-pass", marks=slow),
    ],
)
def test_tiles_of_the_batch_change_no_result(monkeypatch, form, changes, separate):
    config = head(form, **changes)
    case = make_case(101, config, SGD, batch=48)
    whole = run(case, config, SGD, devices=3)
    wanted = whole if "sample_rate" in changes else expected(case, config, SGD)
    monkeypatch.setattr(automatic, "_TILE_BYTES", 4 * 8 * config.subcenters * 12)
    assert automatic.tiles(config, batch=48, devices=3) == 4
    if separate:
        monkeypatch.setattr(block_passes, "_LARGEST_D_X", 0)
    assert_equal(run(case, config, SGD, devices=3), wanted, tolerance=1e-5)


def test_an_embedding_that_is_not_finite_leaves_the_centers_where_one_loop_moves_them():
    config = head("powers", dtype="bfloat16")
    case = make_case(101, config, ADAMW)
    case.embeddings[5, 3] = np.nan
    out = run(case, config, ADAMW, devices=3)
    np.testing.assert_array_equal(out["centers"], case.centers.rows)
    for name, moment in case.centers.moments.items():
        np.testing.assert_array_equal(out[name], moment)


def test_a_class_that_is_all_alone_has_no_power_beside_it():
    config = head("powers")
    out = run(make_case(1, config, SGD), config, SGD, devices=1)
    assert out["loss"] == 0 and out["hardest_negative_cosine"] == -1
    assert not out["d_embeddings"].any()


def test_a_gradient_reduced_in_bfloat16_is_the_same_to_its_precision():
    config = head("unit")
    case = make_case(101, config, SGD)
    whole = run(case, config, SGD, devices=4)
    half = run(case, replace(config, reduce_dtype="bfloat16"), SGD, devices=4)
    assert 0 < error(half["d_embeddings"], whole["d_embeddings"]) < 5e-3
    np.testing.assert_array_equal(half["centers"], whole["centers"])


@pytest.mark.parametrize(
    ("platform", "batch", "changes", "wanted"),
    [
        ("cpu", 1024, {}, (2048, "unit")),
        ("gpu", 128, {}, (8192, "scaled")),
        ("gpu 8.0", 128, {}, (8192, "scaled")),
        ("gpu 9.0", 128, {}, (16_384, "scaled")),
        ("gpu 10.0", 384, {}, (16_384, "scaled")),
        ("gpu", 512, {}, (8192, "powers")),
        ("cuda", 1024, {}, (8192, "powers")),
        ("gpu 9.0", 128, {"subcenters": 3}, (8192, "scaled")),
        ("gpu 9.0", 128, {"block_form": "unit"}, (8192, "unit")),
        ("gpu", 1024, {"loss": "curricularface"}, (8192, "scaled")),
        ("gpu", 1024, {"interclass_filtering_threshold": 0.4}, (8192, "scaled")),
        ("gpu", 1024, {"subcenters": 3}, (8192, "scaled")),
        ("gpu", 1024, {"dtype": "float32"}, (8192, "unit")),
        ("rocm", 128, {}, (8192, "scaled")),
        ("gpu", 128, {"dtype": "float16"}, (8192, "unit")),
        ("gpu", 128, {"block_size": 100, "block_form": "powers"}, (100, "powers")),
    ],
)
def test_automatic_settings_follow_from_platform_batch_and_head(platform, batch, changes, wanted):
    name, _, capability = platform.partition(" ")
    resolved = automatic.resolve(
        HeadConfig(**changes), platform=name, batch=batch, capability=float(capability or 0)
    )
    assert (resolved.block_size, resolved.block_form) == wanted


@pytest.mark.parametrize(
    "changes", [{"dtype": "float16"}, {"subcenters": 2}, {"loss": "curricularface"}]
)
def test_a_form_that_cannot_compute_the_head_is_refused(changes):
    config = HeadConfig(block_form="powers", **changes)
    with pytest.raises(ConfigError, match=r"head\.block_form powers .* use automatic"):
        automatic.resolve(config, platform="cpu", batch=8)


def test_float16_is_refused_where_products_are_divided_by_lengths():
    """Its gradients times 4,096 and one over a length of 0.06 exceed 65,504."""
    config = HeadConfig(block_form="scaled", dtype="float16")
    with pytest.raises(ConfigError, match=r"block_form scaled .* got float16.* use automatic"):
        automatic.resolve(config, platform="cpu", batch=8)


def test_equal_embeddings_leave_powers_finite():
    """All cosines are 1, and the margin's exact gradient over exp(-log sum) exceeds bfloat16."""
    config = head("powers", dtype="bfloat16", scale=69.0)
    case = make_case(1000, config, SGD)
    case.embeddings[:] = case.centers.rows[:] = 1
    out = run(case, config, SGD, devices=2)
    assert 15 < out["loss"] < 16  # ln 1000 + 69 (1 - cos 0.5)
    assert np.isfinite(out["centers"]).all() and np.isfinite(out["d_embeddings"]).all()
    assert (out["centers"] != 1).any()  # they were updated


def bounded_without_negatives(config: HeadConfig) -> margins.Margin:
    return margins.cosface(config.margin)._replace(negatives_bound=2.0)


def test_a_bound_without_negatives_has_no_effect():
    config = head("powers", loss=f"{__name__}:bounded_without_negatives", margin=0.4)
    case = make_case(101, config, SGD)
    wanted = expected(case, replace(config, loss="cosface"), SGD)
    assert_equal(run(case, config, SGD, devices=1), wanted, tolerance=1e-5)


@pytest.mark.parametrize(
    ("batch", "devices", "changes", "wanted"),
    [
        (1024, 8, {}, 1),
        (8192, 8, {"block_size": 2048}, 1),
        (4096, 32, {}, 2),
        (131_072, 1024, {}, 64),
        (131_072, 1024, {"subcenters": 3}, 128),  # one sample of each device, and no less
        (4098, 1, {}, 3),  # 2 would leave more than 2,048 in each
    ],
)
def test_a_tile_is_a_bounded_part_of_every_devices_samples(batch, devices, changes, wanted):
    config = HeadConfig(**({"block_size": 8192} | changes))
    assert automatic.tiles(config, batch=batch, devices=devices) == wanted


def test_a_large_batch_needs_no_array_of_its_size_but_the_embeddings():
    """65,536 samples of 512: in float32 128 MiB, and 512 MiB their products with a block."""
    config = HeadConfig(block_size=2048, loss="cosface", dtype="float32")
    split = meshes.split(meshes.make(8))
    case = make_case(8, config, SGD)

    def shape(*sizes: int, dtype: type = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=split)

    rows = shape(100_000, 512)
    lowered = compile_head(100_000, config, SGD, 8).lower(
        shape(65_536, 512),
        shape(65_536, dtype=np.int32),
        case.centers._replace(rows=rows, moments={"momentum": rows}),
        jax.ShapeDtypeStruct((), np.int32),
    )
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    embeddings, products = 128 * 2**20, 64 * 2**20
    assert memory.temp_size_in_bytes <= embeddings + 3 * products
    assert "[65536,2048]" not in compiled.as_text()
