"""What only a GPU can test; skipped where there is none. `pytest -m gpu` runs these alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import step as benchmark
from benchmarks.step import Case

ROOT = Path(__file__).parents[2]
MIB = 2**20

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(f"JAX runs on {jax.default_backend()} here; needs a GPU")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_steps_have_a_finite_loss(dtype):
    run = benchmark.compile_parts(Case("r18", 32, 1000, 1, dtype))["step"].run
    losses = [float(run()[1]["train/loss"]) for _ in range(3)]
    assert np.isfinite(losses).all() and losses[0] > 20  # s m and ln C, for one that knows nothing


def test_a_million_classes_need_no_memory_for_their_logits():
    few, many = (
        benchmark.compile_parts(Case("r18", 128, classes, 1, "bfloat16"))["step"]
        for classes in (10_000, 1_000_000)
    )
    assert many.temporary_bytes <= few.temporary_bytes + 64 * MIB
    assert np.isfinite(float(many.run()[1]["train/loss"]))


def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, "scripts/benchmark.py", "step", "--network", "r18", "--batch", "32"]
    command += ["--dtype", "bfloat16", "--repeats", "2", "--output", str(tmp_path)]
    # This process holds its share of the GPU's memory.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert {row["part"] for row in outcome["measurements"]} == set(benchmark.PARTS)
    assert all(row["images_per_second"] > 0 for row in outcome["measurements"])
