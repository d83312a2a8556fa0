"""What is said about a run's numbers, and that nothing is said about good ones."""

import numpy as np
import pytest

from arcface_jax.training.diagnostics import Watch


def watch(**changes) -> Watch:
    return Watch(**{"num_classes": 1000, "by_chance": 40.0, "steps": 100} | changes)


def losses(values, *, by_chance: float = 40.0) -> list[str]:
    watching = watch(by_chance=by_chance)
    said = [watching.loss(10 * k, float(value)) for k, value in enumerate(values)]
    return [text for text in said if text]


def test_a_loss_that_does_not_move_is_told_once():
    (text,) = losses([40 + 0.01 * (k % 3) for k in range(60)])
    assert "40.01 for 100 steps" in text and "knows nothing has about 40.00" in text


def test_a_low_loss_that_rests_is_told_otherwise():
    (text,) = losses([0.5] * 40)
    assert "as low as this rate takes it" in text


@pytest.mark.parametrize(
    "values", [np.linspace(40, 30, 60), [40.0] * 9, 40 * 0.99 ** np.arange(99)]
)
def test_a_loss_that_falls_or_is_young_is_not_told(values):
    assert losses(values) == []


def test_labels_of_few_identities_are_told_once():
    watching = watch()
    text = watching.labels(np.repeat(np.arange(8), 16))
    assert text is not None and "shows 8 identities" in text and "about 120" in text
    assert watching.labels(np.zeros(128, int)) is None


@pytest.mark.parametrize(("classes", "batch"), [(1000, 128), (5, 64), (1, 8), (10**6, 512)])
def test_shuffled_labels_are_not_told(classes, batch):
    rng = np.random.default_rng(0)
    assert watch(num_classes=classes).labels(rng.integers(0, classes, batch)) is None


def test_skipped_steps_are_counted_since_the_last_word():
    watching = watch()
    assert watching.skipped(10, {"train/skipped_steps": 0.0}) is None
    text = watching.skipped(20, {"train/skipped_steps": 3.0, "train/loss_scale": 8192.0})
    assert text is not None and "3 step(s)" in text and "8192" in text
    assert watching.skipped(30, {"train/skipped_steps": 3.0}) is None
    text = watching.skipped(40, {"train/skipped_steps": 4.0})
    assert text is not None and "1 step(s)" in text and "4 in all" in text and "scale" not in text
