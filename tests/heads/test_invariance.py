"""One step and ten, on any number of devices, block sizes and processes: the same numbers."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import HANG
from dense import error
from several_steps import STEPS, Trace, run_steps

SUPPORT = Path(__file__).parents[1] / "support"
ONE_STEP, TEN_STEPS = 1e-5, 1e-3


def assert_same(ours: Trace, theirs: Trace) -> None:
    for step in range(STEPS):
        allowed = ONE_STEP if step == 0 else TEN_STEPS
        assert error(ours.losses[step], theirs.losses[step]) <= allowed
        assert error(ours.d_embeddings[step], theirs.d_embeddings[step]) <= allowed
    assert error(ours.centers_after_one, theirs.centers_after_one) <= ONE_STEP
    assert error(ours.centers, theirs.centers) <= TEN_STEPS
    assert error(ours.centers, ours.centers_after_one) > 0.1  # they did move


@pytest.mark.parametrize(
    ("num_classes", "optimizer"),
    [
        (1001, "sgd"),
        (5, "adamw"),
        pytest.param(5, "sgd", marks=pytest.mark.slow),
        pytest.param(1001, "adamw", marks=pytest.mark.slow),
    ],
)
def test_devices_and_block_sizes_change_nothing(num_classes, optimizer):
    reference = run_steps(num_classes, devices=1, block_size=4096, optimizer=optimizer)
    assert reference.losses[-1] < reference.losses[0]
    for devices, block_size in [(2, 64), (3, 100), (4, 1000), (8, 16)]:
        assert_same(
            run_steps(num_classes, devices=devices, block_size=block_size, optimizer=optimizer),
            reference,
        )


def test_two_processes_of_four_devices_equal_one_of_eight(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT.parent.parent)}
    command = [sys.executable, str(SUPPORT / "several_steps.py"), address]
    processes = [
        subprocess.Popen(
            [*command, str(number), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    errors = [process.communicate(timeout=HANG)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    one = run_steps(1001, devices=8, block_size=64, optimizer="sgd")
    for number in range(2):
        stored = np.load(tmp_path / f"{number}.npz")
        assert_same(Trace(**{name: stored[name] for name in Trace._fields}), one)
