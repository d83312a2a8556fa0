"""What training makes of its evaluations: the best checkpoint, and words about a collapse."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_network

from arcface_jax import config as c
from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.errors import CheckpointError, ConfigError
from arcface_jax.evaluation import collapse, embed, verification
from arcface_jax.models import layers, registry
from arcface_jax.runtime import devices as meshes
from arcface_jax.train import train
from arcface_jax.training import evaluators, saved_runs, step
from arcface_jax.training.network import Network

BEST = "eval/synthetic/auc"


def config(workdir: Path, **changes) -> c.Config:
    drawn = c.SyntheticConfig(identities=6, images_per_identity=8, pairs=60, pair_identities=20)
    tiny = c.Config(
        workdir=str(workdir),
        devices=1,
        data=c.DataConfig(path="synthetic", global_batch_size=16, synthetic=drawn),
        model=c.ModelConfig(
            network=small_network.NAME, dtype="float32", embedding_size=32, bn_batch_size=16
        ),
        head=c.HeadConfig(dtype="float32", margin=0.2, scale=16.0),
        optimizer=c.OptimizerConfig(learning_rate=0.05),
        schedule=c.ScheduleConfig(epochs=4),
        evaluation=c.EvaluationConfig(targets=("synthetic",), batch_size=40),
        checkpoint=c.CheckpointConfig(keep=1, every_epochs=0),
        logging=c.LoggingConfig(every_steps=1, tensorboard=False),
    )
    return c.replace(tiny, **changes)


def measured(workdir: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def stored(workdir: Path) -> set[int]:
    return {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}


def test_the_best_checkpoint_stays_also_over_a_resumption(tmp_path: Path, monkeypatch):
    workdir = tmp_path / "run"
    # The area under the curve after each epoch is given, so that the best is not the newest.
    given = iter([0.7, 0.9, 0.8, 0.6])
    verify = verification.verify
    monkeypatch.setattr(
        verification, "verify", lambda *args: verify(*args)._replace(auc=next(given))
    )
    run = config(workdir, checkpoint__best_metric=BEST)

    def failing(*args, **kwargs):
        """A train step that takes the program away in the third epoch."""
        inner = make(*args, **kwargs)

        def one(state, batch):
            if int(state.step) == 7:
                raise KeyboardInterrupt
            return inner(state, batch)

        return one

    make = step.make_train_step
    monkeypatch.setattr(step, "make_train_step", failing)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert stored(workdir) == {6}  # epoch 2: the newest, and the best
    monkeypatch.setattr(step, "make_train_step", make)
    train(run)  # the same command again
    assert measured(workdir, BEST) == {3: 0.7, 6: 0.9, 9: 0.8, 12: 0.6}
    assert stored(workdir) == {6, 12}
    assert saved_runs.restore_backbone(workdir)[3] == 12
    assert saved_runs.restore_backbone(workdir, "best")[3] == 6
    assert saved_runs.restore_backbone(workdir, 6)[3] == 6
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9: use one of 6, 12, latest"):
        saved_runs.restore_backbone(workdir, 9)
    newest, best = (Network.from_workdir(workdir, which=which) for which in ("latest", "best"))
    assert any(np.any(newest.params[name] != best.params[name]) for name in best.params)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A run without a best metric and with nothing broken."""
    workdir = tmp_path_factory.mktemp("sound") / "run"
    train(config(workdir))
    return workdir


def test_without_a_metric_there_is_no_best(sound: Path):
    with pytest.raises(CheckpointError, match=r"--checkpoint\.best-metric .*--step latest"):
        saved_runs.restore_backbone(sound, "best")


@pytest.mark.parametrize("name", ["eval/synthetic/threshold", "eval/lfw/accuracy", "accuracy"])
def test_a_metric_that_is_not_measured_is_refused_with_those_that_are(tmp_path: Path, name: str):
    known = r"use one of eval/synthetic/accuracy, eval/synthetic/auc, .*tar@far=1e-1$"
    with pytest.raises(ConfigError, match=f"best_metric {name} .*{known}"):
        train(config(tmp_path / "run", checkpoint__best_metric=name))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # quick: the words and when they are said, in evaluation/test_collapse.py
def test_running_statistics_that_never_move_are_found_and_explained(
    tmp_path: Path, monkeypatch, capsys
):
    """In training the network is fine, and the one that is evaluated is another.

    Of a network with many layers of BatchNorm: the small one needs their statistics too little.
    """
    sound = tmp_path / "sound"
    train(config(sound, model__network="r_tiny"))
    monkeypatch.setattr(layers.BatchNorm, "momentum", 0.0)
    train(config(tmp_path / "broken", model__network="r_tiny", schedule__epochs=2, seed=6))
    said = capsys.readouterr().err
    loss = measured(tmp_path / "broken", "train/loss")
    assert loss[6] < 0.5 * loss[1]
    name = "eval/synthetic/mode_cosine"
    assert measured(tmp_path / "broken", name)[6] < 0.5 < 0.75 < measured(sound, name)[12]
    words = [line for line in said.splitlines() if line.startswith("synthetic: accuracy")]
    assert "no better than chance (0.500)" in words[-1]
    assert "Training mode and evaluation mode disagree" in words[-1]
    assert f"{measured(tmp_path / 'broken', name)[6]:.2f}. BatchNorm's running" in words[-1]


def test_without_a_metric_there_is_no_best_in_a_live_run_either(sound: Path, monkeypatch):
    monkeypatch.setattr(saved_runs.locks, "find", lambda workdir: ("a holder", True))
    monkeypatch.setattr(saved_runs, "_PAUSE_SECONDS", 0.0)
    with pytest.raises(CheckpointError, match="has no best checkpoint"):
        saved_runs.restore_backbone(sound, "best")


def test_baselines_are_of_the_first_set_and_weights_go_by_name(monkeypatch):
    """A state's running means may come in any order of their names."""
    given, measured = [], []

    def verify(embed, target):
        given.append(embed.args)
        measured.append(target.name)
        return verified._replace(name=target.name, accuracy=0.75)

    same = np.arange(20) % 2 == 0
    images = np.zeros((40, 1, 1, 3), np.uint8)
    sets = [PairSet(name, images, same) for name in ("one", "two")]
    embeddings = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    verified = verification.verify(lambda _: embeddings, sets[0])
    monkeypatch.setattr(verification, "verify", verify)
    monkeypatch.setattr(verification, "raw_pixel_accuracy", lambda target: 0.5)
    monkeypatch.setattr(collapse, "mode_cosine", lambda *args, **kwargs: 1.0)
    monkeypatch.setattr(embed, "batched", lambda function, **_: function)
    network = registry.build(small_network.NAME, embedding_size=8)
    evaluate = evaluators.make(
        sets,
        [lambda _: evaluators.Measured("own", {"x": 1.0})],
        **{"backbone": network, "one_group": network, "batch_size": 40, "mesh": meshes.make(1)},
    )
    state: Any = SimpleNamespace(ema={"batch_stats": "statistics", "params": "parameters"})
    found = evaluators.baselines(sets, evaluate, state)
    assert found == {"baseline/raw": 0.5, "baseline/untrained": 0.75}
    assert measured == ["one"] and given == [("parameters", "statistics")]
    assert [result.name for result in evaluate(state)] == ["one", "two", "own"]
