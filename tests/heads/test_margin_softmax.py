"""The sharded head against the dense formula in float64, and what it costs in memory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcface_jax import mesh as meshes
from arcface_jax.config import HeadConfig, OptimizerConfig
from arcface_jax.heads import margin_softmax

B, D = 24, 16
RATE = 0.1
OPTIMIZER = OptimizerConfig(momentum=0.9, weight_decay=5e-4)


class Case(NamedTuple):
    embeddings: np.ndarray
    labels: np.ndarray
    centers: np.ndarray
    momentum: np.ndarray


def make_case(num_classes: int) -> Case:
    rng = np.random.default_rng(num_classes)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731 (three uses)
    labels = rng.integers(0, num_classes, B).astype(np.int32)
    return Case(normal(B, D) * 3, labels, normal(num_classes, D), normal(num_classes, D))


def dense(case: Case, head: HeadConfig) -> dict[str, np.ndarray]:
    """Loss, gradients and the SGD step in NumPy float64, from the B x C matrix of logits."""
    e, w = case.embeddings.astype(np.float64), case.centers.astype(np.float64)
    e_norm, w_norm = (np.linalg.norm(a, axis=1, keepdims=True) for a in (e, w))
    x, u = e / e_norm, w / w_norm
    rows, labels = np.arange(len(x)), case.labels
    known = (labels >= 0) & (labels < len(w))
    target = np.where(known, labels, 0)
    cosine = x @ u.T
    t = cosine[rows, target]
    if head.loss == "cosface":
        value, slope = t - head.margin, np.ones_like(t)
    else:
        angle = np.arccos(t)
        value, slope = np.cos(angle + head.margin), np.sin(angle + head.margin) / np.sin(angle)
        if head.gradient == "straight_through":
            slope = np.ones_like(t)
    logits = head.scale * cosine
    logits[rows, target] = head.scale * value
    lse = np.log(np.exp(logits).sum(1))
    d = np.exp(logits - lse[:, None])
    d[rows, target] = (d[rows, target] - 1) * slope
    d *= head.scale / len(x) * known[:, None]
    d_x, d_u = d @ u, d.T @ x
    d_e = (d_x - x * (d_x * x).sum(1, keepdims=True)) / e_norm
    d_w = (d_u - u * (d_u * u).sum(1, keepdims=True)) / w_norm
    momentum = OPTIMIZER.momentum * case.momentum + d_w + OPTIMIZER.weight_decay * w
    return {
        "loss": np.sum((lse - head.scale * value) * known) / len(x),
        "d_embeddings": d_e,
        "momentum": momentum,
        "centers": w - RATE * momentum,
        "accuracy": np.mean((cosine.argmax(1) == labels) & known),
        "target_cosine": np.sum(t * known) / len(x),
    }


def run(case: Case, head: HeadConfig, *, devices: int) -> dict[str, np.ndarray]:
    mesh = meshes.make(devices)
    num_classes = len(case.centers)
    padding = margin_softmax.padded_classes(num_classes, devices) - num_classes
    # Padding that would be seen at once if it took part.
    padded = [np.pad(a, ((0, padding), (0, 0)), constant_values=5) for a in case[2:]]
    placed = [jax.device_put(a, meshes.split(mesh)) for a in (*case[:2], *padded)]
    apply = jax.jit(
        lambda *arrays: margin_softmax.apply(
            *arrays,
            jnp.float32(RATE),
            num_classes=num_classes,
            head=head,
            optimizer=OPTIMIZER,
            mesh=mesh,
        )
    )
    out = {name: np.asarray(a) for name, a in apply(*placed)._asdict().items()}
    for name in ("centers", "momentum"):
        out[name] = out[name][:num_classes]
    return out


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def assert_equal(out: dict, expected: dict, *, tolerance: float) -> None:
    for name in ("loss", "d_embeddings", "momentum", "centers", "target_cosine"):
        assert relative_error(out[name], expected[name]) < tolerance, name
    assert out["accuracy"] == pytest.approx(expected["accuracy"])


EXACT = HeadConfig(dtype="float32", gradient="exact", block_size=8)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
# 101 is divided by no device count; with 7, one of eight devices has no class at all.
@pytest.mark.parametrize("num_classes", [101, 7])
def test_any_number_of_devices_equals_the_dense_formula(devices, num_classes):
    case = make_case(num_classes)
    assert_equal(run(case, EXACT, devices=devices), dense(case, EXACT), tolerance=5e-6)


@pytest.mark.parametrize(
    "head",
    [
        HeadConfig(dtype="float32", gradient="straight_through"),
        HeadConfig(dtype="float32", loss="cosface", margin=0.4),
        HeadConfig(dtype="float32", gradient="exact", scale=16.0, margin=0.3),
    ],
    ids=["arcface-straight-through", "cosface", "small-scale"],
)
def test_every_margin_equals_the_dense_formula(head):
    case = make_case(101)
    assert_equal(run(case, head, devices=2), dense(case, head), tolerance=5e-6)


@pytest.mark.parametrize("block_size", [1, 7, 51, 64, 4096])
def test_the_block_size_changes_no_result(block_size):
    case = make_case(101)
    head = HeadConfig(dtype="float32", gradient="exact", block_size=block_size)
    assert_equal(run(case, head, devices=2), dense(case, EXACT), tolerance=5e-6)


def test_bfloat16_operands_stay_close():
    case = make_case(101)
    head = HeadConfig(dtype="bfloat16", gradient="exact", block_size=8)
    out, expected = run(case, head, devices=3), dense(case, EXACT)
    assert abs(out["loss"] - expected["loss"]) < 0.2  # of about 50; s = 64 times 2^-9
    assert relative_error(out["d_embeddings"], expected["d_embeddings"]) < 0.02
    assert relative_error(out["centers"], expected["centers"]) < 0.01


@pytest.mark.parametrize("devices", [1, 8])
def test_a_label_outside_the_classes_takes_no_part(devices):
    case = make_case(101)
    case.labels[:3] = [-1, 101, 103]  # 103 is a row of padding on eight devices
    out = run(case, EXACT, devices=devices)
    assert_equal(out, dense(case, EXACT), tolerance=5e-6)
    np.testing.assert_array_equal(out["d_embeddings"][:3], 0)


def test_a_trained_head_keeps_its_precision():
    """Targets near cosine 1: the loss is small, and exp() of the target large."""
    case = make_case(101)
    noise = 0.1 * np.random.default_rng(0).normal(size=(B, D)).astype(np.float32)
    case = case._replace(embeddings=case.centers[case.labels] + noise)
    expected = dense(case, EXACT)
    assert expected["accuracy"] == 1
    assert_equal(run(case, EXACT, devices=8), expected, tolerance=2e-5)


def test_initial_centers_are_the_same_on_any_number_of_devices():
    def init(devices):
        return margin_softmax.init_centers(
            jax.random.key(3), num_classes=1001, embedding_size=D, num_devices=devices
        )

    one = np.asarray(init(1))
    assert one.shape == (1001, D)
    assert abs(one.std() - 0.01) < 2e-4 and abs(one.mean()) < 2e-4
    for devices in (3, 8):
        np.testing.assert_array_equal(np.asarray(init(devices))[:1001], one)


def compiled(num_classes: int, *, block_size: int = 2048):
    mesh = meshes.make(8)
    split, everywhere = meshes.split(mesh), meshes.replicated(mesh)
    rows = margin_softmax.padded_classes(num_classes, 8)
    shape = lambda s, t=jnp.float32, to=split: jax.ShapeDtypeStruct(s, t, sharding=to)  # noqa: E731
    apply = jax.jit(
        lambda *arrays: margin_softmax.apply(
            *arrays,
            num_classes=num_classes,
            head=HeadConfig(block_size=block_size),
            optimizer=OPTIMIZER,
            mesh=mesh,
        ),
        donate_argnums=(2, 3),
    )
    return apply.lower(
        shape((1024, 512)),
        shape((1024,), jnp.int32),
        shape((rows, 512)),
        shape((rows, 512)),
        shape((), to=everywhere),
    ).compile()


def test_memory_does_not_grow_with_the_number_of_classes():
    small, large = (compiled(c).memory_analysis() for c in (1_000_000, 10_000_000))
    assert large.temp_size_in_bytes < 64 * 2**20
    assert large.temp_size_in_bytes < 1.05 * small.temp_size_in_bytes
    # Centers and momentum are updated in place: all of them come out where they came in.
    shard = 10_000_000 // 8 * 512 * 4
    assert large.alias_size_in_bytes >= 2 * shard


def test_neither_logits_nor_the_gradient_of_the_centers_exist_as_a_whole():
    text = compiled(1_000_000).as_text()
    shard = 1_000_000 // 8
    assert f"f32[{shard},512]" in text  # the centers do
    assert f"[1024,{shard}]" not in text and f"[{shard},1024]" not in text
    assert "[1024,1000000]" not in text
    # One sum for the target's cosine, one for the log-sum-exp, one maximum for the accuracy.
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") <= 3
