"""A self-contained page with the verification results of models on sets of pairs."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.evaluation import page, roc
from arcface_jax.evaluation.report import charts
from arcface_jax.evaluation.report.charts import Series
from arcface_jax.evaluation.verification import Verification

PAGE = "index.html"
_HARDEST = 6
_SAME, _DIFFERENT, _LENGTH = 0, 1, 2


class Evaluated(NamedTuple):
    """Results of one model on one set."""

    model: str
    pairs: PairSet
    result: Verification


def write(folder: Path, evaluated: Sequence[Evaluated], *, made: datetime) -> Path:
    """Writes FOLDER/index.html.

    Args:
      folder: created if missing.
      evaluated: results of every model on every set; at least one.
      made: date shown on the page.

    Returns:
      The page.

    Raises:
      UserError: the folder cannot be written.
    """
    names = list(dict.fromkeys(one.pairs.name for one in evaluated))
    page.write(
        folder / PAGE,
        "report/report.html",
        made=made.strftime("%Y-%m-%d %H:%M"),
        models=list(dict.fromkeys(one.model for one in evaluated)),
        summary=[_summary(one) for name in names for one in evaluated if one.pairs.name == name],
        sets=[_set([one for one in evaluated if one.pairs.name == name]) for name in names],
    )
    return folder / PAGE


def _summary(one: Evaluated) -> dict:
    result = one.result
    return {"model": one.model, "result": result, "tars": {at.label: at.tar for at in result.tars}}


def _set(evaluated: Sequence[Evaluated]) -> dict:
    """Describes one set: the ROC of all models, and each model's own part."""
    same = evaluated[0].result.same
    curves = [
        charts.thin(roc.roc(1 - one.result.distance / 2, one.result.same)) for one in evaluated
    ]
    areas = ", ".join(f"{one.model} {one.result.auc:.4f}" for one in evaluated)
    alt = f"ROC curves on {evaluated[0].pairs.name}; areas under the curves: {areas}"
    return {
        "name": evaluated[0].pairs.name,
        "same": int(same.sum()),
        "different": int((~same).sum()),
        "models": [(one.model, number % page.COLORS) for number, one in enumerate(evaluated)],
        "roc": charts.roc_chart(curves, alt=alt),
        "parts": [_part(one) for one in evaluated],
    }


def _part(one: Evaluated) -> dict:
    result = one.result
    cosine = 1 - result.distance / 2
    same, different = cosine[result.same], cosine[~result.same]
    scores = charts.histogram(
        [Series(same, _SAME), Series(different, _DIFFERENT)],
        x_label="cosine",
        mark=(result.threshold_cosine, f"threshold {result.threshold_cosine:.3f}"),
        alt=(
            f"Cosines of {one.model} on {one.pairs.name}: pairs of one person have a median of "
            f"{np.median(same):.2f}, pairs of two people {np.median(different):.2f}; the threshold "
            f"is {result.threshold_cosine:.3f}"
        ),
    )
    lengths = charts.histogram(
        [Series(result.norms, _LENGTH)],
        x_label="length of the embedding",
        alt=(
            f"Lengths of the embeddings of {one.model} on {one.pairs.name}: from "
            f"{result.norms.min():.1f} to {result.norms.max():.1f}, mean {result.xnorm:.1f}"
        ),
    )
    return {
        "model": one.model,
        "result": result,
        "scores": scores,
        "lengths": lengths,
        "forms": [
            {
                "title": "f(image) + f(mirrored image), as evaluated here",
                "threshold": result.threshold,
                "tars": result.tars,
            },
            {
                "title": "Single embeddings, f(image)",
                "threshold": result.single_threshold,
                "tars": result.single_tars,
            },
        ],
        "hardest": [
            ("One person, least alike", _hardest(one, cosine, kind=True)),
            ("Two people, most alike", _hardest(one, cosine, kind=False)),
        ],
    }


def _hardest(one: Evaluated, cosine: np.ndarray, *, kind: bool) -> list[dict]:
    """Returns the same pairs with the lowest cosine, or the different ones with the highest."""
    where = np.flatnonzero(one.result.same == kind)
    order = np.argsort(cosine[where] if kind else -cosine[where], kind="stable")
    words = "one person" if kind else "two people"
    shown = []
    for pair in where[order[:_HARDEST]]:
        wrong = (one.result.distance[pair] < one.result.threshold) != kind
        shown.append(
            {
                "image": page.picture(np.hstack([*one.pairs.images[2 * pair : 2 * pair + 2]])),
                "alt": f"Pair {pair} of {one.pairs.name}, {words}, cosine {cosine[pair]:.3f}",
                "cosine": f"{cosine[pair]:.3f}",
                "number": int(pair),
                "wrong": bool(wrong),
            }
        )
    return shown
