"""A run whose loss is no longer finite, through the real command: how it ends, and what is left."""

import json
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import run_process

from arcface_jax.training import saved_runs

RECIPE = """
from arcface_jax import config as c


def get_config():
    return c.Config(
        data=c.DataConfig(
            path="synthetic",
            global_batch_size=8,
            synthetic=c.SyntheticConfig(identities=5, images_per_identity=20),
        ),
        model=c.ModelConfig(
            network="tests.support.small_network:make",
            dtype="float32",
            embedding_size=32,
            bn_batch_size=8,
        ),
        head=c.HeadConfig(dtype="float32", margin=0.2, scale=16.0),
        schedule=c.ScheduleConfig(epochs=1),
        logging=c.LoggingConfig(every_steps=1, tensorboard=False),
    )
"""


def run(recipe: Path, workdir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [str(recipe), "--workdir", str(workdir), "--devices", "1", *more]
    return run_process(["scripts/train.py", *words])


@pytest.fixture(scope="module")
def stuck(tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """The recipe, and a run of it at a rate that no network survives."""
    folder = tmp_path_factory.mktemp("failure")
    recipe = folder / "tiny.py"
    recipe.write_text(RECIPE)
    more = ("--optimizer.learning-rate", "1e30", "--optimizer.stop-after-skipped", "3")
    return recipe, folder / "run", run(recipe, folder / "run", *more)


def test_it_ends_with_code_2_and_says_what_to_change(stuck):
    _, workdir, done = stuck
    assert done.returncode == 2, done.stderr
    assert "RESULT" not in done.stdout and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: step ") and "for 3 steps in a row" in last
    assert "--optimizer.learning-rate 1e+29" in last
    assert str(next(workdir.glob("failure_*.json"))) in last


def test_the_report_names_the_images_and_the_layers(stuck):
    _, workdir, _ = stuck
    (path,) = workdir.glob("failure_*.json")
    found = json.loads(path.read_text())
    assert path.name == f"failure_{found['step']}.json"
    assert len(found["images"]) == len(set(found["images"])) == 8
    assert found["metrics"]["train/skipped_in_row"] == 3
    assert found["not_finite"] and set(found["not_finite"]) <= set(found["gradient_norms"])
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train/skipped_in_row"] == 3 and lines[-1]["step"] == found["step"]


def test_what_is_kept_is_finite_and_goes_on(stuck):
    recipe, workdir, _ = stuck
    _, params, batch_stats, kept = saved_runs.restore_backbone(workdir)
    arrays = jax.tree.leaves((params, batch_stats, saved_runs.restore_centers(workdir)[0]))
    assert len(arrays) > 10 and all(np.isfinite(array).all() for array in arrays)
    assert (workdir / f"failure_{kept}.json").exists()
    more = ("--optimizer.learning-rate", "1e30", "--optimizer.stop-after-skipped", "5")
    again = run(recipe, workdir, *more)
    assert f"resuming at step {kept} of 12" in again.stderr, again.stderr
    # The count of steps in a row is part of what was resumed: two more make five.
    assert again.returncode == 2 and (workdir / f"failure_{kept + 2}.json").exists()
