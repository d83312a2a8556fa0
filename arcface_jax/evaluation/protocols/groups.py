"""Compare the verification of several groups of people, as in RFW.

Each group is a verification set, by insightface's ten folds. The groups' accuracies a_g yield

    mean = (1/G) sum a_g
    std = sqrt(sum (a_g - mean)^2 / (G - 1))
    SER = max (1 - a_g) / min (1 - a_g)

SER is the skewed error ratio: the worst group's error rate over the best group's (M. Wang, W. Deng,
"Mitigating bias in face recognition using skewness-aware reinforcement learning", 2020).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from arcface_jax.errors import DataError
from arcface_jax.evaluation import roc
from arcface_jax.evaluation.verification import Verification
from arcface_jax.runtime import tables


class Bias(NamedTuple):
    """Comparison of the groups' accuracies."""

    mean: float
    std: float
    """Sample standard deviation."""
    skewed_error_ratio: float | None
    """Skewed error ratio; None if a group has no errors."""
    at_one_threshold: dict[str, tuple[float, float]]
    """FAR and TAR of each group at one common threshold."""
    threshold: float
    """The common threshold, a cosine, over all groups together."""
    far: float
    """Target FAR of the threshold."""


def bias(results: Sequence[Verification]) -> Bias:
    """Computes mean, spread and skewed error ratio, and each group's rates at a common threshold.

    Deployed systems have a single threshold. It is set at FAR 1e-3 over the pairs of all groups, or
    at the lowest higher FAR that the number of pairs allows.

    Args:
      results: one for each group, at least two.

    Raises:
      DataError: there are fewer than two groups.
    """
    if len(results) < 2:
        raise DataError(f"{len(results)} group: name at least two verification sets to compare")
    accuracy = np.array([result.accuracy for result in results])
    errors = 1 - accuracy
    cosine = [1 - result.distance / 2 for result in results]
    same = [result.same for result in results]
    targets = roc.tar_at_far(np.concatenate(cosine), np.concatenate(same), fars=(1e-3, 1e-2, 1e-1))
    shown = [at for at in targets if at.threshold is not None]
    if not shown:
        raise DataError("all groups together have fewer than 10 pairs of different people")
    threshold = shown[0].threshold
    assert threshold is not None
    return Bias(
        mean=float(accuracy.mean()),
        std=float(accuracy.std(ddof=1)),
        skewed_error_ratio=float(errors.max() / errors.min()) if errors.min() > 0 else None,
        at_one_threshold={
            result.name: (
                float(np.mean(c[~s] >= threshold)),
                float(np.mean(c[s] >= threshold)),
            )
            for result, c, s in zip(results, cosine, same, strict=True)
        },
        threshold=threshold,
        far=shown[0].far,
    )


def table(results: Sequence[Verification], found: Bias) -> Table:
    """Returns a line per group, and the mean."""
    heads = ["pairs", "accuracy", "EER", "own\nthreshold", "FAR at\none", "TAR at\none"]
    lines = tables.new("groups by ten folds", heads, names=["group"])
    for result in results:
        far, tar = found.at_one_threshold[result.name]
        lines.add_row(
            result.name,
            f"{len(result.same):,}",
            f"{result.accuracy:.5f}",
            f"{result.eer:.4f}",
            f"{result.threshold_cosine:.3f}",
            f"{far:.5f}",
            f"{tar:.4f}",
        )
    ratio = found.skewed_error_ratio
    lines.add_section()
    lines.add_row("mean", "", f"{found.mean:.5f}")
    lines.add_row("std", "", f"{found.std:.5f}")
    lines.add_row("skewed error ratio", "", "-" if ratio is None else f"{ratio:.3f}")
    return lines


def remark(found: Bias) -> str:
    """Describes the common threshold."""
    return (
        f"one threshold for all groups: cosine {found.threshold:.3f}, a FAR of {found.far:g} over "
        "their pairs together"
    )


def metrics(results: Sequence[Verification], found: Bias) -> dict[str, Any]:
    """Returns each group's metrics, and `eval/groups/mean`, `std` and `skewed_error_ratio`."""
    values: dict[str, Any] = {}
    for result in results:
        values |= result.metrics()
    values |= {"eval/groups/mean": found.mean, "eval/groups/std": found.std}
    if found.skewed_error_ratio is not None:
        values["eval/groups/skewed_error_ratio"] = found.skewed_error_ratio
    return values
