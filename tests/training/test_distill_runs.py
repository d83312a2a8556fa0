"""Runs with a teacher through the real commands: killed, online, without labels, compatible."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from commands import result, script

from arcface_jax.commands import calibrate, evaluate
from arcface_jax.config import DataConfig, DistillConfig, SyntheticConfig
from arcface_jax.data.opening import open_source
from arcface_jax.data.synthetic import faces
from arcface_jax.errors import UserError
from arcface_jax.evaluation.verification import across
from arcface_jax.inference.embedder import Embedder
from arcface_jax.inference.open_model import open_path
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import saved_runs, step, teacher, teacher_record

PLAIN = ("--evaluation.targets", "--evaluation.baselines", "False", "--devices", "1")


def arguments(recipe: Path, workdir: Path, *more: str) -> list[str]:
    return [str(recipe), "--workdir", str(workdir), *PLAIN, *more]


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> dict[int, tuple[float, ...]]:
    names = ("train/loss", "train/distill_loss", "train/distill_weight", "train/gradient_norm")
    found = [line for line in lines(workdir) if "train/loss" in line]
    return {line["step"]: tuple(line[name] for name in names) for line in found}


@pytest.fixture(scope="module")
def taught_by(tiny_recipe, tmp_path_factory) -> Path:
    """A run of another seed, which is the teacher of all others."""
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    more = ("--seed", "1", "--schedule.epochs", "1")
    assert script("train").main(arguments(tiny_recipe, workdir, *more)) == 0
    return workdir


class Killed(BaseException):
    """Nobody catches it."""


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tiny_recipe, taught_by, tmp_path, monkeypatch):
    """In its second epoch, without a save; cache and weight are then as they were."""
    options = (
        *("--distill.teacher", str(taught_by), "--distill.loss", "cosine", "relational"),
        *("--distill.warmup-epochs", "1", "--distill.decay", "linear", "--schedule.epochs", "5"),
    )
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert script("train").main(arguments(tiny_recipe, whole, *options)) == 0
    make = step.make_train_step
    with monkeypatch.context() as patch:
        patch.setattr(step, "make_train_step", lambda *a, **k: killing(make(*a, **k), after=4))
        with pytest.raises(Killed):
            script("train").main(arguments(tiny_recipe, killed, *options))
    assert max(losses(killed)) == 4
    assert script("train").main(arguments(tiny_recipe, killed, *options)) == 0
    assert losses(killed) == losses(whole)
    weights = [values[2] for values in losses(whole).values()]
    np.testing.assert_allclose(weights[:4], 32 * np.array([0, 1, 2, 3]) / 3, rtol=1e-6)
    np.testing.assert_allclose(weights[4:], 32 * (1 - np.arange(1, 12) / 12), rtol=1e-5)
    ours, theirs = (saved_runs.restore_backbone(workdir) for workdir in (killed, whole))
    for name, array in theirs[1].items():
        np.testing.assert_array_equal(ours[1][name], array)


def killing(run, *, after: int):
    """A train step that takes `after` steps."""
    left = iter(range(after))

    def stepping(state, batch):
        if next(left, None) is None:
            raise Killed
        return run(state, batch)

    return stepping


@pytest.mark.slow
def test_a_teacher_of_every_step_equals_the_cache(tiny_recipe, taught_by, tmp_path, capsys):
    data = DataConfig(
        path="synthetic", synthetic=SyntheticConfig(identities=3, images_per_identity=4)
    )
    source, mesh, model = open_source(data, seed=0), meshes.make(1), open_path(taught_by, devices=1)
    section = DistillConfig(views="both")
    cache = teacher.open_cache(
        model, source, distill=section, data=data, folder=tmp_path / "cache", embedding_size=48
    )
    online = teacher.make_online(model, views="both", embedding_size=48, mesh=mesh)
    images = np.stack([source[number][0] for number in range(12)])
    given = meshes.to_devices({"image": images}, mesh)["image"]
    assert cache.projection is not None and online.run(given).dtype == np.float16
    np.testing.assert_allclose(online.run(given), cache(np.arange(12)), atol=2e-3)

    options = ("--distill.teacher", str(taught_by), "--distill.online", "--schedule.epochs", "1")
    more = (*options, "--data.augment.sets", "erasing")
    assert script("train").main(arguments(tiny_recipe, tmp_path / "run", *more)) == 0
    assert not (tmp_path / "run" / "teacher").exists()
    assert losses(tmp_path / "run")[3][1] > 0
    with pytest.raises(UserError, match=r"--model\.embedding-size 32"):
        teacher.make_online(model, views="mean", embedding_size=16, mesh=mesh)


@pytest.mark.slow
def test_unlabeled_images_train_a_network_that_labels_then_tune(tiny_recipe, taught_by, tmp_path):
    for number in range(9):
        path = tmp_path / "faces" / ("." if number % 2 else "deep/er") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), faces.draw_face(seed=0, identity=number, index=0))
    (tmp_path / "faces" / "readme.txt").write_text("no image")
    (tmp_path / "faces" / "broken.png").write_bytes(b"no image")
    workdir = tmp_path / "run"
    options = (
        *("--data.path", str(tmp_path / "faces"), "--data.unlabeled", "--distill.head", "off"),
        *("--distill.teacher", str(taught_by), "--schedule.epochs", "4"),
        *("--data.max-bad-share", "0.5"),
    )
    assert script("train").main(arguments(tiny_recipe, workdir, *options)) == 0
    found = losses(workdir)
    assert all(loss == taught for loss, taught, *_ in found.values())
    name = "train/teacher_cosine"
    cosines = [line[name] for line in lines(workdir) if name in line]
    assert len(cosines) == 4 and cosines[-1] > cosines[0]
    tuned = arguments(tiny_recipe, tmp_path / "tuned", "--init-from", str(workdir))
    assert script("train").main([*tuned, "--schedule.epochs", "1"]) == 0


@pytest.fixture(scope="module")
def compatible(tiny_recipe, taught_by, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("compatible") / "run"
    options = ("--distill.teacher", str(taught_by), "--distill.compatible")
    assert script("train").main(arguments(tiny_recipe, workdir, *options)) == 0
    return workdir


def test_a_compatible_run_is_measured_against_its_teacher(compatible, taught_by, capsys):
    words = ["--workdir", str(compatible), "--targets", "synthetic", "--against", str(taught_by)]
    assert evaluate.main(words) == 0
    found = result(capsys.readouterr().out)
    mixed = "eval/run-against-run-enrolled/synthetic/accuracy"
    assert {"eval/run/synthetic/accuracy", "eval/run-enrolled/synthetic/accuracy", mixed} <= {
        *found
    }
    assert 0 <= found[mixed] <= 1


def test_pairs_across_two_networks_have_the_first_face_of_the_enrolled_one():
    images = np.arange(4)[:, None, None, None] * np.ones((1, 112, 112, 3))
    both = across(lambda x: x[:, 0, 0, :2] + 10, enrolled=lambda x: x[:, 0, 0, :2])
    np.testing.assert_array_equal(both(images), [[0, 0], [11, 11], [2, 2], [13, 13]])
    uneven = across(lambda x: x[:, 0, 0, :1], enrolled=lambda x: x[:, 0, 0, :2])
    with pytest.raises(UserError, match=r"--distill\.compatible"):
        uneven(images)


def test_a_threshold_against_the_teacher_and_its_gallery(compatible, taught_by, tmp_path, capsys):
    output = tmp_path / "mixed.json"
    words = ["--workdir", str(compatible), "--pairs", "synthetic", "--far", "0.5"]
    assert calibrate.main([*words, "--against", str(taught_by), "--output", str(output)]) == 0
    capsys.readouterr()
    student, old = Embedder(compatible), Embedder(taught_by)
    assert json.loads(output.read_text())["against"] == old.model.input.digest
    photos = [faces.draw_face(seed=0, identity=number, index=0) for number in range(3)]
    enrolled = old(photos)
    verdict = student.verify(photos, enrolled, threshold=output)
    np.testing.assert_allclose(verdict.score, np.sum(student(photos) * enrolled, axis=1), atol=1e-5)
    with pytest.raises(UserError, match="against an embedding of another model"):
        student.verify(photos, photos, threshold=output)
    gallery = old.build_gallery(tmp_path / "gallery", enrolled, ["a", "b", "c"])
    assert len(student.search(gallery, photos, k=1).name) == 3
    assert student.model.input.compatible_with == old.model.input.digest
    record = teacher_record.read(compatible)
    assert record is not None and record.model == old.model.input.digest


def test_a_refused_teacher_leaves_no_workdir(tiny_recipe, taught_by, tmp_path, capsys):
    workdir, size = tmp_path / "run", ["--model.embedding-size", "24"]
    compatible = ["--distill.teacher", str(taught_by), "--distill.compatible", *size]
    for options, message in (
        (["--distill.teacher", str(tmp_path / "none.onnx")], "no model at"),
        (compatible, "needs the teacher's embedding size"),
    ):
        with pytest.raises(SystemExit) as stop:
            script("train").main(arguments(tiny_recipe, workdir, *options))
        assert stop.value.code == 2 and message in capsys.readouterr().err
        assert not workdir.exists()
