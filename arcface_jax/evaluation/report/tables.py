"""Verification results for the terminal: two tables of at most 100 columns, and remarks."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from arcface_jax.evaluation.verification import FARS, FOLD_FAR, Verification
from arcface_jax.runtime import tables
from arcface_jax.runtime.tables import share

_LONGEST_NAME = 16
_LONGEST_OF_TWO = 11
"""Longest model name that fits next to the set's name."""
_COMPARED = r"accuracy|auc|eer|tar@far=.*"


def summary(results: Sequence[Verification]) -> list[Table]:
    """Makes tables of the ten folds and of the ROC over all pairs, a line per set and model.

    Args:
      results: from `verification.verify`.
    """
    return [_folds(results), _roc(results)]


def before_and_after(values: Mapping[str, float]) -> Table | None:
    """Makes a table of fine-tuning's effect, a line per set; None without fine-tuning.

    Args:
      values: `before/NAME/accuracy`, `eval/NAME/accuracy` and so on.
    """
    before = [name.split("/", 2)[1:] for name in values if name.startswith("before/")]
    sets = list(dict.fromkeys(name for name, _ in before))
    shown = list(dict.fromkeys(m for _, m in before if re.fullmatch(_COMPARED, m)))
    heads = [m.replace("@far=", " at\n") for m in shown]
    table = _named("before and after fine-tuning", heads, ["set", ""])
    for name in sets:
        for when, prefix in (("before", "before"), ("after", "eval")):
            cells = [share(values.get(f"{prefix}/{name}/{m}")) for m in shown]
            table.add_row(name if when == "before" else "", when, *cells)
    return table if sets else None


def remarks(results: Sequence[Verification]) -> list[str]:
    """Lists, for each set, the FARs for which it has too few different pairs."""
    lines = []
    for result in {result.name: result for result in results}.values():
        missing = [at for at in result.tars if at.tar is None]
        if missing:
            different = np.count_nonzero(~result.same)
            needs = ", ".join(f"{at.label} (needs {at.pairs_needed:,})" for at in missing)
            lines.append(
                f"{result.name}: {different:,} pairs of different people are too few for a FAR of "
                f"{needs}"
            )
    return lines


def forms(results: Sequence[Verification]) -> list[str]:
    """Returns the ten-fold threshold of each set for both forms of embedding, which are named."""
    lines = []
    for result in results:
        whose = f"{result.name}, {result.model}" if result.model else result.name
        lines.append(
            f"{whose}: cosine threshold {result.threshold_cosine:.4f} for f(image) + f(mirrored "
            f"image), as in these tables; {result.single_threshold_cosine:.4f} for single "
            "embeddings, which embed and verify make by default"
        )
    return lines


def _folds(results: Sequence[Verification]) -> Table:
    """Makes the table of ten-fold metrics, with insightface's TAR if a set has enough pairs."""
    at = FARS.index(FOLD_FAR)
    heads = ["accuracy", "95 %\ninterval", "threshold:\ncosine (d²)", "XNorm"]
    with_tar = _any_measured(results, at)
    if with_tar:
        heads.append(f"TAR at\n{results[0].tars[at].label}")
    several = len(_names(results[0])) > 1  # no room for the number of pairs
    counts = [] if several else ["same +\ndifferent"]
    table = _named("ten folds, as insightface", [*counts, *heads], _columns(results))
    table.columns[1].no_wrap = False
    for result in results:
        same = np.count_nonzero(result.same)
        low, high = result.interval
        cells = [] if several else [f"{same} + {len(result.same) - same}"]
        cells += [
            f"{result.accuracy:.5f} +- {result.accuracy_std:.5f}",
            f"{low:.4f}-{high:.4f}",
            f"{result.threshold_cosine:.3f} ({result.threshold:.3f})",
            f"{result.xnorm:.3f}",
        ]
        if with_tar:
            cells.append(share(None if result.tars[at].tar is None else result.fold_tar))
        table.add_row(*_names(result), *cells)
    return table


def _roc(results: Sequence[Verification]) -> Table:
    """Makes the table of TAR at the FARs that at least one set can measure."""
    shown = [at for at in range(len(FARS)) if _any_measured(results, at)]
    heads = [f"TAR at\n{results[0].tars[at].label}" for at in shown]
    table = _named("all pairs, TAR at FAR", ["AUC", "EER", *heads], _columns(results))
    for result in results:
        tars = [share(result.tars[at].tar) for at in shown]
        table.add_row(*_names(result), f"{result.auc:.5f}", share(result.eer), *tars)
    return table


def _any_measured(results: Sequence[Verification], at: int) -> bool:
    return any(result.tars[at].tar is not None for result in results)


def _names(result: Verification) -> list[str]:
    return [result.name, result.model] if result.model else [result.name]


def _columns(results: Sequence[Verification]) -> list[str]:
    return ["set", "model"][: len(_names(results[0]))]


def _named(title: str, heads: Sequence[str], names: Sequence[str]) -> Table:
    width = _LONGEST_NAME if len(names) == 1 else _LONGEST_OF_TWO
    return tables.new(title, heads, names=names, name_width=width)
