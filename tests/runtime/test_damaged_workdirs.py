"""Checksums, metrics and lists of a workdir in every state that a disk can leave them in."""

import json
import shutil
from pathlib import Path

import pytest
from damage import DAMAGES, Damage, name

from arcface_jax.data.pipeline import BadImages
from arcface_jax.errors import CheckpointError
from arcface_jax.runtime import checksums, files
from arcface_jax.runtime.metrics import MetricsFile
from arcface_jax.training import checkpoint


@pytest.fixture
def workdir(tmp_path) -> Path:
    """What a run with checkpoints of steps 2 and 4 leaves, with small files in place of arrays."""
    run = tmp_path / "run"
    for step in (2, 4):
        saving = run / "checkpoints" / f"{step}.orbax-checkpoint-tmp-1"
        for item in ("backbone", "dataset", "training"):
            (saving / item).mkdir(parents=True)
            (saving / item / "array").write_text(f"{item} of step {step}")
        with (run / "metrics.jsonl").open("a") as file:
            for done in (step - 1, step):
                file.write(json.dumps({"step": done, "train/loss": 1.5 / done}) + "\n")
        checksums.note(run / "checkpoints", run / "metrics.jsonl")
        saving.rename(run / "checkpoints" / str(step))
    (run / "environment.json").write_text("[]")
    checksums.keep_config(run, '{"seed": 1}')
    return run


def resume_log(run: Path, *, start: int) -> list[dict]:
    MetricsFile(run, start=start, tensorboard=False).close()
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_nothing_is_reported_of_a_whole_workdir(workdir, capsys):
    before = (workdir / "metrics.jsonl").read_bytes()
    assert checksums.set_aside_damaged(workdir / "checkpoints") == []
    assert len(resume_log(workdir, start=4)) == 4
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert checksums.config_copy(workdir) == '{"seed": 1}'
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("harm", DAMAGES, ids=name)
def test_damaged_checksums_never_count_as_verified(workdir, harm: Damage):
    harm(workdir / "checksums" / "4.json")
    messages = checksums.set_aside_damaged(workdir / "checkpoints")
    whole = name(harm) in ("symlink_away", "extra_file")
    assert len(messages) == (0 if whole else 1)
    assert whole or "checkpoint 4 cannot be verified" in messages[0]
    assert files.complete_steps(workdir) == [2, 4]


@pytest.mark.parametrize("harm", DAMAGES, ids=name)
def test_a_damaged_copy_of_the_configuration_is_not_used(workdir, harm: Damage):
    harm(workdir / "checksums" / "config.json")
    if name(harm) in ("symlink_away", "extra_file"):
        assert checksums.config_copy(workdir) == '{"seed": 1}'
    elif name(harm) == "delete":
        assert checksums.config_copy(workdir) is None
    else:
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            checksums.config_copy(workdir)


@pytest.mark.parametrize("harm", DAMAGES, ids=name)
def test_no_metric_is_lost_without_a_message(workdir, capsys, harm: Damage):
    path = workdir / "metrics.jsonl"
    before = resume_log(workdir, start=4)
    harm(path)
    if name(harm) in ("folder_in_place", "dangling_symlink"):
        pytest.skip("`set_aside_wrong_kinds` has moved these, see test_checksums")
    after = resume_log(workdir, start=4)
    told = capsys.readouterr().err
    assert (after == before) == (told == "")
    if told and name(harm) != "delete":
        assert (workdir / "damaged" / "metrics.jsonl").exists()


def test_lines_missing_from_the_end_are_noticed(workdir, capsys):
    path = workdir / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert len(resume_log(workdir, start=4)) == 3
    assert "ends before step 4: metrics after line 3 are lost" in capsys.readouterr().err


def test_a_line_cut_by_a_kill_is_dropped(workdir, capsys):
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')
    assert len(resume_log(workdir, start=4)) == 4
    assert capsys.readouterr().err == ""


def test_checksums_of_an_earlier_version_hold(workdir):
    """They were a flat list of files, without a hash of themselves."""
    path = workdir / "checksums" / "4.json"
    path.write_text(json.dumps(json.loads(path.read_text())["files"]))
    assert checksums.set_aside_damaged(workdir / "checkpoints") == []
    (workdir / "checkpoints" / "4" / "training" / "array").write_text("other")
    (message,) = checksums.set_aside_damaged(workdir / "checkpoints")
    assert "checkpoint 4 is corrupt (training/array)" in message


def test_a_missing_checkpoint_is_reported_and_one_half_written_is_not(workdir):
    saving = workdir / "checkpoints" / "6.orbax-checkpoint-tmp-1"
    shutil.copytree(workdir / "checkpoints" / "4", saving)
    checksums.note(workdir / "checkpoints", workdir / "metrics.jsonl")
    assert checksums.missing(workdir) == []
    assert checksums.set_aside_damaged(workdir / "checkpoints") == []
    files.remove_unfinished(workdir)
    assert checksums.missing(workdir) == []
    shutil.rmtree(workdir / "checkpoints" / "4")
    (message,) = checksums.set_aside_damaged(workdir / "checkpoints")
    assert "lost the checkpoint of step 4; falling back to step 2" in message


def test_a_checkpoint_without_an_item_falls_back_with_and_without_checksums(workdir):
    shutil.rmtree(workdir / "checkpoints" / "4" / "training")
    shutil.copytree(workdir, copy := workdir.with_name("copy"))
    (copy / "checksums" / "4.json").unlink()
    (message,) = checksums.set_aside_damaged(workdir / "checkpoints")
    assert "checkpoint 4 is corrupt (training/array)" in message
    (message,) = checksums.set_aside_damaged(copy / "checkpoints")
    assert "checkpoint 4 is corrupt (training/)" in message


def test_metadata_of_an_older_checkpoint_does_not_keep_the_run_from_resuming(workdir):
    """Orbax reads it of all checkpoints, and fails on JSON of another type."""
    (workdir / "checkpoints" / "2" / "_CHECKPOINT_METADATA").write_text("7")
    with pytest.raises(CheckpointError, match="move it elsewhere"):
        checksums.require_listable(workdir)
    (message,) = checksums.set_aside_damaged(workdir / "checkpoints")
    assert "checkpoint 2 is corrupt (_CHECKPOINT_METADATA)" in message
    assert "falling back" not in message and files.complete_steps(workdir) == [4]
    checksums.require_listable(workdir)


def test_a_stray_file_where_orbax_reads_all_files_is_moved(workdir):
    stray = workdir / "checkpoints" / "4" / "backbone" / "array_metadatas" / "process_0.copy"
    stray.parent.mkdir()
    stray.write_text("")
    with pytest.raises(CheckpointError, match=r"process_0.copy is a stray file"):
        checksums.require_whole(workdir / "checkpoints" / "4", "backbone")
    checksums.require_whole(workdir / "checkpoints" / "4", "training")
    (message,) = checksums.set_aside_damaged(workdir / "checkpoints")
    assert "process_0.copy is a stray file" in message and not stray.exists()


def test_a_folder_in_the_place_of_checksums_is_set_aside_by_the_next(workdir):
    (workdir / "checksums" / "config.json").unlink()
    (workdir / "checksums" / "config.json").mkdir()
    checksums.keep_config(workdir, "{}")
    assert checksums.config_copy(workdir) == "{}"
    assert (workdir / "damaged" / "config.json").is_dir()


def test_a_checkpoint_that_is_a_link_is_refused(workdir, tmp_path):
    (workdir / "checkpoints" / "4").rename(tmp_path / "4")
    (workdir / "checkpoints" / "4").symlink_to(tmp_path / "4")
    with pytest.raises(CheckpointError, match="move the folder back"):
        checksums.set_aside_damaged(workdir / "checkpoints")


def test_a_damaged_list_of_bad_images_is_refused_and_a_cut_one_goes_on(tmp_path):
    path = tmp_path / "bad_images.jsonl"
    whole = '{"step": 1, "index": 3}\n'
    path.write_text(whole + '{"step": 2, "ind')
    assert len(BadImages(path, num_images=9, max_share=0.5)) == 1
    assert path.read_text() == whole
    path.write_text("7\n" + whole)
    with pytest.raises(CheckpointError, match=r"damaged at line 1: remove it"):
        BadImages(path, num_images=9, max_share=0.5)


def test_an_old_checkpoint_that_a_kill_left_half_removed_is_no_import(workdir):
    for item in ("backbone", "training"):
        shutil.rmtree(workdir / "checkpoints" / "2" / item)
    assert checksums.set_aside_damaged(workdir / "checkpoints") == []
    checkpoint._refuse_imported_weights(workdir)
    shutil.rmtree(workdir / "checkpoints" / "4" / "training")
    with pytest.raises(CheckpointError, match="imported weights only"):
        checkpoint._refuse_imported_weights(workdir)
