"""Choose thresholds without ground truth, from the scores that true findings would have.

Each detector can simulate true findings in the set: two halves of an identity for duplicates, two
joined identities for mixed ones, an image under another identity's label for wrong labels. With F
the distribution of their scores, a threshold t has recall 1 - F(t). The number N of true findings
follows from the upper scores, where false ones are rare: N (1 - F(q)) findings are expected above a
quantile q. One is added to the count, or a single finding below the quantile would count as false.
Of all findings above t, N (1 - F(t)) are therefore true, which estimates the precision.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_UPPER = (0.5, 0.6, 0.7, 0.8)  # quantiles of the true scores from which their number is estimated
_BULK = (0.2, 0.3, 0.4, 0.5, 0.6)
_MORE = 50  # candidates to list even if few are found
_QUANTILES = np.concatenate(
    [[0.001, 0.002, 0.003], np.arange(0.005, 0.05, 0.005), np.arange(0.05, 0.51, 0.01)]
)


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A threshold with its expected recall and precision."""

    threshold: float
    """Scores of at least this are findings."""
    recall: float
    """Expected share of the true findings that reach the threshold."""
    precision: float | None
    """Expected share of the findings that are true; None without findings."""
    found: int
    """Number of scores at or above the threshold."""

    def text(self) -> str:
        """Formats the threshold for the terminal."""
        precision = "-" if self.precision is None else f"{self.precision:.2f}"
        return (
            f"threshold {self.threshold:.3f} (expected recall {self.recall:.2f}, "
            f"precision {precision})"
        )


def choose(
    scores: np.ndarray,
    true: np.ndarray,
    *,
    precision: float,
    least: float = 0.0,
    false: Callable[[float], float] = lambda threshold: 0.0,
) -> Threshold:
    """Chooses the lowest threshold with the required expected precision.

    Args:
      scores: (m,) of all candidates, higher for findings.
      true: (k,) scores that true findings would have.
      precision: the lowest expected precision.
      least: lowest quantile of the true scores to allow, so that a set without errors does not get
        a threshold below all of them.
      false: another estimate of the number of false findings at a threshold; the worse one counts.

    Returns:
      A Threshold; at the median of the true scores if no lower one is precise enough.
    """
    scores = np.sort(scores)
    found = Threshold(threshold=float("inf"), recall=0.0, precision=None, found=0)
    if not len(true):
        return found
    upper = [float(np.quantile(true, q)) for q in _UPPER]
    number = np.median(
        [(_at_least(scores, t) + 1) / (1 - q) for q, t in zip(_UPPER, upper, strict=True)]
    )
    for quantile in filter(lambda q: q >= least, _QUANTILES.tolist()):
        threshold = float(np.quantile(true, quantile))
        count, expected = _at_least(scores, threshold), None
        if count:
            right = min(number * (1 - quantile), count - false(threshold))
            expected = float(np.clip(right / count, 0, 1))
        found = Threshold(threshold=threshold, recall=1 - quantile, precision=expected, found=count)
        if expected is None or expected >= precision:
            break
    return found


def worth_a_look(scores: np.ndarray, *, found: int, lowest: float) -> int:
    """Returns how many candidates to review: the findings, and some below the threshold.

    Args:
      scores: (m,) of the candidates, the highest first.
      found: number that reach the threshold.
      lowest: no candidate below this score is listed.
    """
    most = max(found, min(_at_least(scores[::-1], lowest), 2 * found + _MORE))
    return min(most, len(scores))


def gumbel_tail(highest: np.ndarray) -> Callable[[float], float]:
    """Returns the probability that the highest of many impostor scores reaches a threshold.

    Maxima follow a Gumbel distribution, here fitted to the 20 % to 60 % quantiles, which a few true
    findings among the scores do not affect: P(t) = 1 - exp(-exp(-(t - m) / b)).

    Args:
      highest: (k,) each candidate's highest score.

    Returns:
      P as a function of the threshold.
    """
    shares = np.array(_BULK)
    # The quantile at share p is m - b ln(-ln p), a straight line.
    b, m = np.polyfit(-np.log(-np.log(shares)), np.quantile(highest, shares), 1)
    return lambda threshold: float(-np.expm1(-np.exp(-(threshold - m) / max(b, 1e-6))))


def _at_least(ascending: np.ndarray, threshold: float) -> int:
    return len(ascending) - int(np.searchsorted(ascending, threshold))
