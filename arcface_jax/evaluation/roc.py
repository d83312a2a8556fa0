"""ROC curves of pairs of faces: exact at ties, and fast enough for many millions of scores.

Scores are higher for more similar faces: a cosine, or a negated squared distance. A pair is
accepted, i.e. called the same, if score >= threshold. FAR is the share of different pairs that are
accepted, TAR the share of same pairs that are accepted, and FRR = 1 - TAR.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from arcface_jax.errors import DataError

CONFIDENCE = 0.95


class Roc(NamedTuple):
    """Accepted pairs at each of m thresholds: none, then one threshold for every distinct score."""

    threshold: np.ndarray
    """(m,) descending, in the scores' dtype; the first is infinite and accepts nothing."""
    false_accepts: np.ndarray
    """(m,) int64: different pairs with score >= threshold, from 0 to all of them."""
    true_accepts: np.ndarray
    """(m,) int64: same pairs with score >= threshold."""

    @property
    def far(self) -> np.ndarray:
        """(m,) float64, 0 .. 1."""
        return self.false_accepts / self.false_accepts[-1]

    @property
    def tar(self) -> np.ndarray:
        """(m,) float64, 0 .. 1."""
        return self.true_accepts / self.true_accepts[-1]


class TarAtFar(NamedTuple):
    """TAR where FAR is at most a target; `None`s if the set has too few different pairs."""

    far: float
    """Target FAR."""
    pairs_needed: int
    """Fewest different pairs that can measure such a FAR: the first n with 1 / n <= far."""
    tar: float | None
    interval: tuple[float, float] | None
    """`wilson` of TAR at this threshold; excludes the uncertainty of the threshold itself."""
    threshold: float | None
    """Lowest score with at most that FAR; infinite if nothing can be accepted."""

    @property
    def label(self) -> str:
        """The target as text, such as `1e-3`."""
        return far_label(self.far)


def far_label(far: float) -> str:
    """Returns a target as text, such as `1e-3`."""
    return np.format_float_scientific(far, trim="-", exp_digits=1)


def checked(score: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Checks scores and labels, and returns them as arrays.

    Args:
      score: (n,) float, scores or distances.
      same: (n,) bool, or 0 and 1.

    Raises:
      DataError: their lengths differ, or a score is not finite.
    """
    score, same = np.asarray(score), np.asarray(same, bool)
    if score.ndim != 1 or score.shape != same.shape:
        raise DataError(
            f"scores of shape {score.shape} and labels of shape {same.shape}: pass one score "
            f"and one label per pair"
        )
    wrong = len(score) - np.count_nonzero(np.isfinite(score))
    if wrong:
        raise DataError(
            f"{wrong} of {len(score)} scores are not finite: look for embeddings with NaN or inf"
        )
    return score, same


def check_both_kinds(same: np.ndarray) -> None:
    """Refuses labels of one kind only.

    Args:
      same: (n,) bool.

    Raises:
      DataError: all pairs are same pairs or all are different ones, or there are none.
    """
    count = np.count_nonzero(same)
    if not 0 < count < len(same):
        raise DataError(
            f"{count} of {len(same)} pairs show one person, {len(same) - count} two: FAR and TAR "
            "need pairs of both kinds; look at the list that marks which pairs are the same"
        )


def roc(score: np.ndarray, same: np.ndarray) -> Roc:
    """Computes the whole curve; each distinct score is a threshold, so ties are accepted together.

    The same points as scikit-learn's `roc_curve(same, score, drop_intermediate=False)`. Scores are
    sorted without their labels, which is several times faster than sorting an index.

    Args:
      score: (n,) float.
      same: (n,) bool.

    Raises:
      DataError: as `checked`, or the pairs are all of one kind.
    """
    score, same = checked(score, same)
    check_both_kinds(same)
    ordered = np.sort(score)
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    threshold = ordered[first]
    accepted = len(score) - first
    # The number of same pairs with each score, and from it the number with at least that score.
    place = np.searchsorted(threshold, np.sort(score[same]))
    at_threshold = np.bincount(place, minlength=len(threshold))
    true_accepts = at_threshold[::-1].cumsum()
    return Roc(
        np.concatenate([np.array([np.inf], threshold.dtype), threshold[::-1]]),
        np.concatenate([[0], accepted[::-1] - true_accepts]),
        np.concatenate([[0], true_accepts]),
    )


def auc(curve: Roc) -> float:
    """Returns the area under the curve: the probability that a same pair outscores a different one.

    Ties count half. Computed in integers, so the result is the nearest float64.
    """
    true, false = curve.true_accepts, curve.false_accepts
    doubled = int(np.sum(np.diff(false) * (true[1:] + true[:-1])))
    return doubled / (2 * int(true[-1]) * int(false[-1]))


def eer(curve: Roc) -> float:
    """Returns the equal error rate: FAR where it equals FRR, with linear interpolation.

    FAR - FRR increases strictly from -1 to 1, so there is exactly one such place. Between its last
    point (FAR_0, FRR_0) before and its first point (FAR_1, FRR_1) at or after that place,

        EER = FAR_0 + (FAR_1 - FAR_0) (FRR_0 - FAR_0) / ((FRR_0 - FAR_0) + (FAR_1 - FRR_1)).

    Computed in integers, so the result is the nearest float64.
    """
    same, different = int(curve.true_accepts[-1]), int(curve.false_accepts[-1])
    # FAR - FRR, times the number of pairs of either kind.
    excess = curve.false_accepts * same - (same - curve.true_accepts) * different
    crossing = int(np.searchsorted(excess, 0))
    before, after = -int(excess[crossing - 1]), int(excess[crossing])
    low, high = (int(curve.false_accepts[k]) for k in (crossing - 1, crossing))
    return (low * after + high * before) / (different * (before + after))


def check_fars(fars: Sequence[float]) -> None:
    """Checks FAR targets.

    Raises:
      DataError: one is outside (0, 1).
    """
    for far in fars:
        if not 0 < far < 1:
            raise DataError(f"a FAR target must be between 0 and 1, such as 1e-3, got {far}")


def tar_at_far(score: np.ndarray, same: np.ndarray, *, fars: Sequence[float]) -> list[TarAtFar]:
    """Returns, for each target, the largest TAR among thresholds whose FAR does not exceed it.

    There is no interpolation: if different pairs tie, or FAR steps over the target, the step before
    it counts. Of n different pairs k = floor(far n) may be accepted, so the threshold is the lowest
    score above the (k + 1)-th highest of theirs. With n < 1 / far, k is 0, which does not measure
    the target: TAR is None.

    Only the top of the different pairs' scores is sorted.

    Args:
      score: (n,) float.
      same: (n,) bool.
      fars: the targets, each in (0, 1).

    Returns:
      One result per target, in the same order.

    Raises:
      DataError: as `roc`, or a target is outside (0, 1).

    Examples:
      One of ten different pairs may be accepted at a FAR of 0.1, and 0.01 needs a hundred:

      >>> import numpy as np
      >>> score = np.array([0.9, 0.7, 0.5, 0.3] + [0.6, 0.4] + 8 * [0.1])
      >>> same = np.arange(14) < 4
      >>> one, other = tar_at_far(score, same, fars=[0.1, 0.01])
      >>> one.tar, one.threshold
      (0.75, 0.5)
      >>> other.tar is None, other.pairs_needed
      (True, 100)
    """
    score, same = checked(score, same)
    check_both_kinds(same)
    check_fars(fars)
    genuine, impostor = score[same], score[~same]
    begin = len(impostor) - 1 - max((allowed(far, len(impostor)) for far in fars), default=0)
    top = np.sort(np.partition(impostor, begin)[begin:])
    return [_tar_at_far(far, genuine, top, different=len(impostor)) for far in fars]


def _tar_at_far(far: float, genuine: np.ndarray, top: np.ndarray, *, different: int) -> TarAtFar:
    """Computes one target; `top` has the highest scores of the different pairs, ascending."""
    count = allowed(far, different)
    needed = pairs_needed(far)
    if not count:
        return TarAtFar(far, needed, tar=None, interval=None, threshold=None)
    refused = top[-1 - count]
    accepted = genuine > refused
    tar = int(np.count_nonzero(accepted)) / len(genuine)
    false = top[np.searchsorted(top, refused, side="right") :]
    threshold = min(np.min(genuine, where=accepted, initial=np.inf), np.min(false, initial=np.inf))
    interval = wilson(tar, len(genuine))
    return TarAtFar(far, needed, tar=tar, interval=interval, threshold=float(threshold))


def allowed(far: float, count: int) -> int:
    """Returns the largest k with k / count <= far, in float64 arithmetic."""
    k = int(far * count)
    if (k + 1) / count <= far:
        return k + 1
    return k - (k / count > far)


def pairs_needed(far: float) -> int:
    """Returns the smallest n with 1 / n <= far, in float64 arithmetic."""
    near = round(1 / far)
    return near if 1 / near <= far else near + 1


def wilson(rate: float, trials: int) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a rate, Wilson's score interval.

    With z = 1.96, the 97.5 % quantile of the normal distribution, and n trials,

        (rate + z^2 / 2n  +-  z sqrt(rate (1 - rate) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    (E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927).
    Unlike rate +- z sqrt(rate (1 - rate) / n) it stays within 0 .. 1 and has a width at a rate of
    1, which is typical of face verification. The exact interval of Clopper and Pearson is
    conservative and needs the inverse of the incomplete beta function.

    It assumes independent trials. Pairs that share people are not quite independent: the true
    interval is wider.

    Args:
      rate: 0 .. 1.
      trials: n, at least 1.

    Examples:
      >>> [round(float(end), 4) for end in wilson(1.0, 600)]
      [0.9936, 1.0]
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    shrink = 1 + z**2 / trials
    center = (rate + z**2 / (2 * trials)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2) / shrink
    return max(0.0, center - half), min(1.0, center + half)
