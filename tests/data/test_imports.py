"""Reading images and verification sets loads neither the networks nor the log writers."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("arcface_jax.data.opening", {"jax", "flax", "orbax", "tensorboardX", "torch"}),
        ("arcface_jax.data.pairs.opening", {"jax", "flax", "orbax", "tensorboardX", "torch"}),
        ("arcface_jax.data.faces", {"jax", "flax", "orbax", "tensorboardX", "torch"}),
        ("arcface_jax.evaluation.verification", {"flax", "orbax", "tensorboardX", "torch"}),
        # Grain brings Orbax with it, for checkpoints of its iterators.
        ("arcface_jax.data.pipeline", {"flax", "tensorboardX", "torch"}),
    ],
)
def test_reading_data_does_not_import_what_it_does_not_use(module: str, unwanted: set[str]):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, module], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"arcface_jax", "numpy"} <= loaded, "the list of modules is not what it should be"
    assert not loaded & unwanted
