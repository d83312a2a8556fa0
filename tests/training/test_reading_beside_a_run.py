"""Reading the checkpoints of a run that saves and removes them all the time."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import ROOT, result, wait_until
from witness import encode, smooth

from arcface_jax.commands import evaluate
from arcface_jax.errors import CheckpointError
from arcface_jax.runtime.files import complete_steps
from arcface_jax.training import saved_runs


@contextmanager
def saving_run(workdir: Path) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "tests/support/pruning_run.py", str(workdir)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE) as process:
        try:
            wait_until(lambda: len(complete_steps(workdir)) > 0, process)
            yield process
            assert process.poll() is None, "the run saves until the last read"
        finally:
            process.stdin.close()


def read_often(workdir: Path, times: int) -> None:
    with saving_run(workdir):
        first = last = complete_steps(workdir)[-1]
        for number in range(times):
            *_, step = saved_runs.restore_backbone(workdir)
            assert step >= last
            last = step
            if number % 10 == 0:
                saved_runs.restore_centers(workdir)
        assert last > first
        with pytest.raises(CheckpointError, match=f"of step {first}"):
            saved_runs.restore_backbone(workdir, first)


def test_a_few_reads_beside_a_saving_run(tmp_path):
    read_often(tmp_path / "run", 4)


@pytest.mark.slow
def test_two_hundred_reads_beside_a_saving_run(tmp_path):
    read_often(tmp_path / "run", 200)


@pytest.mark.slow
def test_two_hundred_evaluations_beside_a_saving_run(tmp_path, capsys):
    faces = [encode(smooth(number)) for number in range(40)]
    (tmp_path / "pairs.bin").write_bytes(pickle.dumps((faces, [n % 2 == 0 for n in range(20)])))
    words = ["--checkpoint", f"{tmp_path}/run", "--targets", f"{tmp_path}/pairs.bin"]
    with saving_run(tmp_path / "run"):
        first = complete_steps(tmp_path / "run")[-1]
        for _ in range(200):
            assert evaluate.main(words) == 0
            assert "eval/pairs/accuracy" in result(capsys.readouterr().out)
        assert complete_steps(tmp_path / "run")[-1] > first
