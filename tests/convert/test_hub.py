"""Hub folders: out of a run and back bit for bit, in JAX and torch; CVLface's layout; damage."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import script

from arcface_jax import cli
from arcface_jax.convert import hub, parity, twins, weight_files, weights
from arcface_jax.errors import UserError
from arcface_jax.inference.embedder import Embedder
from arcface_jax.training import saved_runs
from arcface_jax.training.network import Network


@pytest.fixture(scope="module")
def trained(workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir with an evaluation at its step, as a run leaves it."""
    path = tmp_path_factory.mktemp("trained") / "W"
    shutil.copytree(workdir, path)
    _, step, _ = saved_runs.restore_dataset(path)
    values = {"accuracy": 0.91, "accuracy_low": 0.88, "accuracy_high": 0.935, "tar@far=1e-2": 0.5}
    lines = [
        {"step": step + 1, "eval/lfw/accuracy": 0.1},
        {"step": step, **{f"eval/lfw/{name}": value for name, value in values.items()}},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def folder(trained: Path, pairs_file: Path) -> Path:
    """What the command writes, with a calibration of two thresholds in the card."""
    root = trained.parent
    calibrated = ["--far", "0.1", "--far-check", "0.3", "--output", str(root / "c.json")]
    words = ["--workdir", str(trained), "--pairs", str(pairs_file), *calibrated]
    assert script("calibrate").main(words) == 0
    words = ["export", "--format", "hub", "--workdir", str(trained), "--output", str(root / "hub")]
    words += ["--license", "apache-2.0", "--training-data", "Drawn | faces."]
    assert cli.main([*words, "--calibration", str(root / "c.json")]) == 0
    return root / "hub"


def test_weights_and_embeddings_come_back_bit_for_bit(trained, folder, faces):
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    _, params, batch_stats, _ = saved_runs.restore_backbone(trained)
    found = hub.read(folder)
    assert found.network == "r_tiny"
    for wanted, read in ((params, found.params), (batch_stats, found.batch_stats)):
        assert wanted.keys() == read.keys()
        for name, array in wanted.items():
            assert np.asarray(array).tobytes() == np.asarray(read[name]).tobytes(), name
    run = Network.from_workdir(trained, batch_size=16, devices=1)
    opened = Embedder(folder, batch_size=16, devices=1)
    assert opened.model(faces).tobytes() == run(faces).tobytes()
    assert opened.model.digest() == run.digest()
    state = weights.to_state_dict(params, batch_stats)
    own = parity.torch_embeddings(twins.load("r_tiny", state), faces)
    assert parity.torch_embeddings(hub.load_torch(folder), faces).tobytes() == own.tobytes()
    assert parity.largest_error(own, run(faces)) < 1e-5


def test_a_folder_of_this_project_takes_rgb(folder):
    with pytest.raises(UserError, match=r"--color-order BGR is for weights of other projects"):
        hub.read(folder, color_order="BGR")


def test_the_description_is_what_transformers_reads(folder, faces):
    config = json.loads((folder / "config.json").read_text())
    assert (config["network"], config["embedding_size"]) == ("r_tiny", 512)
    assert config["input"]["color_order"] == "RGB"
    how = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (np.array(how[key]) for key in ("image_mean", "image_std"))
    x = (faces * how["rescale_factor"] - mean) / std
    np.testing.assert_allclose(x, (faces - 127.5) / 127.5, atol=1e-6)
    assert not any(path.suffix == ".py" for path in folder.iterdir())
    assert "auto_map" not in config


def test_the_card(folder):
    text = (folder / "README.md").read_text()
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    front = yaml.safe_load(front)
    assert (front["license"], front["library_name"]) == ("apache-2.0", "arcface_jax")
    (result,) = front["model-index"][0]["results"]
    assert (result["dataset"]["name"], result["metrics"][0]["value"]) == ("lfw", 0.91)
    assert "| lfw | accuracy | 0.9100 | 0.8800 to 0.9350 |" in body
    assert "| lfw | tar@far=1e-2 | 0.5000 |  |" in body
    assert "Drawn | faces." in body and "SHA-256" in body
    calibrated = json.loads((folder.parent / "c.json").read_text())
    assert f"| same | {calibrated['threshold_cosine']:.4f} |" in body
    assert f"| check | {calibrated['threshold_check']:.4f} |" in body
    assert str(folder.parent) not in text


def test_what_cannot_be_exported(trained, folder, capsys, tmp_path):
    def error(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(["export", "hub", *words])
        assert stop.value.code == 2
        return capsys.readouterr().err

    run = ("--workdir", str(trained))
    assert "is not empty" in error(*run, "--output", str(folder))
    other = json.loads((folder.parent / "c.json").read_text()) | {"model": "0" * 64}
    (tmp_path / "c.json").write_text(json.dumps(other))
    words = (*run, "--output", str(tmp_path / "h"), "--calibration", str(tmp_path / "c.json"))
    assert "is of another model" in error(*words)
    assert "--workdir" in error("--workdir", str(folder), "--output", str(tmp_path / "h"))
    assert "--weight" in error("--weight", str(trained), "--output", str(tmp_path / "h"))


def _changed(folder: Path, target: Path, **values) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **values}))
    return target


def test_a_damaged_folder_is_one_error(folder, tmp_path, faces):
    state = weight_files.read(folder / "model.safetensors")
    cases = {
        "network": ({"network": "os:system"}, "contains no code"),
        "unknown": ({"network": "r7"}, "not a network of this package"),
        "size": ({"embedding_size": 128}, "embedding_size 128, and the weights have 512"),
        "library": ({"library_name": "timm"}, "of the library 'timm'"),
        "input": ({"input": {"mean": "much"}}, "does not describe a model"),
    }
    for name, (values, words) in cases.items():
        with pytest.raises(UserError, match=words):
            hub.read(_changed(folder, tmp_path / name, **values))
    changed = _changed(folder, tmp_path / "weights")
    state["fc.bias"] = torch.nextafter(state["fc.bias"], torch.tensor(1.0))
    weight_files.write(changed / "model.safetensors", state)
    with pytest.raises(UserError, match="does not hold the weights that"):
        Embedder(changed)
    (changed / "config.json").write_text("[")
    with pytest.raises(UserError, match="does not describe a model"):
        Embedder(changed)
    (changed / "config.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        Embedder(changed)
    (changed / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model \(it has README\.md, preproc"):
        Embedder(changed)
    with pytest.raises(UserError, match="no model at"):
        Embedder(tmp_path / "none")


@pytest.mark.parametrize(
    ("color", "file"), [("BGR", "pretrained_model/model.pt"), ("RGB", "model.safetensors")]
)
def test_cvlface_folders(trained, faces, tmp_path, color, file):
    """Their wrapper flips the channels before the network where color_space is BGR."""
    _, params, batch_stats, _ = saved_runs.restore_backbone(trained)
    state = weights.to_state_dict(params, batch_stats)
    prefix = "net." if file.endswith(".pt") else "model.net."
    (tmp_path / "pretrained_model").mkdir()
    (tmp_path / "wrapper.py").write_text("raise SystemExit('ran')\n")
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "wrapper.Model"}}')
    yaml_file = tmp_path / "pretrained_model" / "model.yaml"
    yaml_file.write_text(f"input_size: [3, 112, 112]\ncolor_space: '{color}'\nname: ir50\n")
    weight_files.write(tmp_path / file, {prefix + name: x for name, x in state.items()})
    found = hub.read(tmp_path)
    assert found.network == "r_tiny"
    read = twins.load("r_tiny", weights.to_state_dict(found.params, found.batch_stats))
    given = faces if color == "RGB" else faces[..., ::-1]
    own = parity.torch_embeddings(twins.load("r_tiny", state), given)
    assert parity.largest_error(parity.torch_embeddings(read, faces), own) < 1e-5
    kept = hub.read(tmp_path, color_order="RGB")  # goes before the file
    assert np.array_equal(kept.params["conv1.kernel"], params["conv1.kernel"])
    for text, words in (
        ("color_space: YUV", "color_space: Input should be 'RGB' or 'BGR'"),
        ("input_size: [3, 160, 160]", "input_size"),
        ("!!python/object/apply:os.system [ls]", "not a YAML file"),
        ("[1, 2]", "cannot be used"),
    ):
        yaml_file.write_text(text)
        with pytest.raises(UserError, match=words):
            hub.read(tmp_path)
    yaml_file.write_text("color_space: RGB")
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match="holds no weights: expected pretrained_model"):
        hub.read(tmp_path)
