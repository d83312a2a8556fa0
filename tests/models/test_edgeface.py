"""EdgeFace: published sizes and names, its torch twin, and a run without any BatchNorm."""

import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from arcface_jax import config as configs
from arcface_jax.config import Config
from arcface_jax.convert import from_onnx, parity, to_torch, twins, weight_files, weights
from arcface_jax.errors import UserError
from arcface_jax.models import edgeface, registry
from arcface_jax.train import train
from arcface_jax.training.network import Network

SIZE = 16
# Of the published module (timm 1.0.31, otroshi/edgeface at cfcae62).
PUBLISHED = {"edgeface_xs": 1_770_492, "edgeface_s": 3_652_520}
SHAPES = {
    "model.stem.0.weight": (32, 3, 4, 4),
    "model.stages.0.blocks.1.mlp.fc1.linear1.weight": (19, 32),
    "model.stages.1.downsample.1.weight": (64, 32, 2, 2),
    "model.stages.1.blocks.0.conv_dw.weight": (64, 1, 5, 5),
    "model.stages.1.blocks.2.pos_embd.token_projection.weight": (64, 64, 1, 1),
    "model.stages.1.blocks.2.xca.temperature": (4, 1, 1),
    "model.stages.2.blocks.8.convs.1.bias": (34,),
    "model.stages.2.blocks.8.gamma_xca": (100,),
    "model.stages.2.blocks.8.xca.qkv.linear2.weight": (300, 60),
    "model.stages.3.blocks.1.mlp.fc2.linear2.bias": (192,),
    "model.head.norm.bias": (192,),
    "model.head.fc.linear2.weight": (512, 115),
}


@pytest.mark.parametrize("network", PUBLISHED)
def test_parameters_are_the_published_ones(network):
    params, batch_stats = registry.build(network).shapes
    assert sum(array.size for array in params.values()) == PUBLISHED[network]
    assert len(params) == 257 and not batch_stats
    with torch.device("meta"):
        state = twins.build(network).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == PUBLISHED[network]
    if network == "edgeface_xs":
        assert {name: tuple(state[name].shape) for name in SHAPES} == SHAPES


@pytest.fixture
def small(monkeypatch) -> None:
    """edgeface_xs with few channels and few blocks, of every kind one."""
    full = edgeface.ARCHITECTURES["edgeface_xs"]
    few = replace(full, widths=(8, 12, 16, 20), depths=(1, 1, 2, 1), heads=2)
    monkeypatch.setitem(edgeface.ARCHITECTURES, "edgeface_xs", few)


def drawn(network: str, *, embedding_size: int) -> registry.Arrays:
    """Weights that give each face another embedding, with no scale at 1 and no bias at 0."""
    rng = np.random.default_rng(0)
    arrays: registry.Arrays = {}
    for name, like in registry.build(network, embedding_size=embedding_size).shapes[0].items():
        if name.endswith(".kernel"):
            array = rng.normal(size=like.shape) / math.sqrt(math.prod(like.shape[:-1]))
        else:
            array = rng.uniform(*((-0.1, 0.1) if name.endswith("bias") else (0.5, 1.5)), like.shape)
        arrays[name] = array.astype(np.float32)
    return arrays


def assert_equal_to_torch(folder: Path, *, embedding_size: int) -> None:
    """Through a file with a prefix whose network is found, and back bit for bit."""
    params = drawn("edgeface_xs", embedding_size=embedding_size)
    state = weights.to_state_dict(params, {})
    torch.save({"net": {f"module.{n}": t for n, t in state.items()}}, folder / "edge.pt")
    found = weights.load(folder / "edge.pt")
    assert found.network == "edgeface_xs" and not found.batch_stats
    for name, array in params.items():
        np.testing.assert_array_equal(found.params[name], array)
    faces = parity.drawn_faces()
    theirs = parity.torch_embeddings(twins.load("edgeface_xs", state), faces)
    ours = Network("edgeface_xs", found.params, {}, batch_size=16, devices=1)(faces)
    assert np.ptp(theirs / np.linalg.norm(theirs, axis=1, keepdims=True), axis=0).max() > 0.05
    assert parity.largest_error(ours, theirs) < 1e-5


def test_embeddings_equal_those_of_the_twin(small, tmp_path):
    assert_equal_to_torch(tmp_path, embedding_size=SIZE)


@pytest.mark.slow
def test_embeddings_of_the_whole_network_equal_those_of_the_twin(tmp_path):
    assert_equal_to_torch(tmp_path, embedding_size=512)


def test_positions_are_sines_and_cosines_of_row_and_column():
    found = edgeface.positions(5)
    assert found.shape == (5, 5, 64)
    for row, column, number in ((0, 3, 0), (4, 1, 7), (2, 2, 30), (1, 4, 33), (3, 0, 62)):
        place = (row if number < 32 else column) + 1
        angle = 2 * math.pi * place / 5 / 10000 ** (number % 32 // 2 * 2 / 32)
        expected = math.cos(angle) if number % 2 else math.sin(angle)
        assert found[row, column, number] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_attention_between_channels(dtype, bound):
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.normal(size=(2, 9, 3, 2, 4)), dtype)
    temperature = rng.uniform(0.5, 3, (2, 1, 1)).astype(np.float32)
    found = edgeface.attend_to_channels(qkv, jnp.asarray(temperature))
    assert found.shape == (2, 9, 2, 4) and found.dtype == qkv.dtype
    exact = np.asarray(qkv, np.float64)
    for image in range(2):
        for head in range(2):
            query, key, value = (exact[image, :, part, head] for part in range(3))
            query, key = (a / np.linalg.norm(a, axis=0) for a in (query, key))
            scores = np.exp(query.T @ key * temperature[head])
            expected = value @ (scores / scores.sum(1, keepdims=True)).T
            error = np.abs(np.asarray(found[image, :, head], np.float64) - expected).max()
            assert error < bound * np.abs(expected).max()


def test_a_channel_of_zeros_has_a_finite_gradient():
    qkv = jnp.ones((1, 3, 3, 1, 2)).at[..., 0].set(0)

    @jax.jit
    @jax.grad
    def gradient(qkv):
        return edgeface.attend_to_channels(qkv, jnp.ones((1, 1, 1))).sum()

    assert np.isfinite(gradient(qkv)).all()


def test_onnx_is_no_way_in():
    with pytest.raises(UserError, match=r"edgeface_s cannot be read from ONNX.*import the \.pth"):
        from_onnx.load(Path("model.onnx"), "edgeface_s")


@pytest.mark.slow
def test_a_run_without_batch_norm_resumes_and_is_exported(small, tmp_path):
    config = configs.replace(
        Config(),
        workdir=str(tmp_path / "run"),
        devices=2,
        data__path="synthetic",
        data__synthetic__identities=4,
        data__synthetic__images_per_identity=4,
        data__global_batch_size=8,
        model__network="edgeface_xs",
        model__embedding_size=SIZE,
        model__bn_batch_size=4,
        model__dtype="float32",
        optimizer__kind="adamw",
        optimizer__learning_rate=1e-3,
        schedule__epochs=1,
        schedule__warmup_epochs=0,
        evaluation__targets=(),
        evaluation__batch_size=8,
        logging__tensorboard=False,
    )
    first = train(config)
    again = train(config)
    assert again.step == first.step == 2
    model = Network.from_workdir(tmp_path / "run", batch_size=8, devices=1)
    for name, array in first.state.params.items():
        np.testing.assert_array_equal(model.params[name], array)
    assert to_torch.export(tmp_path / "run", tmp_path / "edge.pth") < 1e-5
    assert len(weight_files.read(tmp_path / "edge.pth")) == len(model.params)
