"""Warnings about a run's numbers, and that there are none about good ones."""

import numpy as np
import pytest

from arcface_jax.config import DataConfig
from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.evaluation.verification import Verification, verify
from arcface_jax.training.diagnostics import HealthMonitor, explain_chance_accuracy


def monitor(**changes) -> HealthMonitor:
    return HealthMonitor(
        **{"num_classes": 1000, "chance_loss": 40.0, "plateau_steps": 100} | changes
    )


def warnings_about(losses) -> list[str]:
    health = monitor()
    texts = [health.plateau(10 * k, float(loss)) for k, loss in enumerate(losses)]
    return [text for text in texts if text]


def test_a_loss_that_does_not_move_is_told_once():
    (text,) = warnings_about([40 + 0.01 * (k % 3) for k in range(60)])
    assert "plateaued at 40.01 for 100 steps" in text and "chance level is 40.00" in text


def test_a_low_loss_that_rests_is_told_otherwise():
    (text,) = warnings_about([0.5] * 40)
    assert "may have converged for this learning rate" in text


@pytest.mark.parametrize(
    "values", [np.linspace(40, 30, 60), [40.0] * 9, 40 * 0.99 ** np.arange(99)]
)
def test_a_loss_that_falls_or_is_young_is_not_told(values):
    assert warnings_about(values) == []


def test_labels_of_few_identities_are_told_once():
    health = monitor()
    text = health.few_labels(np.repeat(np.arange(8), 16))
    assert text is not None and "only 8 distinct identities in a batch of 128" in text
    assert "expected ~120" in text
    assert health.few_labels(np.zeros(128, int)) is None


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (np.zeros((4, 6, 6, 3), np.uint8), "all 4 images of the first batch are black"),
        (np.full((4, 6, 6, 3), 9, np.uint8), "of a single color"),
        (np.tile(np.arange(108, dtype=np.uint8).reshape(1, 6, 6, 3), (4, 1, 1, 1)), "identical"),
    ],
)
def test_images_that_show_nothing_are_told(images, found):
    text = monitor().empty_images(images)
    assert text is not None and found in text and "--data.path" in text
    images = images.copy()
    images[-1, 0, 0] += 1
    assert monitor().empty_images(images) is None


def test_a_batch_of_one_image_is_not_told():
    assert monitor().empty_images(np.arange(108, dtype=np.uint8).reshape(1, 6, 6, 3)) is None


@pytest.mark.parametrize(("classes", "batch"), [(1000, 128), (5, 64), (1, 8), (10**6, 512)])
def test_shuffled_labels_are_not_told(classes, batch):
    rng = np.random.default_rng(0)
    assert monitor(num_classes=classes).few_labels(rng.integers(0, classes, batch)) is None


def test_skipped_steps_are_counted_since_the_last_log_step():
    health = monitor()
    assert health.skipped_steps(10, {"train/skipped_steps": 0.0}) is None
    text = health.skipped_steps(20, {"train/skipped_steps": 3.0, "train/loss_scale": 8192.0})
    assert text is not None and "3 non-finite step(s)" in text and "8192" in text
    assert health.skipped_steps(30, {"train/skipped_steps": 3.0}) is None
    text = health.skipped_steps(40, {"train/skipped_steps": 4.0})
    assert text is not None and "1 non-finite step(s)" in text and "4 total" in text
    assert "scale" not in text


def test_slow_input_is_reported_once_with_the_settings_to_change():
    health, data = monitor(), DataConfig(workers=3, threads=7)
    assert health.slow_input({"perf/data_wait_share": 0.2, "perf/data_wait_ms": 1.0}, data) is None
    assert health.slow_input({}, data) is None  # no step was timed
    slow = {"perf/data_wait_share": 0.35, "perf/data_wait_ms": 12.0}
    text = health.slow_input(slow, data)
    assert text is not None and text.startswith("input-bound: 35% of step time")
    assert "(12 ms/step)" in text and "workers (now 3)" in text and "threads (now 7)" in text
    assert health.slow_input(slow, data) is None


def spread(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, size)).astype(np.float32)


def verified(embeddings: np.ndarray, **changes) -> Verification:
    same = np.arange(len(embeddings) // 2) % 2 == 0
    images = np.zeros((len(embeddings), 1, 1, 3), np.uint8)
    return verify(lambda _: embeddings, PairSet("made", images, same))._replace(**changes)


CASES = {
    "constant": (np.tile(spread(1, 32), (200, 1)), 0.99, ["collapsed to one point", "1.000"]),
    "rank 1": (
        spread(1, 32) * np.random.default_rng(1).choice([-1, 1], (200, 1)).astype(np.float32),
        0.99,
        ["only 1.0 directions", "labels are correct"],
    ),
    "running statistics": (spread(200, 32), 0.1, ["evaluation mode disagree", "0.10"]),
    "unlike data": (spread(200, 32), 0.99, ["have not collapsed", "RGB", "aligned"]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_collapse_is_explained_by_its_cause(case: str):
    embeddings, mode_cosine, named = CASES[case]
    result = verified(embeddings, mode_cosine=mode_cosine)
    words = explain_chance_accuracy(result, loss=3.0, chance_loss=20.0)
    assert words is not None and words.startswith("made: accuracy 0.")
    assert "no better than chance (0.500)" in words and "loss is 3.0 (chance level: 20.0)" in words
    assert all(word in words for word in named), words
    others = [other[2][0] for name, other in CASES.items() if name != case]
    assert not any(word in words for word in others)
    # So long as the loss has not fallen there is nothing to explain.
    assert explain_chance_accuracy(result, loss=19.5, chance_loss=20.0) is None
    assert explain_chance_accuracy(result, loss=np.nan, chance_loss=20.0) is None


def test_what_is_better_than_chance_is_not_explained_away():
    person = np.repeat(spread(100, 32), 2, axis=0)
    person[1::2][1::2] = spread(300, 32)[200:250]
    result = verified(person, mode_cosine=0.1)
    assert result.accuracy == 1
    assert explain_chance_accuracy(result, loss=3.0, chance_loss=20.0) is None


def test_a_loss_of_skipped_steps_has_not_plateaued():
    assert warnings_about(np.where(np.arange(60) % 7 == 3, np.nan, np.linspace(40, 30, 60))) == []
    assert warnings_about([np.nan] * 60) == []
    (text,) = warnings_about([np.nan if k == 30 else 40.0 for k in range(60)])
    assert "plateaued at 40.00" in text


def test_a_resumed_run_does_not_report_earlier_skipped_steps():
    health = monitor(skipped=37)
    assert health.skipped_steps(1020, {"train/skipped_steps": 37.0}) is None
    text = health.skipped_steps(1040, {"train/skipped_steps": 39.0})
    assert text is not None and "skipped 2 non-finite step(s)" in text and "39 total" in text
