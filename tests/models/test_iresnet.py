"""Backbones against their torch twins: names, sizes, embeddings, and one step of SGD."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from arcface_jax.config import OptimizerConfig
from arcface_jax.convert import parity, torch_iresnet, torch_names, weights
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.errors import ConfigError
from arcface_jax.models import preprocess, registry
from arcface_jax.training import optim


def faces(count: int) -> np.ndarray:
    return np.stack([draw_face(seed=5, identity=i, index=0) for i in range(count)])


# insightface's own figures; its count includes `features.weight`, which is not trained.
@pytest.mark.parametrize(
    ("network", "millions"),
    [
        *(("r18", 24.03), ("r34", 34.14), ("r50", 43.59), ("r100", 65.16), ("r200", 118.83)),
        ("r2060", 1122.30),
    ],
)
def test_parameter_counts_are_insightfaces(network, millions):
    params, batch_stats = registry.build(network).shapes
    count = sum(a.size for a in params.values()) + batch_stats["features.scale"].size
    assert round(count / 1e6, 2) == millions
    with torch.device("meta"):  # shapes alone
        twin = torch_iresnet.build(network)
    assert sum(p.numel() for p in twin.parameters()) == count
    theirs = {n: t.shape for n, t in twin.state_dict().items() if not n.endswith("_tracked")}
    ours = torch_names.torch_arrays({**params, **batch_stats})
    assert {n: a.shape for n, a in ours.items()} == theirs


def test_names_are_those_of_insightfaces_state_dict():
    names = set(weights.to_state_dict(*registry.build("r18").init(0)))
    block = "layer2.0."
    for name in (
        *("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"),
        *("bn1.num_batches_tracked", "prelu.weight", "bn2.running_var", "fc.weight", "fc.bias"),
        *("features.weight", "features.bias", "features.running_mean"),
        *(f"{block}bn1.weight", f"{block}conv1.weight", f"{block}bn2.bias", f"{block}prelu.weight"),
        *(f"{block}conv2.weight", f"{block}bn3.running_mean"),
        *(f"{block}downsample.0.weight", f"{block}downsample.1.running_var"),
    ):
        assert name in names
    # stem, 8 blocks, 4 down-samplings, bn2, fc, features
    assert len(names) == (1 + 5 + 1) + 8 * (3 * 5 + 2 + 1) + 4 * (1 + 5) + 5 + 2 + 5


def test_the_scale_of_the_last_layer_is_frozen_at_one():
    params, batch_stats = registry.build("r_tiny").init(0)
    assert "features.scale" not in params and "features.bias" in params
    np.testing.assert_array_equal(batch_stats["features.scale"], 1)


def test_the_seed_decides_the_weights():
    first, again, other = (registry.build("r_tiny").init(seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first["fc.kernel"], again["fc.kernel"])
    assert not np.array_equal(first["fc.kernel"], other["fc.kernel"])


def test_an_unknown_network_is_named_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"model.network 'r51': .*'r_tiny', 'r18', 'r34', 'r50'"):
        registry.build("r51")


@pytest.mark.parametrize("size", [7, 512])
def test_any_embedding_size(size):
    network = registry.build("r_tiny", embedding_size=size)
    params, batch_stats = network.init(0)
    shape = jax.eval_shape(
        lambda x: network.apply(params, batch_stats, x, train=False)[0],
        jax.ShapeDtypeStruct((2, 112, 112, 3), jnp.float32),
    )
    assert (shape.shape, shape.dtype) == ((2, size), jnp.float32)


@pytest.mark.parametrize(
    "network",
    ["r_tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("r18", "r50"))],
)
def test_embeddings_and_one_sgd_step_equal_torch(network):
    """A training pass with its gradients and update, then embeddings with the statistics it set."""
    images, target = faces(8), np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    twin = torch_iresnet.build(network)
    backbone = registry.build(network)
    params, batch_stats = backbone.init(0)
    twin.load_state_dict(weights.to_state_dict(params, batch_stats), strict=True)

    optimizer = optim.make_optimizer(OptimizerConfig())
    rate = 0.1

    @jax.jit
    def step(params, batch_stats):
        def loss(params):
            x = preprocess.normalize(jnp.asarray(images))
            embeddings, moved = backbone.apply(params, batch_stats, x, train=True)
            return jnp.mean(embeddings * target), (embeddings, moved)

        gradients, (embeddings, moved) = jax.grad(loss, has_aux=True)(params)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates))
        return params, moved, embeddings, gradients

    new_params, new_stats, embeddings, gradients = step(params, batch_stats)

    x = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
    torch_embeddings = twin.train()((x - preprocess.MEAN) / preprocess.SCALE)
    (torch_embeddings * torch.from_numpy(target)).mean().backward()
    trained = [p for p in twin.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, 5.0)
    torch.optim.SGD(trained, lr=rate, momentum=0.9, weight_decay=5e-4).step()

    error = parity.largest_error(np.asarray(embeddings), torch_embeddings.detach().numpy())
    assert error < 1e-4
    assert float(optax.tree.norm(gradients)) == pytest.approx(float(norm), rel=1e-3)
    ours, theirs = weights.to_state_dict(new_params, new_stats), twin.state_dict()
    before = weights.to_state_dict(params, batch_stats)
    for name, tensor in theirs.items():
        if name.endswith("num_batches_tracked"):
            continue
        moved, difference = tensor - before[name], ours[name] - tensor
        # Some values are zero but for rounding, as the mean of what was just normalized.
        rounding = 1e-6 * difference.numel() ** 0.5
        assert float(difference.norm()) <= 5e-3 * float(moved.norm()) + rounding, name

    with_jax = jax.jit(
        lambda x: backbone.apply(new_params, new_stats, preprocess.normalize(x), train=False)[0]
    )(jnp.asarray(faces(16)))
    twin.load_state_dict(ours, strict=True)
    error = parity.largest_error(np.asarray(with_jax), parity.torch_embeddings(twin, faces(16)))
    assert error < 1e-5
