"""Files of a workdir that are not what was written are found, set aside, and reported."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import small_network

from arcface_jax import config as c
from arcface_jax import train
from arcface_jax.errors import CheckpointError
from arcface_jax.runtime import checksums
from arcface_jax.training import saved_runs


def config(workdir: Path) -> c.Config:
    """As `commands.TINY_RECIPE` trains, so that the step is in the cache."""
    return c.Config(
        workdir=str(workdir),
        devices=1,
        data=c.DataConfig(
            path="synthetic",
            global_batch_size=8,
            synthetic=c.SyntheticConfig(identities=5, images_per_identity=5),
        ),
        model=c.ModelConfig(
            network=small_network.NAME, dtype="float32", embedding_size=32, bn_batch_size=8
        ),
        head=c.HeadConfig(dtype="float32", margin=0.2, scale=16.0),
        schedule=c.ScheduleConfig(epochs=3),
        evaluation=c.EvaluationConfig(batch_size=8, every_epochs=0),
        checkpoint=c.CheckpointConfig(keep=3),
        logging=c.LoggingConfig(every_steps=1, tensorboard=False),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 3, 6 and 9."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stderr(io.StringIO()) as told:
        train.train(config(workdir))
    assert "warning" not in told.getvalue()
    return workdir


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_each_finished_checkpoint_has_checksums(finished):
    assert sorted(p.name for p in (finished / "checksums").iterdir()) == [
        "3.json",
        "6.json",
        "9.json",
        "config.json",
    ]
    assert checksums.set_aside_damaged(finished / "checkpoints") == []


@pytest.mark.parametrize(
    "damage",
    ["flipped", *(pytest.param(damage, marks=pytest.mark.slow) for damage in ("cut", "missing"))],
)
def test_the_last_whole_one_is_taken_and_the_run_ends_as_it_would(run, capsys, damage):
    weights = saved_runs.restore_backbone(run)[1]
    target = largest(run / "checkpoints" / "9")
    if damage == "flipped":
        flip(target)
    elif damage == "cut":
        target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
    else:
        target.unlink()
    assert train.train(config(run)).step == 9
    said = capsys.readouterr().err
    assert "checkpoint 9 is corrupt" in said and target.name in said
    assert "resuming at step 6" in said
    assert (run / "damaged" / "9").is_dir()
    again = saved_runs.restore_backbone(run)[1]
    assert all((weights[name] == again[name]).all() for name in weights)


def test_where_none_is_whole_nothing_is_touched(run):
    for step in ("3", "6", "9"):
        flip(largest(run / "checkpoints" / step))
    before = files(run / "checkpoints")
    with pytest.raises(CheckpointError, match="start a new run in another --workdir"):
        train.train(config(run))
    assert files(run / "checkpoints") == before


def test_what_inference_reads_of_a_damaged_one_is_refused_by_name(run):
    damaged = largest(run / "checkpoints" / "9" / "backbone")
    before = damaged.read_bytes()
    flip(damaged)
    with pytest.raises(CheckpointError, match=rf"checkpoints/9 is corrupt .*{damaged.name}"):
        saved_runs.restore_backbone(run)
    assert saved_runs.restore_backbone(run, 6)[3] == 6
    damaged.write_bytes(before)
    flip(largest(run / "checkpoints" / "9" / "training"))  # of no interest to inference
    assert saved_runs.restore_backbone(run)[3] == 9


def test_a_resume_repairs_what_a_run_can_do_without(run, capsys):
    """Each of these ended in a traceback, or kept the run from resuming for good."""
    weights = saved_runs.restore_backbone(run)[1]
    whole = {name: (run / name).read_text() for name in ("config.json", "metrics.jsonl")}
    (run / "config.json").write_text(whole["config.json"].replace('"seed": 0', '"seed": 1'))
    (run / "environment.json").write_text("[{")
    lines = whole["metrics.jsonl"].splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines[:4], "7\n", *lines[5:]]))
    (run / "metrics.csv").symlink_to(run / "nowhere")
    (run / "checksums" / "9.json").write_text("")
    (run / "checkpoints" / "998").write_text("")
    (run / "checkpoints" / "999").mkdir()
    (run / "checkpoints" / "²").mkdir()
    outcome = train.train(config(run))
    told = capsys.readouterr().err
    for words in (
        "config.json differs from its copy",
        "environment.json is damaged",
        "metrics.jsonl is damaged from line 5 on",
        "metrics.csv is not a file",
        "checkpoint 9 cannot be verified",
        *(f"{name} is not a checkpoint" for name in ("998", "999", "²")),
    ):
        assert words in told
    assert outcome.step == 9 and (run / "config.json").read_text() == whole["config.json"]
    again = saved_runs.restore_backbone(run)[1]
    assert all((weights[name] == again[name]).all() for name in weights)
    aside = {path.name for path in (run / "damaged").iterdir()}
    files = {"config.json", "environment.json", "metrics.jsonl", "metrics.csv"}
    assert aside == {"998", "999", "²"} | files
    kept = [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert kept[:4] == [json.loads(x)["step"] for x in lines[:4]]


@pytest.mark.slow
def test_a_checkpoint_without_the_training_item_is_not_imported_weights(run, capsys):
    shutil.rmtree(run / "checkpoints" / "9" / "training")
    (run / "checksums" / "9.json").unlink()
    assert train.train(config(run)).step == 9
    assert "checkpoint 9 is corrupt (training/)" in capsys.readouterr().err


def test_a_run_whose_checkpoints_are_gone_does_not_start_over(run):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="lost the checkpoint of step 3, 6, 9"):
        train.train(config(run))
    assert (run / "metrics.jsonl").stat().st_size


def test_readers_use_the_copy_of_the_configuration_and_leave_the_workdir_as_it_is(run, capsys):
    (run / "config.json").write_text("{}")
    (run / "checksums" / "9.json").write_text("{}")
    before = files(run)
    assert saved_runs.restore_backbone(run)[0].head.scale == 16.0
    told = capsys.readouterr().err
    assert "using the copy" in told and "9.json is empty" in told
    assert files(run) == before
    (run / "checksums" / "config.json").unlink()
    (run / "config.json").write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match=r"config.json .* restore it from backup"):
        saved_runs.restore_backbone(run)
