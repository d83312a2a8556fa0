"""Schedules against plain formulas at every step; the optimizer against torch's SGD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from arcface_jax.config import OptimizerConfig, ScheduleConfig
from arcface_jax.training.optim import make_optimizer, make_schedule

BASE = 0.2
STEPS_PER_EPOCH = 7


def rates(config: ScheduleConfig) -> np.ndarray:
    schedule = jax.jit(make_schedule(config, base_rate=BASE, steps_per_epoch=STEPS_PER_EPOCH))
    given = [schedule(jnp.int32(k)) for k in range(config.epochs * STEPS_PER_EPOCH)]
    assert {(rate.shape, rate.dtype) for rate in given} == {((), jnp.float32.dtype)}
    return np.array(given)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("warmup_epochs", [0.0, 1.0, 0.5, 2.9])
def test_polynomial_decay_behind_a_linear_warm_up(power: float, warmup_epochs: float):
    config = ScheduleConfig(epochs=3, warmup_epochs=warmup_epochs, power=power)
    total, warm = 21, {0.0: 0, 1.0: 7, 0.5: 4, 2.9: 20}[warmup_epochs]
    expected = [
        BASE * k / warm if k < warm else BASE * ((total - k) / (total - warm)) ** power
        for k in range(total)
    ]
    np.testing.assert_allclose(rates(config), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("epochs", "steps", "warm"), [(0.0, 0, 0), (1.0, 0, 7), (0.0, 5, 5)])
def test_half_a_cosine_behind_a_warm_up_in_epochs_or_steps(epochs, steps, warm):
    config = ScheduleConfig(kind="cosine", epochs=3, warmup_epochs=epochs, warmup_steps=steps)
    expected = [
        BASE * k / warm if k < warm else BASE * (1 + np.cos(np.pi * (k - warm) / (21 - warm))) / 2
        for k in range(21)
    ]
    np.testing.assert_allclose(rates(config), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("factor", [0.1, 0.5])
@pytest.mark.parametrize("warmup_epochs", [0.0, 1.0, 2.0, 3.0])
def test_step_decay_at_the_beginning_of_epochs(factor: float, warmup_epochs: float):
    config = ScheduleConfig(
        kind="step",
        epochs=6,
        warmup_epochs=warmup_epochs,
        decay_epochs=(2, 5),
        decay_factor=factor,
    )
    warm = int(warmup_epochs * 7)
    expected = []
    for k in range(42):
        behind = (k >= 14) + (k >= 35)
        expected.append(BASE * k / warm if k < warm else BASE * factor**behind)
    np.testing.assert_allclose(rates(config), expected, rtol=2e-6, atol=0)


def test_step_decay_without_epochs_is_constant():
    np.testing.assert_allclose(rates(ScheduleConfig(kind="step", epochs=2)), BASE, rtol=1e-7)


def test_decay_epochs_behind_the_last_do_nothing():
    config = ScheduleConfig(kind="step", epochs=2, decay_epochs=(9, 2**31 - 1))
    np.testing.assert_allclose(rates(config), BASE, rtol=1e-7)


def test_the_rate_behind_the_last_step_is_zero():
    schedule = make_schedule(ScheduleConfig(epochs=2), base_rate=BASE, steps_per_epoch=3)
    assert float(schedule(jnp.int32(6))) == 0
    assert float(schedule(jnp.int32(60))) == 0


SHAPES = {"conv.kernel": (3, 3, 4, 8), "bn.scale": (8,), "bn.bias": (8,), "fc.kernel": (20, 6)}


def norm(gradients: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradients.values())))


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(momentum=0.9, weight_decay=5e-4, clip_norm=5.0),
        OptimizerConfig(momentum=0.9, weight_decay=0.1, clip_norm=2.0),
        OptimizerConfig(momentum=0.0, weight_decay=1e-2, clip_norm=5.0),
        OptimizerConfig(momentum=0.5, weight_decay=0.0, clip_norm=1e6),
        OptimizerConfig(kind="adamw", weight_decay=0.1, clip_norm=5.0),
        OptimizerConfig(kind="adamw", weight_decay=0.0, betas=(0.8, 0.95), epsilon=1e-4),
    ],
    ids=["sgd", "sgd-decay", "sgd-plain", "sgd-unclipped", "adamw", "adamw-betas"],
)
def test_ten_updates_equal_those_of_torch(config):
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    tensors = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
    decay, clip_norm = config.weight_decay, config.clip_norm
    if config.kind == "sgd":
        reference = torch.optim.SGD(
            tensors.values(), lr=1.0, momentum=config.momentum, weight_decay=decay
        )
    else:
        reference = torch.optim.AdamW(
            tensors.values(), lr=1.0, betas=config.betas, eps=config.epsilon, weight_decay=decay
        )
    optimizer = make_optimizer(config)
    update = jax.jit(optimizer.update)
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    norms = []
    for k in range(10):
        size = (0.02, 1.5)[k % 2]
        gradients = {
            name: (size * rng.normal(size=shape)).astype(np.float32)
            for name, shape in SHAPES.items()
        }
        norms.append(norm(gradients))
        rate = 0.3 / (k + 1)

        updates, state = update(jax.tree.map(jnp.asarray, gradients), state, params)
        params = {name: params[name] - rate * updates[name] for name in params}

        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(tensors.values(), clip_norm)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        for name, tensor in tensors.items():
            np.testing.assert_allclose(
                params[name],
                tensor.detach().numpy(),
                rtol=1e-5,
                # optax corrects AdamW's first means by 1 - beta^k in float32, wrong by 5e-5.
                atol=2e-6 if config.kind == "sgd" else 2e-5,
                err_msg=f"{name}, {k}",
            )
    if clip_norm < 10:
        assert min(norms) < clip_norm < max(norms)


def test_one_clipped_update_by_hand():
    optimizer = make_optimizer(OptimizerConfig(momentum=0.9, weight_decay=0.1, clip_norm=5.0))
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    # The norm of all arrays together is 13; each alone is (3, 4 -> 5) and 12.
    gradients = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
    update, state = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(update["a"], [15 / 13 + 0.1, 20 / 13 + 0.2], rtol=1e-6)
    np.testing.assert_allclose(update["b"], [60 / 13 + 0.3], rtol=1e-6)
    again, _ = optimizer.update({"a": jnp.zeros(2), "b": jnp.zeros(1)}, state, params)
    np.testing.assert_allclose(again["b"], [0.9 * (60 / 13 + 0.3) + 0.3], rtol=1e-6)


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_rates_by_norm_equal_the_papers_formulas_in_float64(kind):
    """Each matrix by itself, the members of a stack too; vectors as sgd and adamw without decay."""
    shapes = {"conv.kernel": (3, 3, 4, 8), "layer3.1-2.bn1.scale": (2, 8), "bn.bias": (8,)}
    shapes |= {"layer3.1-2.conv1.kernel": (2, 3, 3, 4, 4), "fc.kernel": (20, 6)}
    shapes |= {"layer2.1-4.conv1.kernel": (2, 2, 3, 3, 4, 4), "layer2.1-4.bn1.bias": (2, 2, 4)}
    config = OptimizerConfig(kind=kind, weight_decay=0.1, clip_norm=1e9, momentum=0.8, trust=0.02)
    rng = np.random.default_rng(1)
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    given: dict = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    optimizer = make_optimizer(config)
    state = optimizer.init(given)
    first, second = config.betas
    memory = {name: [np.zeros(shape), np.zeros(shape)] for name, shape in shapes.items()}
    for k in range(3):
        gradients = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        updates, state = optimizer.update(
            jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradients), state, given
        )
        given = jax.tree.map(lambda p, u: p - 0.1 * u, given, updates)
        for name in shapes:
            lead = shapes[name][: {"layer3.1-2": 1, "layer2.1-4": 2}.get(name[:10], 0)]
            for member in np.ndindex(lead):
                w, g = params[name][member], gradients[name][member]
                mean, square = (m[member] for m in memory[name])
                decay = 0.1 * w if w.ndim > 1 else 0 * w
                if kind == "lamb":
                    mean[...] = first * mean + (1 - first) * g
                    square[...] = second * square + (1 - second) * g**2
                    corrected = mean / (1 - first ** (k + 1)), square / (1 - second ** (k + 1))
                    step = corrected[0] / (np.sqrt(corrected[1]) + config.epsilon) + decay
                    trust = 1.0
                else:
                    step, trust = g + decay, 0.02
                if w.ndim > 1:
                    step = step * trust * np.linalg.norm(w) / np.linalg.norm(step)
                if kind == "lars":
                    step = mean[...] = 0.8 * mean + step
                params[name][member] = w - 0.1 * step
            np.testing.assert_allclose(
                given[name], params[name], rtol=1e-4, atol=1e-5, err_msg=name
            )
