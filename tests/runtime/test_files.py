"""A disk that is full or read-only, under the real command: one message, and nothing is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import HANG, ROOT, run_process

# Four steps an epoch; a checkpoint has about 7.5 MiB.
RECIPE = """
from arcface_jax import config as c


def get_config():
    return c.Config(
        devices=1,
        data=c.DataConfig(
            path="synthetic",
            global_batch_size=8,
            synthetic=c.SyntheticConfig(identities=8, images_per_identity=4),
        ),
        model=c.ModelConfig(network="r_tiny", dtype="float32", embedding_size=32, bn_batch_size=8),
        head=c.HeadConfig(dtype="float32", margin=0.2, scale=16.0),
        schedule=c.ScheduleConfig(epochs=8),
        evaluation=c.EvaluationConfig(batch_size=8, every_epochs=0),
        checkpoint=c.CheckpointConfig(keep=20),
        logging=c.LoggingConfig(every_steps=1),
    )
"""


def mounted(folder: Path, script: str, *, runs: int) -> list[tuple[int, str]]:
    """Runs a shell script that may mount, in a view of the file system of its own.

    Args:
      folder: the script's $D; it has $TRAIN, the command, and calls `train WORKDIR OPTIONS`.
      script: what is done.
      runs: how many times it trains.

    Returns:
      Exit code and stderr of each.
    """
    may = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=1m tmpfs {folder}"],
        capture_output=True,
        text=True,
    )
    if may.returncode != 0:
        pytest.skip(f"this machine lets nobody mount a disk to fill: {may.stderr.strip()}")
    out = folder.parent / "said"
    out.mkdir()
    (folder.parent / "recipe.py").write_text(RECIPE)
    train = f"{sys.executable} scripts/train.py {folder.parent}/recipe.py"
    begin = f"""
        D={folder}; n=0
        train() {{
            n=$((n + 1)); w=$1; shift
            {train} --workdir $w "$@" > {out}/$n.out 2> {out}/$n.err && code=0 || code=$?
            echo $code > {out}/$n.code
        }}
    """
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-ec", begin + script],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": HANG},
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    numbers = range(1, runs + 1)
    return [(int((out / f"{n}.code").read_text()), (out / f"{n}.err").read_text()) for n in numbers]


def one_message(code: int, said: str) -> str:
    """The error, where it is all that a command says of what went wrong."""
    assert code == 2, said
    assert "Traceback" not in said and "Exception" not in said and "ERROR" not in said, said
    assert said.count("error:") == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def losses(workdir: Path) -> dict[int, float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_a_checkpoint_that_fills_the_disk_costs_only_itself(disk):
    """20 MiB hold two checkpoints; then there is more room, and the same command.

    There are 32 steps from one checkpoint to the next, for a save fails some steps after it began.
    """
    options = "--schedule.epochs 32 --checkpoint.every-epochs 8"
    script = f"""
        mount -t tmpfs -o size=20m tmpfs $D
        train $D/run {options}
        ls $D/run/checkpoints > $D/../after_full
        train $D/run {options}
        mount -o remount,size=400m $D
        train $D/run {options}
        train $D/undisturbed {options}
        cp -r $D/run $D/undisturbed $D/..
    """
    full, again, *rest = mounted(disk, script, runs=4)
    for which in (full, again):
        message = one_message(*which)
        assert f"cannot write {disk}/run/checkpoints/96 (the checkpoint of step 96)" in message
        assert "No space left on device. Free disk space and rerun the same command" in message
        assert "it resumes from step 64 " in message
    assert "step 127/128" not in full[1], "it is noticed steps before the next checkpoint"
    left = (disk.parent / "after_full").read_text().split()
    assert sorted(name for name in left if name.isdigit()) == ["32", "64"]
    assert any(not name.isdigit() for name in left), "the test is of one that is half-written"
    assert [code for code, _ in rest] == [0, 0], rest
    assert all("resuming at step 64 of 128" in said for _, said in (again, rest[0]))
    ours, theirs = (losses(disk.parent / name) for name in ("run", "undisturbed"))
    assert ours == theirs and len(ours) == 128
    kept = {path.name for path in (disk.parent / "run" / "checkpoints").iterdir()}
    assert kept == {str(step) for step in range(32, 129, 32)}


@pytest.mark.slow
@pytest.mark.parametrize("every", ["1", "0"], ids=["checkpoints", "none yet"])
def test_a_disk_that_others_fill_while_training(disk, every):
    """Whatever is written next: a line of metrics, of CSV, of TensorBoard, or a checkpoint."""
    script = f"""
        mount -t tmpfs -o size=60m tmpfs $D
        fill() {{
            until [ "$(cat $D/run/metrics.jsonl 2>/dev/null | wc -l)" -gt 10 ]; do sleep 0.05; done
            dd if=/dev/zero of=$D/filler bs=64k 2>/dev/null || true
            dd if=/dev/zero of=$D/filler2 bs=512 2>/dev/null || true
        }}
        fill &
        train $D/run --schedule.epochs 500 --logging.csv True --checkpoint.every-epochs {every}
        wait
    """
    (full,) = mounted(disk, script, runs=1)
    message = one_message(*full)
    assert f"cannot write {disk}/run/" in message and "No space left on device" in message
    if every == "0":
        assert "it starts over, because no checkpoint is complete yet" in message
    else:
        assert "it resumes from step " in message


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start_leaves_an_empty_folder(disk):
    script = """
        mount -t tmpfs -o size=1m tmpfs $D
        dd if=/dev/zero of=$D/filler bs=512 2>/dev/null || true
        train $D/run
        ls -R $D > $D/../after
    """
    (full,) = mounted(disk, script, runs=1)
    assert f"cannot write to --workdir {disk}/run" in one_message(*full)
    assert "config" not in (disk.parent / "after").read_text()


@pytest.mark.slow
def test_a_read_only_workdir_is_one_message_and_stays_as_it_is(disk):
    script = """
        train $D/run --schedule.epochs 1
        mkdir $D/run/checkpoints/8.orbax-checkpoint-tmp $D/empty
        cp -r $D/run $D/../before
        mount --bind $D $D
        mount -o remount,ro,bind $D
        for name in new empty run; do train $D/$name --schedule.epochs 1; done
        mount -o remount,rw,bind $D
        rmdir $D/run/checkpoints/8.orbax-checkpoint-tmp $D/../before/checkpoints/8*
        mount -o remount,ro,bind $D
        train $D/run --schedule.epochs 1
        diff -r $D/run $D/../before
        ls $D > $D/../after
    """
    first, *rest = mounted(disk, script, runs=5)
    assert first[0] == 0, first[1]
    for which in rest:
        message = one_message(*which)
        assert str(disk) in message and "Read-only file system" in message
        assert "Make the disk writable" in message
    assert "it resumes from step 4 " in one_message(*rest[2])
    assert (disk.parent / "after").read_text().split() == ["empty", "run"]


def test_a_workdir_that_cannot_be_made_is_one_message(tmp_path):
    """Below /proc nobody can make a folder, root neither."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    command = ["scripts/train.py", str(tmp_path / "recipe.py"), "--workdir", "/proc/run"]
    done = run_process(command)
    message = one_message(done.returncode, done.stderr)
    assert "cannot write to --workdir /proc/run" in message and "another --workdir" in message
