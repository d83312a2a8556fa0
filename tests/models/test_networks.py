"""Every network: sizes as published, torch twins, and what training leaves out at random."""

import copy
import gc
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import torch
from commands import script

from arcface_jax import config as configs
from arcface_jax.config import Config
from arcface_jax.convert import parity, twins, weights
from arcface_jax.data.pairs import bins
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.models import layers, preprocess, registry, stacks, vit
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import optim, step

# insightface's published millions of parameters, and GMACs.
PUBLISHED = {
    "r18": (24.03, 2.62),
    "r34": (34.14, 4.48),
    "r50": (43.59, 6.33),
    "r100": (65.16, 12.1),
    "r200": (118.83, 23.4),
    "r2060": (1122.30, 238.9),
    "mbf": (2.06, 0.44),
    # EdgeFace's own table counts 154.00 and 306.12 million additions and multiplications.
    "edgeface_xs": (1.77, 0.077),
    "edgeface_s": (3.65, 0.153),
    "vit_t": (19.14, 1.5),
    "vit_t_dp005_mask0": (19.14, 1.5),
    "vit_s": (76.02, 5.7),
    "vit_s_dp005_mask_0": (76.02, 5.7),
    "vit_b": (113.83, 11.4),
    "vit_b_dp005_mask_005": (113.83, 11.4),
    "vit_l_dp005_mask_005": (255.68, 25.3),
    "vit_h": (756.39, 89.2),
}


def test_sizes_and_costs_are_the_published_ones(capsys):
    assert script("models").main([]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    for network, (millions, gmacs) in PUBLISHED.items():
        assert round(result[network]["parameters"] / 1e6, 2) == millions, network
        assert result[network]["macs"] / 1e9 == pytest.approx(gmacs, rel=0.03), network
    # Its own torch module has 6,314,880; the published figure is 6.32 million.
    assert result["mbf_large"]["parameters"] == 6_314_880
    assert set(registry.NETWORKS) == set(result) - {"files", "seconds"}


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return parity.drawn_faces()


# The largest relative difference between two float32 networks.
BOUND = 1e-5
# Two float32 networks of these may differ by more. Beside float64, on faces of LFW, ours is off by
# 1.30e-5 and torch's by 1.17e-5 for mbf_large, 0.76e-5 and 1.11e-5 for r2060, 0.84e-5 and 0.87e-5
# for r200.
BEYOND_FLOAT32 = ("r200", "mbf_large", "r2060")


def embeddings_and_twin(
    network: str, faces: np.ndarray
) -> tuple[tuple, np.ndarray, torch.nn.Module]:
    """Settled arrays, their embeddings in JAX, and the twin that holds them."""
    params, batch_stats = parity.settled(network, faces)
    backbone = registry.build(network)

    @jax.jit
    def embed(params, batch_stats, images):
        x = preprocess.normalize(images)
        return backbone.apply(params, batch_stats, x, train=False)[0]

    twin = twins.load(network, weights.to_state_dict(params, batch_stats))
    return (params, batch_stats), np.asarray(embed(params, batch_stats, faces)), twin


def assert_equal_to_torch(network: str, faces: np.ndarray) -> None:
    """Names, a round trip, and embeddings with the statistics of a training pass."""
    arrays, ours, twin = embeddings_and_twin(network, faces)
    assert_round_trip(network, arrays, twin)
    assert parity.largest_error(ours, parity.torch_embeddings(twin, faces)) < BOUND


def assert_round_trip(network: str, arrays: tuple, twin: torch.nn.Module) -> None:
    again = weights.from_state_dict(twin.state_dict(), network, source="twin")
    for back, there in zip(again, arrays, strict=True):
        assert back.keys() == there.keys()
        for name, array in there.items():
            np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("network", ["mbf", "vit_t"])
def test_embeddings_equal_those_of_the_torch_twin(network, faces):
    assert_equal_to_torch(network, faces)


@pytest.fixture(scope="module")
def photographs(faces) -> np.ndarray:
    """Faces of LFW where it is there, else drawn ones."""
    lfw = os.environ.get("ARCFACE_JAX_LFW")
    return bins.read_bin(Path(lfw) / "lfw_dev.bin").images[:16] if lfw else faces


LARGE = sorted(set(registry.NETWORKS) - {"r_tiny", "r18", "r50", "mbf", "vit_t", *BEYOND_FLOAT32})


@pytest.mark.slow
@pytest.mark.parametrize("network", LARGE)
def test_embeddings_of_large_networks_equal_those_of_their_twins(network, photographs):
    assert_equal_to_torch(network, photographs)


def needs_memory(network: str) -> None:
    """r2060 has 4.5 GB of weights, which are there several times over."""
    if network == "r2060" and psutil.virtual_memory().available < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")


@pytest.mark.slow
@pytest.mark.parametrize("network", BEYOND_FLOAT32)
def test_it_is_as_near_to_float64_as_torchs_own(network, photographs):
    needs_memory(network)
    arrays, ours, twin = embeddings_and_twin(network, photographs)
    assert_round_trip(network, arrays, twin)
    del arrays
    gc.collect()
    theirs = parity.torch_embeddings(twin, photographs)
    x = torch.from_numpy(photographs.copy()).permute(0, 3, 1, 2).double()
    with torch.inference_mode():
        exact = twin.double()((x - preprocess.MEAN) / preprocess.SCALE).numpy()
    error, torchs = (parity.largest_error(e, exact) for e in (ours, theirs))
    print(network, error, torchs, parity.largest_error(ours, theirs))
    assert error <= 1.5 * torchs


@pytest.mark.slow
def test_gradients_of_mobilefacenet_are_as_near_to_float64_as_torchs_own(faces):
    backbone, twin = registry.build("mbf"), twins.build("mbf")
    params, batch_stats = backbone.init(1)
    twin.load_state_dict(weights.to_state_dict(params, batch_stats), strict=True)
    target = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    images = faces[:8]

    @jax.jit
    @jax.grad
    def gradient(params):
        x = preprocess.normalize(jnp.asarray(images))
        return jnp.mean(backbone.apply(params, batch_stats, x, train=True)[0] * target)

    def by_torch(module: torch.nn.Module, dtype: torch.dtype) -> np.ndarray:
        x = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).to(dtype)
        out = module.train()((x - preprocess.MEAN) / preprocess.SCALE)
        (out * torch.from_numpy(target).to(dtype)).mean().backward()
        return flat({name: p.grad for name, p in module.named_parameters()})

    def flat(gradients: dict) -> np.ndarray:
        return np.concatenate([gradients[name].double().numpy().ravel() for name in names])

    names = [name for name, _ in twin.named_parameters()]
    exact = by_torch(copy.deepcopy(twin).double(), torch.float64)
    theirs = np.linalg.norm(by_torch(twin, torch.float32) - exact)
    ours = np.linalg.norm(flat(weights.to_state_dict(gradient(params), {})) - exact)
    assert ours <= 1.5 * theirs  # measured: two thirds of it
    assert ours <= 1e-2 * np.linalg.norm(exact)


ARCHITECTURE = vit.Architecture(32, 3, drop_path=0.5, masked=True)


def build_small(monkeypatch, **changes) -> registry.Backbone:
    architecture = vit.Architecture(**(vars(ARCHITECTURE) | changes))
    monkeypatch.setitem(vit.ARCHITECTURES, "vit_t", architecture)
    return registry.build("vit_t", embedding_size=8)


@pytest.mark.slow
def test_training_draws_the_same_for_the_same_key_alone(monkeypatch, faces):
    backbone = build_small(monkeypatch)
    params, batch_stats = backbone.init(0)
    x = preprocess.normalize(jnp.asarray(faces))
    one, again, other = (
        backbone.apply(
            params, batch_stats, x, train=True, keys=jax.random.split(jax.random.key(key), 16)
        )[0]
        for key in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 1e-3


def test_without_masking_and_drop_path_training_is_deterministic(monkeypatch, faces):
    backbone = build_small(monkeypatch, masked=False, drop_path=0.0)
    params, batch_stats = backbone.init(0)
    x = preprocess.normalize(jnp.asarray(faces))
    one, other = (
        backbone.apply(
            params, batch_stats, x, train=True, keys=jax.random.split(jax.random.key(key), 16)
        )[0]
        for key in (1, 2)
    )
    np.testing.assert_array_equal(one, other)


def test_a_tenth_of_the_tokens_is_replaced_by_the_mask_token(monkeypatch, faces):
    """With branches that give nothing, all that is left of a hidden token is the mask token."""
    backbone = build_small(monkeypatch, drop_path=0.0)
    params, batch_stats = backbone.init(0)
    params = dict(params) | {"mask_token": np.full((1, 1, 32), 777, np.float32)}
    seen = []
    take = jnp.take_along_axis

    def note(array, indices, axis):
        seen.append(indices)
        return take(array, indices, axis=axis)

    monkeypatch.setattr(jnp, "take_along_axis", note)
    x = preprocess.normalize(jnp.asarray(faces))
    backbone.apply(params, batch_stats, x, train=True, keys=jax.random.split(jax.random.key(0), 16))
    (kept,) = seen
    assert kept.shape == (16, 129, 1)
    assert all(len(set(row.ravel().tolist())) == 129 for row in np.asarray(kept))
    assert len({tuple(row.ravel().tolist()) for row in np.asarray(kept)}) == 16


def test_paths_are_dropped_as_often_as_stated_and_kept_in_expectation():
    network = vit.VisionTransformer(
        ARCHITECTURE,
        embedding_size=8,
        bn_groups=1,
        dtype=jnp.dtype("float32"),
        init=layers.ShapeInitializer(),
    )
    factors = np.asarray(network._draw_paths(jax.random.split(jax.random.key(0), 20_000)))
    dropped = (factors == 0).mean(axis=(1, 2))
    np.testing.assert_allclose(dropped, [0, 0.25, 0.5], atol=0.01)
    np.testing.assert_allclose(factors.mean(axis=(1, 2)), 1, atol=0.02)
    assert not np.array_equal(factors[2, 0], factors[2, 1])  # the branches are drawn apart


@pytest.mark.slow
def test_remat_changes_no_gradient(monkeypatch, faces):
    gradients = []
    for remat in (False, True):
        backbone = build_small(monkeypatch, remat=remat)
        params, batch_stats = backbone.init(0)
        x = preprocess.normalize(jnp.asarray(faces))

        def loss(params, backbone=backbone, batch_stats=batch_stats, x=x):
            keys = jax.random.split(jax.random.key(0), 16)
            out = backbone.apply(params, batch_stats, x, train=True, keys=keys)[0]
            return jnp.mean(out * jnp.arange(8.0)[None])

        gradients.append(jax.jit(jax.grad(loss))(params))
    for name, array in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], array, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_network_without_stacks_is_the_same_block_by_block():
    both = [registry.build("mbf", embedding_size=8, stacked=stacked) for stacked in (True, False)]
    assert both[0].shapes[0].keys() == both[1].shapes[0].keys()


def test_names_of_a_stack():
    name = "blocks.0-2.mlp.fc1.kernel"
    assert stacks.names_of_members(name) == [f"blocks.{i}.mlp.fc1.kernel" for i in range(3)]
    assert stacks.names_of_members("layer3.1-2.conv1.kernel") == [
        "layer3.1.conv1.kernel",
        "layer3.2.conv1.kernel",
    ]
    assert stacks.names_of_members("layer3.1.conv1.kernel") is None


@pytest.mark.slow
def test_the_train_step_of_a_transformer_on_several_devices(monkeypatch):
    monkeypatch.setitem(vit.ARCHITECTURES, "vit_t", ARCHITECTURE)
    config = configs.replace(
        Config(),
        model__network="vit_t",
        model__bn_batch_size=8,
        data__global_batch_size=8,
        optimizer__kind="adamw",
        optimizer__learning_rate=1e-3,
    )
    mesh = meshes.make(2)
    state = step.init_state(config, num_classes=7, mesh=mesh)
    schedule = optim.make_schedule(config.schedule, base_rate=1e-3, steps_per_epoch=5)
    run = step.make_train_step(config, num_classes=7, schedule=schedule, mesh=mesh)
    drawn = [draw_face(seed=0, identity=i % 7, index=i) for i in range(8)]
    batch = {"image": np.stack(drawn), "label": np.arange(8, dtype=np.int32) % 7}
    losses = []
    for _ in range(3):
        state, metrics = run(state, meshes.to_devices(batch, mesh))
        losses.append(float(metrics["train/loss"]))
    assert np.isfinite(losses).all()
