"""A run that moves between numbers of devices goes on as if nothing had happened."""

import hashlib
import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from arcface_jax import config as c
from arcface_jax import mesh, step, train
from arcface_jax.errors import ConfigError

BATCH, STEPS = 48, 8


def config(workdir: Path, devices: int) -> c.Config:
    return c.Config(
        workdir=str(workdir),
        devices=devices,
        data=c.DataConfig(
            path="synthetic",
            global_batch_size=BATCH,
            flip=False,
            synthetic=c.SyntheticConfig(identities=12, images_per_identity=16),
        ),
        model=c.ModelConfig(network="r_tiny", dtype="float32", embedding_size=32, bn_batch_size=2),
        head=c.HeadConfig(dtype="float32", margin=0.2, scale=16.0),
        optimizer=c.OptimizerConfig(learning_rate=0.005),
        schedule=c.ScheduleConfig(epochs=2, warmup_epochs=0.5),
        evaluation=c.EvaluationConfig(batch_size=BATCH, every_epochs=0),
        checkpoint=c.CheckpointConfig(every_epochs=0),
        logging=c.LoggingConfig(every_steps=1, tensorboard=False),
    )


def losses(workdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture
def watched(monkeypatch) -> tuple[list[str], list[int]]:
    """The images that the steps took, in order; and the step to end a run at by SIGTERM."""
    images: list[str] = []
    end: list[int] = []
    make = step.make_train_step

    def make_watched(*args, **options) -> Callable:
        do_step = make(*args, **options)

        def watched_step(state, batch):
            images.extend(hashlib.md5(x).hexdigest() for x in mesh.own_part(batch["image"]))
            if end and len(images) == end[0] * BATCH:
                os.kill(os.getpid(), signal.SIGTERM)
            return do_step(state, batch)

        return watched_step

    monkeypatch.setattr(step, "make_train_step", make_watched)
    return images, end


@pytest.mark.slow
def test_eight_then_three_then_one_then_eight_devices(watched, tmp_path):
    images, end = watched
    train.train(config(tmp_path / "undisturbed", 8))
    undisturbed, images[:] = images[:], []
    for devices, stop in ((8, 2), (3, 4), (1, 6), (8, None)):
        end[:] = [stop] if stop else []
        outcome = train.train(config(tmp_path / "moved", devices))
        assert outcome.step == (stop or STEPS)
    assert images == undisturbed
    # Each epoch shows each image once.
    for epoch in (images[: len(images) // 2], images[len(images) // 2 :]):
        assert set(Counter(epoch).values()) == {1} and len(epoch) == 12 * 16
    moved = losses(tmp_path / "moved")
    assert len(moved) == STEPS
    np.testing.assert_allclose(moved, losses(tmp_path / "undisturbed"), atol=1e-3)


def test_device_counts_that_do_not_fit_are_refused_with_those_that_do(tmp_path):
    with pytest.raises(ConfigError, match="1, 2, 3, 4, 6, 8"):
        train.train(config(tmp_path / "run", 5))
    assert not (tmp_path / "run").exists()
