"""A released backbone as a workdir: read by everything, resumed by nothing, checked first."""

import resource
import signal
from pathlib import Path

import headed_network
import numpy as np
import pytest
import torch
from commands import result, script

from arcface_jax import config as configs
from arcface_jax.commands import imports
from arcface_jax.convert import (
    centers,
    from_torch,
    parity,
    to_torch,
    twins,
    weight_files,
    weights,
)
from arcface_jax.convert.state_dicts import Where
from arcface_jax.errors import CheckpointError, UserError
from arcface_jax.models import registry
from arcface_jax.training import checkpoint
from arcface_jax.training.network import Network

R_TINY = Where(network="r_tiny")


@pytest.fixture(scope="module")
def state() -> weights.StateDict:
    """Of a network of length 32, as torch saves one."""
    params, batch_stats = registry.build("r_tiny", embedding_size=32).init(0)
    drawn = np.random.default_rng(0)
    moved = {name: drawn.uniform(0.5, 1.5, a.shape) for name, a in batch_stats.items()}
    moved["features.scale"] = batch_stats["features.scale"]
    return weights.to_state_dict(params, moved)


@pytest.fixture(scope="module")
def imported(state, tmp_path_factory) -> Path:
    """What the command makes of it, from a full checkpoint with centers."""
    folder = tmp_path_factory.mktemp("imported")
    rows = np.random.default_rng(1).normal(size=(7, 32)).astype(np.float32)
    np.save(folder / "centers.npy", rows)
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    full = {"epoch": 3, "state_dict_backbone": wrapped, "state_optimizer": {"state": {}}}
    torch.save(full, folder / "checkpoint_gpu_0.pt")
    argv = ["--weight", str(folder / "checkpoint_gpu_0.pt"), "--network", "r_tiny"]
    argv += ["--output", str(folder / "W"), "--centers", str(folder / "centers.npy")]
    imports.torch(argv)
    return folder / "W"


def test_the_workdir_gives_the_embeddings_of_torch(imported, state):
    embedder = Network.from_workdir(imported, batch_size=16, devices=1)
    twin = parity.twins.build("r_tiny", embedding_size=32)
    twin.load_state_dict(state, strict=True)
    faces = parity.drawn_faces()
    theirs = parity.torch_embeddings(twin, faces)
    assert parity.largest_error(embedder(faces), theirs) < 1e-5


@pytest.mark.parametrize("name", ["b.pth", "b.safetensors"])
def test_export_of_an_import_is_bit_for_bit(imported, state, tmp_path, name):
    to_torch.export(imported, tmp_path / name)
    again = weight_files.read(tmp_path / name)
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(again[key], tensor), key
    assert list(tmp_path.iterdir()) == [tmp_path / name]
    found = weights.load(tmp_path / name, "r_tiny")
    np.testing.assert_array_equal(found.params["fc.bias"], state["fc.bias"])


def test_it_keeps_centers(imported):
    rows, momentum = centers.read(imported)
    np.testing.assert_array_equal(rows, np.load(imported.parent / "centers.npy"))
    assert momentum is None


def test_training_refuses_to_resume_it(imported):
    config = configs.replace(checkpoint.read_config(imported), data__path="synthetic")
    with pytest.raises(CheckpointError, match="--init-from"):
        checkpoint.open_workdir(config)


def test_evaluation_reads_it(imported, pairs_file, capsys):
    argv = ["--checkpoint", str(imported), "--targets", str(pairs_file), "--batch-size", "16"]
    script("evaluate").main(argv)
    assert 0 <= result(capsys.readouterr().out)["eval/few/accuracy"] <= 1


def test_a_network_with_a_last_layer_of_any_name(tmp_path):
    made = twins.build(headed_network.NAME, embedding_size=512)
    torch.save(made.state_dict(), tmp_path / "b.pth")
    where = Where(network=headed_network.NAME)
    from_torch.convert(tmp_path / "b.pth", where, tmp_path / "W")
    assert checkpoint.read_config(tmp_path / "W").model.embedding_size == 512
    embedder = Network.from_workdir(tmp_path / "W", batch_size=16, devices=1)
    faces = parity.drawn_faces()
    assert parity.largest_error(embedder(faces), parity.torch_embeddings(made, faces)) < 1e-5


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_weights_past_the_file_size_limit_are_one_line(tmp_path, name):
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=f"cannot write .*{name}: ") as error:
            weight_files.write(tmp_path / name, {"a": torch.zeros(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_what_exists_stays(state, tmp_path):
    torch.save(state, tmp_path / "b.pth")
    (tmp_path / "W").mkdir()
    (tmp_path / "W" / "precious").write_text("x")
    for output in (tmp_path / "W", tmp_path / "b.pth"):
        with pytest.raises(CheckpointError, match="not an empty folder"):
            from_torch.convert(tmp_path / "b.pth", R_TINY, output)
    assert [p.name for p in (tmp_path / "W").iterdir()] == ["precious"]


def test_nothing_is_written_of_weights_that_cannot_be_run(state, tmp_path):
    torch.save({**state, "fc.bias": state["fc.bias"] * float("nan")}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="nothing was written"):
        from_torch.convert(tmp_path / "b.pth", R_TINY, tmp_path / "W")
    with pytest.raises(UserError, match=r"not hold weights of mbf; .* --network r_tiny"):
        from_torch.convert(tmp_path / "b.pth", Where(network="mbf"), tmp_path / "W")
    np.save(tmp_path / "centers.npy", np.zeros((4, 16), np.float32))
    with pytest.raises(UserError, match="length 16"):
        from_torch.convert(
            tmp_path / "b.pth", R_TINY, tmp_path / "W", centers=tmp_path / "centers.npy"
        )
    assert not (tmp_path / "W").exists()
