"""`arcface-jax status`: what it reads of a workdir, without JAX."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, result, script

from arcface_jax.config import Config, loading, replace
from arcface_jax.runtime import locks


@pytest.fixture
def workdir(tmp_path) -> Path:
    """Of a run of 3 epochs of 5 steps, in the middle of its second."""
    config = replace(Config(), schedule__epochs=3)
    (tmp_path / "config.json").write_text(loading.to_json(config))
    lines = [
        {"step": 5, "train/loss": 3.0, "epoch": 1.0, "perf/images_per_sec": 90.0},
        {"step": 5, "eval/lfw/accuracy": 0.75},
        {"step": 7, "train/loss": 2.5, "epoch": 1.4, "perf/images_per_sec": 100.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(f'{text}{{"step": 8, "tra')
    for name in ("5", "6.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "5" / "array").write_bytes(bytes(2**20))
    return tmp_path


def test_a_run_is_reported_with_its_holder(workdir, capsys):
    with locks.held(workdir):
        assert script("status").main([str(workdir)]) == 0
    text = capsys.readouterr().out
    found = result(text)
    assert found["holder"] == "alive" and found["host"] in text
    assert (found["step"], found["total_steps"]) == (7, 15)
    assert found["train/loss"] == 2.5 and found["perf/images_per_sec"] == 100
    assert found["eval/lfw/accuracy"] == 0.75 and found["eval_step"] == 5
    assert found["saved_step"] == 5 and found["saved_seconds_ago"] >= 0
    assert found["checkpoint_bytes"] == 2**20 and found["free_bytes"] > 0
    assert "step 7 of 15\nloss 2.5000  100 images/s\nlast checkpoint: step 5, " in text
    assert script("status").main([str(workdir)]) == 0
    assert result(capsys.readouterr().out)["holder"] == "none"


def test_a_run_before_its_first_step_is_reported(tmp_path, capsys):
    (tmp_path / "config.json").write_text(loading.to_json(Config()))
    assert script("status").main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "not training\nstep 0\nno checkpoint yet\n" in text
    assert result(text)["train/loss"] is None


@pytest.mark.parametrize("name", ["empty", "file", "missing"])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, name, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        script("status").main([str(tmp_path / name)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / name} holds no config.json: name the --workdir of a training run\n"
    )


def test_it_imports_neither_jax_nor_tensorboard(workdir):
    code = """
import sys
from arcface_jax.commands import status
assert status.main(sys.argv[1:]) == 0
heavy = {"jax", "flax", "orbax", "tensorboardX", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code, str(workdir)], cwd=ROOT, check=True)
