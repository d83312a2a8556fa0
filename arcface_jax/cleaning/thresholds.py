"""Thresholds without ground truth: from what true findings would score in this very set.

Each detector can draw scores that true findings would have: the two halves of one identity for
duplicates, two identities joined for mixed ones, an image under another identity's label for wrong
labels. With F the distribution of these scores, a threshold t has recall 1 - F(t). The number N of
true findings follows from the upper scores, where false ones are rare: N (1 - F(q)) findings are
expected above a quantile q. At t, N (1 - F(t)) of all that score higher are therefore true, which
estimates the precision.
"""

from dataclasses import dataclass

import numpy as np

_UPPER = (0.5, 0.6, 0.7, 0.8)  # quantiles of the true scores from which their number is estimated
_QUANTILES = np.concatenate([np.arange(0.005, 0.05, 0.005), np.arange(0.05, 0.51, 0.01)])


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A threshold with what is expected of it."""

    threshold: float
    """Scores from here on are findings."""
    recall: float
    """Expected share of the true findings that score so high."""
    precision: float | None
    """Expected share of the findings that are true; None where nothing was found."""
    found: int
    """Scores at or above the threshold."""

    def text(self) -> str:
        """For the terminal."""
        precision = "-" if self.precision is None else f"{self.precision:.2f}"
        return (
            f"threshold {self.threshold:.3f} (expected recall {self.recall:.2f}, "
            f"precision {precision})"
        )


def choose(
    scores: np.ndarray, true: np.ndarray, *, precision: float, least: float = 0.0
) -> Threshold:
    """The lowest threshold with an expected precision.

    Args:
      scores: (m,) of all candidates, higher for findings.
      true: (k,) scores that true findings would have.
      precision: the lowest expected precision.
      least: the lowest quantile of the true scores that is taken, so that a set without errors
        does not get a threshold below all of them.

    Returns:
      A Threshold; at the median of the true scores where no lower one is precise enough.
    """
    scores = np.sort(scores)
    found = Threshold(threshold=float("inf"), recall=0.0, precision=None, found=0)
    if not len(true):
        return found
    upper = [float(np.quantile(true, q)) for q in _UPPER]
    number = np.median([_at_least(scores, t) / (1 - q) for q, t in zip(_UPPER, upper, strict=True)])
    for quantile in filter(lambda q: q >= least, _QUANTILES.tolist()):
        threshold = float(np.quantile(true, quantile))
        count = _at_least(scores, threshold)
        expected = min(1.0, number * (1 - quantile) / count) if count else None
        found = Threshold(
            threshold=threshold, recall=float(1 - quantile), precision=expected, found=count
        )
        if expected is None or expected >= precision:
            break
    return found


def _at_least(ascending: np.ndarray, threshold: float) -> int:
    return len(ascending) - int(np.searchsorted(ascending, threshold))
