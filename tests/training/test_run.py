"""When a run evaluates and saves, and what `train` hands back."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import small_network

from arcface_jax import config as c
from arcface_jax.data.synthetic import faces
from arcface_jax.data.synthetic.source import SyntheticSource
from arcface_jax.errors import CheckpointError, ConfigError, DataError, UserError
from arcface_jax.models import registry
from arcface_jax.runtime import devices as meshes
from arcface_jax.train import Outcome, train
from arcface_jax.training import optim, saved_runs, step
from arcface_jax.training.run import Run, plan_steps


def config(workdir: Path, **changes) -> c.Config:
    tiny = c.Config(
        workdir=str(workdir),
        devices=1,
        data=c.DataConfig(
            path="synthetic",
            global_batch_size=8,
            synthetic=c.SyntheticConfig(identities=4, images_per_identity=4),
        ),
        model=c.ModelConfig(
            network=small_network.NAME, dtype="float32", embedding_size=32, bn_batch_size=8
        ),
        head=c.HeadConfig(dtype="float32", margin=0.2, scale=16.0),
        schedule=c.ScheduleConfig(epochs=2),
        evaluation=c.EvaluationConfig(targets=(), batch_size=8),
        logging=c.LoggingConfig(every_steps=1, tensorboard=False),
    )
    return c.replace(tiny, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[c.Config, Outcome]:
    run = config(tmp_path_factory.mktemp("finished") / "run")
    return run, train(run)


def embed(params, batch_stats) -> np.ndarray:
    images = np.stack([faces.draw_face(seed=1, identity=i, index=0) for i in range(4)])
    network = registry.build(small_network.NAME, embedding_size=32)
    return np.asarray(step.make_embed(network)(params, batch_stats, images))


def test_the_returned_state_is_the_one_in_the_checkpoint(finished):
    run, outcome = finished
    assert outcome.step == int(outcome.state.step) == 4
    assert outcome.evaluated_at is None  # there are no targets
    assert not any(array.is_deleted() for array in jax.tree.leaves(outcome.state))
    _, params, batch_stats, number = saved_runs.restore_backbone(Path(run.workdir))
    assert number == 4
    ours = embed(outcome.state.params, outcome.state.batch_stats)
    assert np.linalg.norm(ours, axis=1).min() > 0
    np.testing.assert_array_equal(ours, embed(params, batch_stats))


def test_a_resumed_run_returns_the_same_state_which_can_be_trained_further(finished):
    run, outcome = finished
    again = train(run)  # nothing is left to train
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), outcome.state, again.state)
    assert all(jax.tree.leaves(same))
    mesh = meshes.make(1)
    schedule = optim.make_schedule(run.schedule, base_rate=0.1, steps_per_epoch=4)
    train_step = step.make_train_step(run, num_classes=4, schedule=schedule, mesh=mesh)
    images = np.stack([faces.draw_face(seed=0, identity=i % 4, index=i // 4) for i in range(8)])
    labels = np.arange(8, dtype=np.int32) % 4
    batch = meshes.to_devices({"image": images, "label": labels}, mesh)
    state, metrics = train_step(again.state, batch)
    assert int(state.step) == 5 and np.isfinite(metrics["train/loss"])


@pytest.mark.parametrize(
    ("every", "best", "evaluate_at", "save_at"),
    [
        ((1, 1), "", {3, 6, 9, 12}, {3, 6, 9, 12}),
        ((2, 0), "", {6, 12}, {12}),
        ((0, 1.5), "", {12}, {4, 8, 12}),
        ((2, 0), "eval/lfw/auc", {6, 12}, {6, 12}),
        ((3, 4), "eval/lfw/auc", {9, 12}, {9, 12}),
        ((0.01, 0), "", set(range(1, 13)), {12}),
        ((1e308, 1e308), "", {12}, {12}),
    ],
)
def test_steps_to_evaluate_and_save_at(every, best, evaluate_at, save_at):
    """Four epochs of three steps; the last step is always among them."""
    steps = plan_steps(
        c.ScheduleConfig(epochs=4),
        c.EvaluationConfig(every_epochs=every[0]),
        c.CheckpointConfig(every_epochs=every[1], best_metric=best),
        start=2,
        per_epoch=3,
    )
    assert (steps.start, steps.total, steps.per_epoch) == (2, 12, 3)
    assert {step for step in range(13) if steps.evaluates(step)} == evaluate_at
    assert {step for step in range(13) if steps.saves(step)} == save_at


def test_weights_of_pytorch_without_pytorch_are_an_error_with_the_install_command(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"init_from .*backbone\.pth.*arcface-jax\[torch\]"):
        train(config(tmp_path / "run", init_from=str(tmp_path / "backbone.pth")))
    assert not (tmp_path / "run").exists()


def test_initial_weights_that_do_not_exist_are_an_error_with_all_that_could_be_named(tmp_path):
    with pytest.raises(ConfigError, match=r"init_from .*nothing does not exist: .*workdir.*onnx"):
        train(config(tmp_path / "run", init_from=str(tmp_path / "nothing")))
    assert not (tmp_path / "run").exists()


def test_a_start_that_saved_no_checkpoint_does_not_bind_the_next_one(finished, tmp_path, capsys):
    """The refusal names another value of an option: the same workdir has to accept it."""
    run, _ = finished
    more = c.replace(run, data__synthetic__identities=5, init_from=run.workdir)
    first = c.replace(more, workdir=str(tmp_path / "run"), finetune__centers="kept")
    with pytest.raises(CheckpointError, match=r"use --finetune\.centers class_means or random"):
        train(first)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "before/lfw/accuracy": 0.5}\n')
    outcome = train(c.replace(first, finetune__centers="random"))
    assert "begun with another finetune.centers, and saved no checkpoint" in capsys.readouterr().err
    assert outcome.step == 4 and outcome.results == {}
    assert saved_runs.restore_backbone(tmp_path / "run")[0].finetune.centers == "random"
    with pytest.raises(CheckpointError, match="centers: the stored run has 'random'"):
        train(first)


@pytest.mark.slow
def test_a_run_of_skipped_steps_has_no_outcome_however_often_it_is_started(tmp_path):
    overflowing = config(
        tmp_path / "run", model__dtype="float16", optimizer__loss_scale=2.0**24, schedule__epochs=1
    )
    with pytest.raises(UserError, match=r"2 steps in a row \(all steps of the run\).*loss-scale"):
        train(overflowing)
    with pytest.raises(UserError, match=r"all 2 steps were skipped .* nothing is exported"):
        train(overflowing)  # resumed after the last step


def test_a_training_set_of_one_class_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"synthetic has 1 class.* at least 2.*several identities"):
        train(config(tmp_path / "run", data__synthetic__identities=1))
    assert not (tmp_path / "run").exists()


def test_only_a_run_that_skipped_every_step_is_untrained(tmp_path):
    def check(*, done: int, skipped: int) -> None:
        run: Any = SimpleNamespace(
            state=SimpleNamespace(counters={"skipped_steps": np.int32(skipped)}),
            done=done,
            config=config(tmp_path, model__dtype="float16"),
        )
        Run.raise_if_untrained(run)

    check(done=0, skipped=0)
    check(done=3, skipped=2)
    with pytest.raises(UserError, match=r"all 3 steps were skipped .* --optimizer\.loss-scale"):
        check(done=3, skipped=3)


def test_labels_that_an_earlier_start_reported_do_not_end_a_resumed_run(tmp_path):
    saves = []
    run: Any = SimpleNamespace(
        config=config(tmp_path),
        steps=SimpleNamespace(start=20, total=100),
        done=30,
        invalid_before=3,
        dataset={"num_classes": 10},
        save=lambda: saves.append(1),
    )
    values = {"train/skipped_in_row": 0.0, "train/invalid_labels": 3.0}
    Run.raise_if_failing(run, {}, values)
    with pytest.raises(
        DataError, match=r"^2 images in steps 21 to 30 have labels outside \[0, 9\]"
    ):
        Run.raise_if_failing(run, {}, values | {"train/invalid_labels": 5.0})
    assert saves == [1]


def test_a_run_without_verification_sets_logs_no_evaluation(finished):
    run, _ = finished
    lines = (Path(run.workdir) / "metrics.jsonl").read_text().splitlines()
    assert all(len(json.loads(line)) > 1 for line in lines)


class MislabeledSource(SyntheticSource):
    """Labels one image with a class that does not exist, until it is relabeled."""

    relabeled = False

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image, label = super().__getitem__(index)
        return image, label if index or self.relabeled else 99


def open_mislabeled(argument: str, data: c.DataConfig, *, seed: int) -> MislabeledSource:
    return MislabeledSource(seed=seed, identities=4, images_per_identity=4)


@pytest.mark.slow
def test_a_run_stopped_by_bad_labels_resumes_once_they_are_fixed(tmp_path, monkeypatch):
    mislabeled = config(
        tmp_path / "run", data__path=f"{__name__}:open_mislabeled", data__changed="accept"
    )
    with pytest.raises(DataError, match="have labels outside"):
        train(mislabeled)
    monkeypatch.setattr(MislabeledSource, "relabeled", True)
    assert train(mislabeled).step == 4
