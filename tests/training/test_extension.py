"""Runs that get another length: `schedule.extend`, and what the refusal without it says."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import small_network

from arcface_jax import config as c
from arcface_jax.config import loading
from arcface_jax.errors import CheckpointError
from arcface_jax.train import train
from arcface_jax.training import checkpoint, extension


def config(workdir: Path, **changes) -> c.Config:
    """Two steps an epoch at a constant rate."""
    tiny = c.Config(
        workdir=str(workdir),
        devices=1,
        data=c.DataConfig(
            path="synthetic",
            global_batch_size=8,
            synthetic=c.SyntheticConfig(identities=4, images_per_identity=4),
        ),
        model=c.ModelConfig(
            network=small_network.NAME, dtype="float32", embedding_size=32, bn_batch_size=8
        ),
        head=c.HeadConfig(dtype="float32", margin=0.2, scale=16.0),
        schedule=c.ScheduleConfig(kind="step", epochs=2),
        evaluation=c.EvaluationConfig(targets=(), batch_size=8),
        logging=c.LoggingConfig(every_steps=1, tensorboard=False),
    )
    return c.replace(tiny, **changes)


def logged(workdir: Path, name: str) -> dict[int, float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.slow
def test_an_extended_run_equals_one_of_that_length(tmp_path, capsys):
    once = train(config(tmp_path / "once", schedule__epochs=3)).state
    train(config(tmp_path / "run"))
    longer = config(tmp_path / "run", schedule__epochs=3)
    stored = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(CheckpointError) as error:
        train(longer)
    assert "--schedule.extend" in str(error.value) and "--init-from" in str(error.value)
    assert (tmp_path / "run" / "config.json").read_text() == stored

    capsys.readouterr()
    extended = train(c.replace(longer, schedule__extend=True)).state
    text = capsys.readouterr().err
    assert "step schedule changed from 2 epochs (4 steps) to 3 epochs (6 steps)" in text
    assert "the learning rate jumps" not in text
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), once, extended)
    assert all(jax.tree.leaves(same))
    assert logged(tmp_path / "run", "train/loss") == logged(tmp_path / "once", "train/loss")
    assert logged(tmp_path / "run", "schedule/total_steps") == {4: 6.0}

    assert train(longer).step == 6  # the plain command resumes it from now on
    with pytest.raises(CheckpointError, match=r"schedule\.epochs 1 is 2 steps, .* done 6: .* 3"):
        train(c.replace(longer, schedule__epochs=1, schedule__extend=True))


@pytest.mark.slow
def test_an_extended_polynomial_run_follows_the_new_schedule(tmp_path, capsys):
    short = config(tmp_path, schedule__kind="polynomial")
    train(short)
    train(c.replace(short, schedule__epochs=4, schedule__extend=True))
    assert "warning: the learning rate jumps from 0 to 0.05" in capsys.readouterr().err
    expected = {k + 1: 0.1 * (1 - k / (4 if k < 4 else 8)) for k in range(8)}
    assert logged(tmp_path, "train/lr") == pytest.approx(expected)


def begun(workdir: Path, **changes) -> c.Config:
    """The configuration of a run: config.json, and the note that it saved step 20."""
    stored = config(workdir, **changes)
    (workdir / "checksums").mkdir(parents=True)
    (workdir / "checksums" / "20.json").touch()
    (workdir / "config.json").write_text(loading.to_json(stored))
    return stored


def extend(run: c.Config, *, start: int) -> list[str]:
    stored = extension.stored_schedule(run)
    assert stored is not None
    return extension.extend(run, stored, start=start, per_epoch=10)


def test_both_schedules_are_printed_and_the_new_one_is_stored(tmp_path):
    short = begun(tmp_path / "run", schedule__kind="polynomial", logging__every_steps=7)
    asked = c.replace(short, schedule__epochs=5, schedule__extend=True, logging__every_steps=9)
    changed, warning = extend(asked, start=20)
    assert "from 2 epochs (20 steps) to 5 epochs (50 steps)" in changed
    assert "at step 20: 0.06 (was 0)" in changed and "jumps from 0 to 0.06" in warning
    stored = checkpoint.read_config(tmp_path / "run")
    assert stored == c.replace(short, schedule__epochs=5)
    assert extension.stored_schedule(asked) is None  # the same command again changes nothing


def test_only_drops_that_are_still_to_come_may_change(tmp_path):
    short = begun(tmp_path / "run", schedule__epochs=4, schedule__decay_epochs=(1, 3))
    longer = c.replace(short, schedule__epochs=6, schedule__extend=True)
    with pytest.raises(CheckpointError, match=r"decay_epochs \(2, 3\) differ .* 1\.5 epochs"):
        extend(c.replace(longer, schedule__decay_epochs=(2, 3)), start=15)
    assert checkpoint.read_config(tmp_path / "run") == short
    (line,) = extend(c.replace(longer, schedule__decay_epochs=(1, 5)), start=15)
    assert "decay_epochs (1, 3) to 6 epochs (60 steps), decay_epochs (1, 5)" in line


def test_without_the_option_the_refusal_names_both_ways_to_continue(tmp_path):
    stored = begun(tmp_path / "run")
    with pytest.raises(CheckpointError, match="epochs: the stored run has 2") as error:
        checkpoint.open_workdir(c.replace(stored, schedule__epochs=3))
    assert "--schedule.extend" in str(error.value)
    assert f"--init-from {tmp_path / 'run'}" in str(error.value)
    assert checkpoint.read_config(tmp_path / "run") == stored


def test_epochs_that_end_before_the_last_saved_step_are_refused(tmp_path):
    short = begun(tmp_path / "run", schedule__epochs=4)
    with pytest.raises(CheckpointError, match=r"epochs 2 is 20 steps, .* done 25: .* at least 3"):
        extend(c.replace(short, schedule__epochs=2, schedule__extend=True), start=25)


def test_other_differences_are_refused_with_and_without_the_option(tmp_path):
    other = c.replace(begun(tmp_path / "run"), schedule__epochs=3, seed=1)
    for run in (other, c.replace(other, schedule__extend=True)):
        with pytest.raises(CheckpointError, match="seed: the stored run has 0") as error:
            checkpoint.open_workdir(run)
        assert "--schedule.extend" not in str(error.value)
