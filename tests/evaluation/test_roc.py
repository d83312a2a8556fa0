"""ROC curves, against scikit-learn and against definitions said slowly in fractions."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from arcface_jax.errors import DataError
from arcface_jax.evaluation import roc

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def scores(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Sets of all kinds, with one pair of either kind at least; half of them in float32."""
    rng = np.random.default_rng(number)
    count = int(rng.integers(2, 60))
    same = rng.random(count) < rng.choice([0.05, 0.5, 0.95])
    same[rng.permutation(count)[:2]] = True, False
    score = np.where(same, 0.5, 0.2) + rng.normal(0, 0.2, count)
    kind = number % 6
    if kind == 1:  # many ties
        score = np.round(score, 1)
    elif kind == 2:  # two values
        score = np.where(score > 0.3, 1.0, -1.0)
    elif kind == 3:  # nothing but ties
        score[:] = 0.25
    elif kind == 4:  # perfect, or perfectly wrong
        score = np.where(same == (number % 12 == 4), 0.9, 0.1) + rng.integers(0, 3, count) / 100
    elif kind == 5:  # neighboring floating-point numbers, and both zeros
        score = rng.choice([0.0, -0.0, 5e-324, 0.3, np.nextafter(0.3, 1), 0.1 + 0.2], count)
    return score.astype(np.float32 if number // 12 % 2 else np.float64), same


def rates(score: np.ndarray, same: np.ndarray) -> list[tuple[Fraction, Fraction, float]]:
    """(FAR, TAR, threshold) at every threshold, falling; pairs are counted one by one."""
    genuine, impostor = score[same].tolist(), score[~same].tolist()
    points = []
    for threshold in [float("inf"), *sorted(set(score.tolist()), reverse=True)]:
        false = sum(1 for s in impostor if s >= threshold)
        true = sum(1 for s in genuine if s >= threshold)
        points.append((Fraction(false, len(impostor)), Fraction(true, len(genuine)), threshold))
    return points


def test_the_curve_is_scikit_learns():
    for number in range(200):
        score, same = scores(number)
        curve = roc.roc(score, same)
        fpr, tpr, thresholds = metrics.roc_curve(same, score, drop_intermediate=False)
        np.testing.assert_array_equal(curve.far, fpr, err_msg=str(number))
        np.testing.assert_array_equal(curve.tar, tpr, err_msg=str(number))
        np.testing.assert_array_equal(curve.threshold, thresholds, err_msg=str(number))
        assert curve.threshold.dtype == score.dtype
        area = metrics.roc_auc_score(same, score)
        assert roc.auc(curve) == pytest.approx(area, abs=1e-14), number


def test_a_long_curve_is_scikit_learns():
    rng = np.random.default_rng(0)
    same = rng.random(100_000) < 0.1
    score = np.round(np.where(same, 0.5, 0.0) + rng.normal(0, 0.2, len(same)), 4)
    curve = roc.roc(score, same)
    fpr, tpr, thresholds = metrics.roc_curve(same, score, drop_intermediate=False)
    np.testing.assert_array_equal(curve.far, fpr)
    np.testing.assert_array_equal(curve.tar, tpr)
    np.testing.assert_array_equal(curve.threshold, thresholds)
    assert roc.auc(curve) == pytest.approx(metrics.roc_auc_score(same, score), abs=1e-13)
    for found in roc.tar_at_far(score, same, fars=FARS[:4]):
        allowed = fpr <= found.far
        assert found.tar == tpr[allowed].max()
        assert found.threshold == thresholds[allowed].min()


def test_the_area_counts_pairs_of_pairs_and_half_of_the_ties():
    for number in range(200):
        score, same = scores(number)
        won = Fraction(0)
        for a in score[same].tolist():
            for b in score[~same].tolist():
                won += Fraction(1 if a > b else 0) if a != b else Fraction(1, 2)
        expected = won / (int(same.sum()) * int((~same).sum()))
        assert roc.auc(roc.roc(score, same)) == float(expected), number


def test_the_equal_error_rate_is_where_the_lines_cross():
    for number in range(200):
        score, same = scores(number)
        points = [(far, 1 - tar) for far, tar, _ in rates(score, same)]
        crossings = set()
        for (far0, frr0), (far1, frr1) in itertools.pairwise(points):
            # far0 + t (far1 - far0) = frr0 + t (frr1 - frr0)
            t = (frr0 - far0) / ((far1 - far0) - (frr1 - frr0))
            if 0 <= t <= 1:
                crossings.add(far0 + t * (far1 - far0))
        (expected,) = crossings
        assert roc.eer(roc.roc(score, same)) == float(expected), number


@pytest.mark.parametrize(
    ("genuine", "impostor", "expected"),
    [
        ([0.9, 0.8], [0.1, 0.2], 0.0),
        ([0.1, 0.2], [0.9, 0.8], 1.0),
        ([0.5, 0.5], [0.5], 0.5),
        # One of four is wrong on both sides.
        ([0.9, 0.8, 0.7, 0.2], [0.3, 0.1, 0.1, 0.1], 0.25),
        # From (FAR, FRR) = (0, 1/3) to (1/2, 1/3): they cross on the way.
        ([0.9, 0.8, 0.2], [0.5, 0.1], 1 / 3),
    ],
)
def test_equal_error_rates_by_hand(genuine, impostor, expected):
    same = np.array([True] * len(genuine) + [False] * len(impostor))
    assert roc.eer(roc.roc(np.array(genuine + impostor), same)) == expected


def test_tar_is_the_largest_whose_far_does_not_exceed_the_target():
    for number in range(200):
        score, same = scores(number)
        different = int((~same).sum())
        points = rates(score, same)
        # Between the steps, on each of them, and as near to it as a float comes.
        steps = np.arange(1, different) / different
        targets = [0.03, 0.1, 0.9, *steps, *np.nextafter(steps, 0), *np.nextafter(steps, 1)]
        for found in roc.tar_at_far(score, same, fars=targets):
            if 1 / different > found.far:
                assert found.tar is None and found.threshold is None and found.interval is None
                continue
            below = [point for point in points if float(point[0]) <= found.far]
            best = max(tar for _, tar, _ in below)
            assert found.tar == float(best), (number, found.far)
            assert found.threshold == below[-1][2], (number, found.far)
            assert found.interval == roc.wilson(float(best), int(same.sum()))


def test_pairs_that_tie_are_accepted_together_or_not_at_all():
    same = np.array([True, True, False, False, False, False])
    score = np.array([0.9, 0.5, 0.5, 0.5, 0.1, 0.1])
    quarter, half, most = roc.tar_at_far(score, same, fars=[0.25, 0.5, 0.99])
    # One different pair of four is allowed, but it does not come without the other.
    assert (quarter.tar, quarter.threshold) == (0.5, 0.9)
    assert (half.tar, half.threshold) == (1.0, 0.5)
    assert (most.tar, most.threshold) == (1.0, 0.5)
    (none,) = roc.tar_at_far(np.zeros(6), same, fars=[0.25])
    assert (none.tar, none.threshold) == (0.0, float("inf"))


@pytest.mark.parametrize("far", [*FARS, 0.3, 1 / 3, 1 / 7, 2.5e-3, 0.7, np.nextafter(1 / 3, 0)])
def test_a_target_takes_pairs_enough_to_show_it(far: float):
    rng = np.random.default_rng(0)

    def at(different: int) -> roc.TarAtFar:
        same = np.arange(different + 10) < 10
        (found,) = roc.tar_at_far(rng.random(len(same)), same, fars=[far])
        return found

    needed = at(1).pairs_needed
    assert 1 / needed <= far
    assert at(needed).tar is not None
    if needed > 1:
        assert 1 / (needed - 1) > far
        assert at(needed - 1).tar is None


def test_targets_have_short_names():
    same = np.array([True, False])
    found = roc.tar_at_far(np.zeros(2), same, fars=[*FARS, 2.5e-4, 0.5])
    names = [at.label for at in found]
    assert names == ["1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6", "2.5e-4", "5e-1"]


def test_targets_keep_their_order_and_may_be_none():
    score, same = np.arange(40) / 40, np.arange(40) % 2 == 0
    found = roc.tar_at_far(score, same, fars=[0.5, 0.1, 0.3])
    assert [at.far for at in found] == [0.5, 0.1, 0.3]
    alone = [roc.tar_at_far(score, same, fars=[far])[0] for far in (0.5, 0.1, 0.3)]
    assert found == alone
    assert roc.tar_at_far(score, same, fars=[]) == []


@pytest.mark.parametrize(("right", "trials"), [(0, 1), (1, 1), (0, 50), (50, 50), (5983, 6000)])
def test_the_interval_is_wilsons(right: int, trials: int):
    expected = scipy.stats.binomtest(right, trials).proportion_ci(0.95, method="wilson")
    low, high = roc.wilson(right / trials, trials)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low < high <= 1


def test_the_interval_holds_the_truth_in_95_of_100_experiments():
    rng = np.random.default_rng(0)
    right = rng.binomial(2000, 0.99, 4000)
    inside = [low <= 0.99 <= high for low, high in (roc.wilson(k / 2000, 2000) for k in right)]
    assert 0.94 < np.mean(inside) < 0.96


@pytest.mark.parametrize("function", [roc.roc, lambda s, y: roc.tar_at_far(s, y, fars=[0.1])])
@pytest.mark.parametrize(
    ("score", "same", "words"),
    [
        ([0.1, 0.2], [True, True], "2 of 2 pairs show one person, 0 two: .* both kinds"),
        ([0.1, 0.2], [False, False], "0 of 2 pairs show one person, 2 two: .* both kinds"),
        ([], [], "0 of 0 pairs"),
        ([0.1, 0.2, 0.3], [True, False], r"shape \(3,\) and labels of shape \(2,\): .* per pair"),
        ([[0.1], [0.2]], [True, False], r"shape \(2, 1\)"),
        ([0.1, np.nan, np.inf], [True, False, True], "2 of 3 scores are not finite: .*NaN"),
    ],
)
def test_what_is_no_set_of_scores_is_refused(function, score, same, words: str):
    with pytest.raises(DataError, match=words):
        function(np.array(score, float), np.array(same, bool))


@pytest.mark.parametrize("far", [0, -1e-3, 1, 2.0, np.nan])
def test_a_target_that_is_no_rate_is_refused(far: float):
    with pytest.raises(DataError, match=f"between 0 and 1, such as 1e-3, got {far}"):
        roc.tar_at_far(np.array([0.1, 0.2]), np.array([True, False]), fars=[far])
