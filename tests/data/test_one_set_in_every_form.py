"""RecordIO to a folder to RecordIO to ArrayRecord, and training sees the same batches from all."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from arcface_jax.config import DataConfig
from arcface_jax.data import pipeline
from arcface_jax.data.opening import open_source
from arcface_jax.data.tools import packing

ROOT = Path(__file__).parents[2]
LFW = os.environ.get("ARCFACE_JAX_LFW", "")
pytestmark = pytest.mark.skipif(not LFW, reason="set ARCFACE_JAX_LFW to the folder of train.rec")


def run(script: str, *words) -> dict:
    command = [sys.executable, f"scripts/{script}", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))


def every_form(first: Path, tmp_path: Path) -> dict[str, str]:
    """data.path of each form, every one made of the one before it."""
    images = len(open_source(DataConfig(path=str(first)), seed=0))
    steps = {
        "folder": ("pack", first, tmp_path / "folder", "--format", "folder"),
        "records": ("pack", tmp_path / "folder", tmp_path / "records"),
        "tfds": ("to-tfds", tmp_path / "records", tmp_path / "tfds", "--shard-images", 1000),
    }
    for words in steps.values():
        result = run("data.py", *words)
        assert (result["images"], result["skipped"]) == (images, 0)
    tfds = f"tfds:faces@{tmp_path / 'tfds'}"
    paths = {name: str(tmp_path / name) for name in ("folder", "records")}
    return {"original": str(first), **paths, "tfds": tfds}


def digests(path: str, *, batch: int, steps: int) -> list[str]:
    """A digest of each batch of the training pipeline."""
    data = DataConfig(path=path, global_batch_size=batch)
    source = open_source(data, seed=0)
    batches = pipeline.batches(source, data, seed=5, start=0, stop=steps)
    return [
        hashlib.md5(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(b))).hexdigest()
        for b in batches
    ]


def test_a_part_of_lfw_gives_identical_batches_in_every_form(tmp_path: Path):
    source = open_source(DataConfig(path=LFW), seed=0)
    selection = packing.select(source, identities=np.arange(0, source.num_classes, 8))
    packing.pack(source, selection, tmp_path / "part")
    paths = every_form(tmp_path / "part", tmp_path)
    found = {name: digests(path, batch=100, steps=15) for name, path in paths.items()}
    assert len(set(found["original"])) == 15
    for name, digest in found.items():
        assert digest == found["original"], name


@pytest.mark.slow
def test_lfw_gives_identical_batches_and_one_training_in_every_form(tmp_path: Path):
    paths = every_form(Path(LFW), tmp_path)
    for name in ("train.rec", "train.idx", "property"):
        assert (tmp_path / "records" / name).read_bytes() == (Path(LFW) / name).read_bytes()
    found = {name: digests(path, batch=64, steps=300) for name, path in paths.items()}
    assert len(set(found["original"])) == 300
    lines = {}
    for name in paths:
        assert found[name] == found["original"], name
    for name in ("original", "tfds"):  # the two ends of the chain
        options = {
            "--data.path": paths[name],
            "--workdir": tmp_path / f"run_{name}",
            "--seed": 5,
            "--schedule.epochs": 1,
            "--data.global-batch-size": 512,
            "--model.bn-batch-size": 512,
            "--schedule.warmup-epochs": 0,
            "--logging.every-steps": 3,
        }
        words = [word for pair in options.items() for word in pair]
        run("train.py", "configs/lfw_tiny.py", *words, "--evaluation.targets")
        text = (tmp_path / f"run_{name}" / "metrics.jsonl").read_text().splitlines()
        kept = [
            {k: v for k, v in json.loads(line).items() if k.startswith("train/")} for line in text
        ]
        lines[name] = [line for line in kept if line]
    assert len(lines["original"]) > 6 and lines["tfds"] == lines["original"]
