"""The input of a run, through the real command: damaged images, worker processes, a slow source."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import psutil
import pytest
from commands import HANG, ROOT, run_process, script, wait_until
from test_train import arguments, losses, metrics, reached, recipe

from arcface_jax.data import opening
from arcface_jax.data.recordio.reader import RecordWriter
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.runtime.profiling import Clock

__all__ = ["recipe"]  # a fixture

PLAIN = ["--evaluation.targets", "--evaluation.baselines", "False"]


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """48 drawn faces of two people, and the bytes of the record file."""
    folder = tmp_path / "data"
    folder.mkdir()
    with RecordWriter(folder / "train.rec") as writer:
        writer.write(0, b"", label=[49, 51])
        for key in range(1, 49):
            face = draw_face(seed=0, identity=key % 2, index=key)
            writer.write(key, cv2.imencode(".jpg", face)[1].tobytes(), label=float(key % 2))
    return folder


def damage(folder: Path, *keys: int) -> None:
    """Writes over the first bytes of the images, or of a whole record."""
    lines = (folder / "train.idx").read_text().splitlines()
    offsets = dict(map(int, line.split("\t")) for line in lines)
    with (folder / "train.rec").open("r+b") as file:
        for number, key in enumerate(keys):
            file.seek(offsets[key] + 32 * (number % 2))
            file.write(b"damaged!")


def run(*options: str) -> None:
    """In a process of its own: this one has eight devices, and XLA sums in another order."""
    done = run_process(["scripts/train.py", *options])
    assert done.returncode == 0, done.stderr


def test_damaged_images_are_replaced_listed_and_counted(recipe, faces, tmp_path, capsys):
    damage(faces, 17, 30)
    options = [*PLAIN, "--data.path", str(faces), "--data.max-bad-share", "0.05"]
    workdir = tmp_path / "run"
    assert script("train").main(arguments(recipe, workdir, *options)) == 0
    lines = [json.loads(x) for x in (workdir / "bad_images.jsonl").read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == [16, 29]  # once each in three epochs
    assert {line["where"].split(", ")[1] for line in lines} == {"record 17", "record 30"}
    assert all(1 <= line["step"] <= 6 for line in lines)
    counts = [line["data/bad_images"] for line in metrics(workdir) if "train/loss" in line]
    met = [sum(line["step"] <= step for line in lines) for step in range(1, 19)]
    assert counts == met and met[-1] == 2
    said = capsys.readouterr().err
    assert said.count("skipped unreadable image ") == 2 and "record 17" in said

    # One more is more than allowed.
    damage(faces, 5)
    with pytest.raises(SystemExit):
        script("train").main(arguments(recipe, tmp_path / "new", *options))
    message = capsys.readouterr().err
    assert "3 of 48 training images cannot be read" in message
    assert "data.max_bad_share 0.05" in message and "bad_images.jsonl" in message


@pytest.mark.slow
def test_a_run_stopped_with_workers_goes_on_without_them_to_the_bit(recipe, faces, tmp_path):
    damage(faces, 17)
    options = [*PLAIN, "--data.path", str(faces), "--data.max-bad-share", "0.05"]
    options += ["--data.augment.sets", "dali", "adaface", "erasing", "--data.last-batch", "pad"]
    options += ["--data.global-batch-size", "7", "--model.bn-batch-size", "7"]  # 48 = 6 * 7 + 6
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*arguments(recipe, whole, *options))

    command = [sys.executable, "scripts/train.py", *arguments(recipe, parts, *options)]
    with subprocess.Popen(
        [*command, "--data.workers", "2"],
        **{"cwd": ROOT, "stderr": subprocess.PIPE, "text": True, "start_new_session": True},
    ) as process:
        wait_until(lambda: reached(parts, 5), process)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        os.killpg(process.pid, signal.SIGTERM)  # as a cluster does: to the workers too
        _, stderr = process.communicate(timeout=HANG)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert psutil.wait_procs(workers, timeout=HANG)[1] == []
    stopped = max(losses(parts))
    assert stopped < 21, "it ended before the signal came; make the run longer"

    run(*arguments(recipe, parts, *options))
    assert losses(parts) == losses(whole) and max(losses(whole)) == 21


@pytest.mark.slow
def test_workers_do_not_outlive_a_run_that_is_killed(recipe, tmp_path):
    workdir = tmp_path / "run"
    options = arguments(recipe, workdir, *PLAIN, "--data.workers", "1")
    command = [sys.executable, "scripts/train.py", *options, "--schedule.epochs", "10000"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: reached(workdir, 1), process)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        process.kill()
        process.wait()
    assert psutil.wait_procs(workers, timeout=HANG)[1] == []


def test_a_slow_source_is_named_as_the_limit(recipe, tmp_path, capsys, monkeypatch):
    """Images are read only while the run waits for them, and only reading takes time."""
    now, waits, waiting = [0.0], threading.Event(), Clock.waiting

    @contextmanager
    def noted(clock: Clock):
        waits.set()
        with waiting(clock):
            yield
        waits.clear()

    class Slow(opening.SyntheticSource):
        def __getitem__(self, index: int):
            assert waits.wait(HANG)
            now[0] += 0.05
            return super().__getitem__(index)

    monkeypatch.setattr(Clock, "waiting", noted)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def open_source(*_, **__):
        return Slow(seed=0, identities=5, images_per_identity=5)

    monkeypatch.setattr(opening, "open_source", open_source)
    options = [*PLAIN, "--data.threads", "1", "--data.prefetch-batches", "1"]
    assert script("train").main(arguments(recipe, tmp_path / "run", *options)) == 0
    said = capsys.readouterr().err
    assert said.count("input-bound: ") == 1
    assert "--data.workers (now 0) or --data.threads (now 1)" in said
