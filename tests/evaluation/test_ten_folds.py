"""insightface's protocol, against the same said slowly in plain Python."""

from functools import partial

import numpy as np
import pytest
import scipy.interpolate

from arcface_jax.errors import DataError
from arcface_jax.evaluation import verification
from arcface_jax.evaluation.verification import ten_fold, ten_fold_tar


def restated(distance: np.ndarray, same: np.ndarray) -> tuple[list[float], list[float]]:
    """One threshold and one fold at a time, in plain Python."""
    thresholds = np.arange(0, 4, 0.01).tolist()
    scores = list(zip(distance.tolist(), same.tolist(), strict=True))
    accuracies, chosen = [], []
    begin = 0
    for fold in range(10):
        size = len(scores) // 10 + (1 if fold < len(scores) % 10 else 0)
        test = scores[begin : begin + size]
        train = scores[:begin] + scores[begin + size :]
        begin += size
        best, best_right = 0.0, -1
        for threshold in thresholds:
            right = 0
            for d, is_same in train:
                right += (d < threshold) == is_same
            if right > best_right:  # the first of equally good ones stays
                best, best_right = threshold, right
        accuracies.append(sum((d < best) == is_same for d, is_same in test) / size)
        chosen.append(best)
    assert begin == len(scores)
    return accuracies, chosen


def restated_tar(
    distance: np.ndarray, same: np.ndarray, far: float
) -> tuple[list[float], list[float], list[float]]:
    """(TARs, FARs, thresholds): one threshold and one fold at a time, in plain Python."""
    thresholds = np.arange(0, 4, 0.001).tolist()
    scores = list(zip(distance.tolist(), same.tolist(), strict=True))
    tars, fars, chosen = [], [], []
    begin = 0
    for fold in range(10):
        size = len(scores) // 10 + (1 if fold < len(scores) % 10 else 0)
        test = scores[begin : begin + size]
        train = scores[:begin] + scores[begin + size :]
        begin += size
        different = sorted(d for d, is_same in train if not is_same)
        train_fars, below = [], 0
        for threshold in thresholds:
            while below < len(different) and different[below] < threshold:
                below += 1
            train_fars.append(below / len(different) if different else 0.0)
        threshold = 0.0
        if max(train_fars) >= far:
            last = max(k for k, value in enumerate(train_fars) if value <= far)
            threshold = thresholds[last]
            if train_fars[last] < far:
                rise = train_fars[last + 1] - train_fars[last]
                slope = (thresholds[last + 1] - thresholds[last]) / rise
                threshold = slope * (far - train_fars[last]) + thresholds[last]
        for rates, kind in ((tars, True), (fars, False)):
            called_same = [d < threshold for d, is_same in test if is_same == kind]
            rates.append(sum(called_same) / len(called_same) if called_same else float("nan"))
        chosen.append(threshold)
    return tars, fars, chosen


def random_scores(number: int, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sets of all kinds: sizes that ten does not divide, ties, scores on and beside thresholds."""
    rng = np.random.default_rng(number)
    count = int(rng.integers(10, 60))
    same = rng.random(count) < rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    distance = np.clip(np.where(same, 1.0, 2.0) + rng.normal(0, 0.6, count), 0, 4)
    kind = number % 5
    if kind == 1:  # exactly on thresholds
        distance = rng.choice(thresholds, count)
    elif kind == 2:  # the next floating-point number below or above one
        towards = rng.choice([-np.inf, np.inf], count)
        distance = np.abs(np.nextafter(rng.choice(thresholds, count), towards))
    elif kind == 3:  # few values, so that many thresholds are equally good
        distance = rng.choice([0.0, 0.5, 3.99, 4.0, 3.995], count)
    elif kind == 4:  # sorted, so that folds differ as much as they can
        order = np.argsort(distance)
        distance, same = distance[order], same[order]
    return distance, same


@pytest.mark.parametrize("kind", range(5))
def test_ten_folds_equal_the_protocol_said_slowly(kind: int):
    for number in range(kind, 200, 5):
        distance, same = random_scores(number, np.arange(0, 4, 0.01))
        accuracies, thresholds = ten_fold(distance, same)
        expected_accuracies, expected_thresholds = restated(distance, same)
        np.testing.assert_array_equal(thresholds, expected_thresholds, err_msg=str(number))
        np.testing.assert_array_equal(accuracies, expected_accuracies, err_msg=str(number))


@pytest.mark.parametrize("kind", range(5))
def test_tar_over_folds_equals_the_protocol_said_slowly(kind: int):
    for number in range(kind, 200, 5):
        distance, same = random_scores(number, np.arange(0, 4, 0.001))
        # 1e-3 lies before the first of so few pairs; the others among them, and often on one.
        far = [1e-3, 0.1, 0.5, 1 / 9, 1.0][number // 5 % 5]
        found = ten_fold_tar(distance, same, far=far)
        for values, expected in zip(found, restated_tar(distance, same, far), strict=True):
            np.testing.assert_array_equal(values, expected, err_msg=str(number))


def test_tar_over_folds_is_read_off_as_by_scipy_where_no_stretch_is_level():
    # Every fold has a different pair between any two thresholds, so FAR always rises.
    rng = np.random.default_rng(0)
    grid = verification.FAR_THRESHOLDS
    different = np.concatenate([grid[:-1] + 0.0005] * 10)
    distance = np.concatenate([different.reshape(10, -1), rng.random((10, 200))], axis=1)
    same = np.broadcast_to(np.arange(distance.shape[1]) >= len(grid) - 1, distance.shape)
    far = 0.0123
    tars, fars, thresholds = ten_fold_tar(distance.ravel(), same.ravel(), far=far)
    for fold in range(10):
        train = np.delete(distance, fold, axis=0)[:, : len(grid) - 1]
        train_fars = (train.ravel()[:, None] < grid).mean(axis=0)
        line = scipy.interpolate.interp1d(train_fars, grid, kind="slinear")
        assert thresholds[fold] == pytest.approx(float(line(far)), rel=1e-12)
        assert tars[fold] == np.mean(distance[fold, len(grid) - 1 :] < line(far))
        assert fars[fold] == np.mean(distance[fold, : len(grid) - 1] < line(far))


def test_where_no_far_reaches_the_target_nothing_is_accepted():
    same = np.arange(40) % 2 == 0
    distance = np.where(same, 0.5, 3.9995)  # behind the last threshold
    tars, fars, thresholds = ten_fold_tar(distance, same, far=1e-3)
    np.testing.assert_array_equal(tars, 0)
    np.testing.assert_array_equal(fars, 0)
    np.testing.assert_array_equal(thresholds, 0)


def test_a_level_stretch_on_the_target_gives_its_last_threshold():
    # Of the 18 different pairs of nine folds, 9 lie at 1 and 9 at 2: FAR 0.5 from 1.001 to 2.
    distance = np.tile([1.0, 2.0, 1.5, 2.5], 10)
    same = np.tile([False, False, True, True], 10)
    tars, fars, thresholds = ten_fold_tar(distance, same, far=0.5)
    np.testing.assert_array_equal(thresholds, 2.0)
    np.testing.assert_array_equal(tars, 0.5)
    np.testing.assert_array_equal(fars, 0.5)


def test_a_pair_on_the_threshold_is_not_the_same():
    same = np.array([True] * 10 + [False] * 10)
    # Thresholds 0.51 to 1.00 part these; the first decides, strictly.
    distance = np.where(same, 0.5, 1.0)
    accuracies, thresholds = ten_fold(distance, same)
    np.testing.assert_array_equal(accuracies, 1)
    np.testing.assert_array_equal(thresholds, verification.THRESHOLDS[51])
    # On the test fold alone a distance lies on the threshold that the others choose.
    distance[0] = verification.THRESHOLDS[51]
    assert ten_fold(distance, same)[0][0] == 0.5


def test_all_same_or_all_different_pairs_are_all_recognized():
    distance = np.linspace(0, 3.9, 33)
    accuracies, thresholds = ten_fold(distance, np.ones(33, bool))
    np.testing.assert_array_equal(accuracies[:-1], 1)
    assert thresholds[0] == pytest.approx(3.91)
    accuracies, thresholds = ten_fold(distance, np.zeros(33, bool))
    np.testing.assert_array_equal(accuracies, 1)
    np.testing.assert_array_equal(thresholds, 0)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_fewer_pairs_than_folds_are_refused(count: int):
    with pytest.raises(DataError, match=f"{count} pairs are too few for 10 folds.*at least 10"):
        ten_fold(np.zeros(count), np.zeros(count, bool))
    with pytest.raises(DataError, match=f"{count} pairs are too few for 10 folds.*at least 10"):
        ten_fold_tar(np.zeros(count), np.zeros(count, bool), far=0.1)


def test_distances_that_do_not_belong_to_the_labels_are_refused():
    same = np.arange(20) % 2 == 0
    for function in (ten_fold, partial(ten_fold_tar, far=0.1)):
        with pytest.raises(DataError, match=r"shape \(19,\) and labels of shape \(20,\)"):
            function(np.zeros(19), same)
        with pytest.raises(DataError, match="1 of 20 scores are not finite"):
            function(np.where(np.arange(20) == 3, np.nan, 1.0), same)
