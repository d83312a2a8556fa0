"""The centers' optimizer against torch's, and their first values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from arcface_jax.config import OptimizerConfig
from arcface_jax.heads import centers


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig(momentum=0.9, weight_decay=5e-4),
        OptimizerConfig(momentum=0.0, weight_decay=0.1),
        OptimizerConfig(kind="adamw", weight_decay=0.1),
        OptimizerConfig(kind="adamw", betas=(0.8, 0.95), epsilon=1e-4, weight_decay=0.0),
    ],
    ids=["sgd", "sgd-no-momentum", "adamw", "adamw-betas"],
)
def test_ten_updates_equal_those_of_torch(optimizer):
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 4)).astype(np.float32)
    tensor = torch.nn.Parameter(torch.tensor(start))
    if optimizer.kind == "sgd":
        reference = torch.optim.SGD(
            [tensor],
            lr=1.0,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
        )
    else:
        reference = torch.optim.AdamW(
            [tensor],
            lr=1.0,
            betas=optimizer.betas,
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
        )
    rule = centers.make_rule(optimizer)
    rows = jnp.asarray(start)
    moments = {name: jnp.zeros_like(rows) for name in rule.names}
    for k in range(10):
        gradient, rate = rng.normal(size=(5, 4)).astype(np.float32), 0.1 / (k + 1)
        moments = rule.accumulate(rule.decay(moments, rows), jnp.asarray(gradient))
        rows = rule.apply(rows, moments, jnp.float32(rate), jnp.int32(k))
        tensor.grad = torch.tensor(gradient)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        np.testing.assert_allclose(rows, tensor.detach().numpy(), rtol=1e-5, atol=2e-6)


def test_initial_centers_are_the_same_however_many_follow():
    def init(classes):
        key = jax.random.key(3)
        return np.asarray(centers.init(key, classes=classes, subcenters=2, embedding_size=16))

    some = init(1001)
    assert some.shape == (2002, 16)
    assert abs(some.std() - 0.01) < 2e-4 and abs(some.mean()) < 2e-4
    np.testing.assert_array_equal(init(1008)[:2002], some)


@pytest.mark.parametrize(("classes", "devices", "stored"), [(7, 8, 8), (8, 8, 8), (9, 8, 16)])
def test_shards_are_padded_to_one_size(classes, devices, stored):
    assert centers.padded_classes(classes, devices) == stored
