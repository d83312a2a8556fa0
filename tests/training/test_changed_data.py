"""A run resumes on the data that it was trained on, and on other data only if it is told to."""

import json
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import script
from witness import encode

from arcface_jax import config as c
from arcface_jax.config import Config, DataConfig, loading
from arcface_jax.data.opening import open_source
from arcface_jax.errors import CheckpointError
from arcface_jax.training import checkpoint


def people(folder: Path, *, seed: int, identities: int = 5) -> Path:
    """Five images of each identity, other ones for each seed."""
    rng = np.random.default_rng(seed)
    for identity in range(identities):
        (folder / str(identity)).mkdir(parents=True, exist_ok=True)
        for number in range(5):
            image = rng.integers(0, 256, (112, 112, 3), np.uint8)
            (folder / str(identity) / f"{number}.png").write_bytes(encode(image))
    return folder


def stored_run(recipe: Path, workdir: Path, data: Path, **dataset) -> Config:
    """The files that decide about resuming, without the time that training takes."""
    recipe_config = loading.read_recipe(recipe)
    config = c.replace(recipe_config, workdir=str(workdir), data__path=str(data), devices=1)
    described = checkpoint.describe(open_source(config.data, seed=0), config.data)
    with checkpoint.open_workdir(config) as manager:
        items = {
            "dataset": ocp.args.JsonSave(described | dataset),
            "training": ocp.args.PyTreeSave({"x": np.zeros(1)}),
        }
        manager.save(3, args=ocp.args.Composite(**items))
    return config


def check(config: Config, **changes) -> None:
    data = c.replace(config, **changes).data
    with checkpoint.open_workdir(config) as manager:
        described = checkpoint.describe(open_source(data, seed=0), data)
        checkpoint.check_data(manager, described, data)


def test_the_command_refuses_other_images_under_the_same_counts(tiny_recipe, tmp_path, capsys):
    data = people(tmp_path / "data", seed=0)
    stored_run(tiny_recipe, tmp_path / "run", data)
    people(data, seed=1)
    command = [str(tiny_recipe), "--workdir", str(tmp_path / "run"), "--data.path", str(data)]
    with pytest.raises(SystemExit) as stop:
        script("train").main([*command, "--devices", "1"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"error: data.path {data} is not the data that the run in" in message
    assert "trained on: 25 of 25 sampled images differ (first: image 0). Restore" in message
    assert "--data.changed accept" in message and "Traceback" not in message


def test_changed_data_are_accepted_when_asked_but_not_other_classes(tiny_recipe, tmp_path, capsys):
    data = people(tmp_path / "data", seed=0)
    config = stored_run(tiny_recipe, tmp_path / "run", data)
    moved = shutil.move(data, tmp_path / "moved")
    check(config, data__path=str(moved))
    assert capsys.readouterr().err == ""
    (moved / "0" / "1.png").unlink()
    with pytest.raises(CheckpointError, match="25 images then and 24 now; file names differ"):
        check(config, data__path=str(moved))
    check(config, data__path=str(moved), data__changed="accept")
    assert "file names differ" in (printed := capsys.readouterr().err)
    assert printed.startswith("warning: ") and "Continuing" in printed
    people(moved, seed=0, identities=6)
    with pytest.raises(CheckpointError, match="num_classes: the stored run has 5"):
        check(config, data__path=str(moved), data__changed="accept")


def test_a_run_of_an_earlier_version_resumes_with_a_note(tiny_recipe, tmp_path, capsys):
    data = people(tmp_path / "data", seed=0)
    config = stored_run(tiny_recipe, tmp_path / "run", data, fingerprint=None)
    check(config)
    assert "has no fingerprint of its training set" in capsys.readouterr().err
    (data / "0" / "1.png").unlink()
    with pytest.raises(CheckpointError, match="25 images then and 24 now"):
        check(config)


@pytest.mark.slow
def test_the_command_continues_with_accepted_data_and_remembers_them(tiny_recipe, tmp_path, capsys):
    data, workdir = people(tmp_path / "data", seed=0), tmp_path / "run"
    command = [str(tiny_recipe), "--workdir", str(workdir), "--data.path", str(data)]
    command += ["--devices", "1"]
    train = script("train").main
    assert train(command) == 0
    shutil.rmtree(workdir / "checkpoints" / "9")  # as if it had been stopped before
    people(data, seed=1)
    with pytest.raises(SystemExit):
        train(command)
    assert "25 of 25 sampled images differ" in capsys.readouterr().err
    assert train([*command, "--data.changed", "accept"]) == 0
    assert "Continuing, because of --data.changed accept" in capsys.readouterr().err
    stored = json.loads((workdir / "checkpoints" / "9" / "dataset" / "metadata").read_text())
    now = checkpoint.describe(open_source(DataConfig(path=str(data)), seed=0), DataConfig())
    assert stored == now
    assert train(command) == 0
    assert "is not the data" not in capsys.readouterr().err
