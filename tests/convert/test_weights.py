"""Weights to torch and back: exact, strict, and only from files that hold weights."""

import numpy as np
import pytest
import torch

from arcface_jax import config as configs
from arcface_jax.convert import parity, to_torch, torch_iresnet, weight_files, weights
from arcface_jax.errors import UserError
from arcface_jax.evaluation import model_input
from arcface_jax.inference.open_model import open_path
from arcface_jax.models import registry
from arcface_jax.training import checkpoint
from arcface_jax.training.network import Network


@pytest.fixture(scope="module")
def arrays():
    return registry.build("r_tiny", embedding_size=32).init(0)


@pytest.fixture(scope="module")
def state(arrays):
    return weights.to_state_dict(*arrays)


def test_there_and_back_is_bit_for_bit(arrays, state):
    for ours, again in zip(
        arrays, weights.from_state_dict(state, "r_tiny", source="x"), strict=True
    ):
        assert ours.keys() == again.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(again[name], array)


def test_the_twin_loads_it_strictly(state):
    twin = torch_iresnet.build("r_tiny", embedding_size=32)
    twin.load_state_dict(state, strict=True)
    assert list(state["conv1.weight"].shape) == [24, 3, 3, 3]
    assert list(state["fc.weight"].shape) == [32, 9408]


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
def test_prefixes_of_wrapped_modules_are_dropped(state, prefix):
    params, _ = weights.from_state_dict(
        {prefix + name: tensor for name, tensor in state.items()}, "r_tiny", source="x"
    )
    np.testing.assert_array_equal(params["fc.bias"], state["fc.bias"])


def test_every_mismatch_is_named_at_once(state):
    wrong = dict(state)
    wrong["extra.weight"] = wrong.pop("layer2.0.conv1.weight")
    wrong["prelu.weight"] = torch.zeros(5)
    with pytest.raises(UserError) as error:
        weights.from_state_dict(wrong, "r_tiny", source="some.pth")
    message = str(error.value)
    assert "some.pth" in message and "--network" in message
    assert "missing: layer2.0.conv1.weight" in message
    assert "unexpected: extra.weight" in message
    assert "prelu.weight (5,) instead of (24,)" in message


def test_weights_of_old_torch_without_batch_counters_are_taken(state):
    old = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    params, _ = weights.from_state_dict(old, "r_tiny", source="x")
    assert "fc.kernel" in params


def test_the_backbone_in_a_full_checkpoint_is_found(state, tmp_path):
    torch.save({"epoch": 3, "state_dict_backbone": state}, tmp_path / "checkpoint_gpu_0.pt")
    found = weights.load(tmp_path / "checkpoint_gpu_0.pt", "r_tiny")
    np.testing.assert_array_equal(found.params["fc.bias"], state["fc.bias"])


class Hostile:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("content", [{"weights": Hostile()}, [1, 2], {"a": 1}])
def test_files_that_are_not_weights_are_refused(content, tmp_path, capsys):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth"):
        weights.load(tmp_path / "x.pth", "r_tiny")
    assert "must not run" not in capsys.readouterr().out


def test_an_export_whose_embeddings_differ_is_refused(arrays, state):
    embedder = Network("r_tiny", *arrays, batch_size=16, devices=1)
    assert parity.check(embedder, state, network="r_tiny") < 1e-5
    wrong = {**state, "fc.bias": state["fc.bias"] + 0.1}
    with pytest.raises(UserError, match="nothing was written"):
        parity.check(embedder, wrong, network="r_tiny")


def test_not_finite_is_not_equal():
    zeros = np.zeros((2, 3), np.float32)
    assert parity.largest_error(zeros + 1, zeros + 1) == 0
    assert parity.largest_error(zeros + 2, zeros + 1) == pytest.approx(1)
    assert parity.largest_error(zeros + np.nan, zeros + 1) == np.inf


def test_weights_that_are_not_finite_are_not_exported(arrays, tmp_path):
    params, batch_stats = arrays
    broken = {**params, "fc.bias": np.full_like(params["fc.bias"], np.nan)}
    run = configs.replace(
        configs.Config(),
        workdir=str(tmp_path / "run"),
        model__network="r_tiny",
        model__embedding_size=32,
    )
    checkpoint.save_weights(run, broken, batch_stats)
    with pytest.raises(UserError, match=r"1 of \d+ weight arrays .* fc\.bias: nothing was written"):
        to_torch.export(tmp_path / "run", tmp_path / "backbone.pth")
    assert not (tmp_path / "backbone.pth").exists()


def test_a_safetensors_file_names_the_teacher_of_its_own_weights_only(arrays, state, tmp_path):
    pytest.importorskip("safetensors.torch")
    teacher = "ab" * 32
    model = Network("r_tiny", *arrays, devices=1, compatible_with=teacher)
    metadata = {model_input.METADATA_KEY: model.input.to_json()}
    path, other = tmp_path / "student.safetensors", tmp_path / "other.safetensors"
    weight_files.write(path, state, metadata=metadata)
    assert weights.load(path).compatible_with == teacher
    assert open_path(path).input == model.input
    weight_files.write(other, {**state, "fc.bias": state["fc.bias"] + 1}, metadata=metadata)
    assert weights.load(other).compatible_with == ""
