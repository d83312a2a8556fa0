"""Find the color order and normalization that a model expects, by verifying with each."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.errors import DataError
from arcface_jax.evaluation import verification
from arcface_jax.evaluation.model_input import ColorOrder, ModelInput

if TYPE_CHECKING:
    from arcface_jax.evaluation.embed import Model

# Mean and scale of (x - 127.5) / 127.5, of bytes, and of numbers from 0 to 1.
_NORMALIZATIONS = ((127.5, 127.5), (0.0, 1.0), (0.0, 255.0))
_CHANCE = 0.05
_ORDERS: tuple[ColorOrder, ...] = ("RGB", "BGR")


class Tried(NamedTuple):
    """Result of one way to prepare the input on one set."""

    color_order: ColorOrder
    mean: float
    scale: float
    set_name: str
    accuracy: float
    """0 if it failed."""
    interval: tuple[float, float]
    """95 % confidence interval."""
    is_used: bool
    """Whether the model is run in this way."""
    right: np.ndarray
    """(n,) bool: which pairs are decided rightly by the set's threshold."""
    failed: bool = False
    """Whether embeddings were not finite, such as float16's where it overflows."""

    @property
    def form(self) -> str:
        """Name for tables and keys."""
        return f"{self.color_order} (x - {self.mean:g}) / {self.scale:g}"


def run(model: "Model", sets: Iterable[PairSet]) -> list[Tried]:
    """Verifies with both color orders and, for a float ONNX model, with three normalizations.

    Args:
      model: an open model, from `open_model`.
      sets: verification sets.

    Raises:
      DataError: every way fails on a set, or the set cannot be used for verification.
    """
    tried = []
    for pairs in sets:
        verification.check(pairs)
        ways = [
            _try(model, order, normalization, pairs)
            for order in _ORDERS
            for normalization in _normalizations(model)
        ]
        if all(way.failed for way in ways):
            raise DataError(
                f"{pairs.name}: the network's embeddings are not finite in any color order or "
                "normalization: its weights are damaged"
            )
        tried += ways
    return tried


def _try(
    model: "Model", order: ColorOrder, normalization: tuple[float, float], pairs: PairSet
) -> Tried:
    """Verifies with one preparation of the input."""
    mean, scale = normalization
    wants = model.input
    used = (order, mean, scale) == (wants.color_order, wants.mean, wants.scale)
    try:
        result = verification.verify(_prepared(model, order, mean, scale), pairs)
    except DataError:
        wrong = np.zeros(len(pairs.same), bool)
        return Tried(order, mean, scale, pairs.name, 0.0, (0.0, 0.0), used, wrong, failed=True)
    right = (result.distance < result.threshold) == result.same
    measured = (pairs.name, result.accuracy, result.interval)
    return Tried(order, mean, scale, *measured, used, right)


def best(tried: list[Tried]) -> Tried:
    """Returns the way with the highest mean accuracy; ties go to the one in use.

    A way that failed on one set comes after all that failed on none.
    """
    forms = {one.form: one for one in tried}

    def rank(form: str) -> tuple[bool, float, bool]:
        of_form = [one for one in tried if one.form == form]
        accuracy = float(np.mean([one.accuracy for one in of_form]))
        return not any(one.failed for one in of_form), accuracy, forms[form].is_used

    return forms[max(forms, key=rank)]


def is_certain(tried: list[Tried]) -> bool:
    """Returns whether the best way is significantly better than the others, by a sign test.

    By chance, the pairs that only one of two ways decides rightly would be split evenly.
    """
    winner = best(tried).form
    right = {
        form: np.concatenate([one.right for one in tried if one.form == form])
        for form in {one.form for one in tried}
    }
    won = right.pop(winner)
    return all(
        _by_chance(int(np.sum(won & ~other)), int(np.sum(other & ~won))) < _CHANCE
        for other in right.values()
    )


def _by_chance(wins: int, losses: int) -> float:
    """Returns the two-sided probability that fair coins yield such a majority."""
    tosses = wins + losses
    fewer = sum(math.comb(tosses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * fewer / 2**tosses)


def _normalizations(model: "Model") -> list[tuple[float, float]]:
    wants = model.input
    used = (wants.mean, wants.scale)
    if not hasattr(model, "taking") or wants.dtype == "uint8":
        return [used]
    return [used, *(other for other in _NORMALIZATIONS if other != used)]


def _prepared(model: "Model", order: ColorOrder, mean: float, scale: float) -> "Model":
    taking: Callable[..., Model] | None = getattr(model, "taking", None)
    if taking is not None:
        return taking(color_order=order, mean=mean, scale=scale)
    return model if order == model.input.color_order else _Swapped(model)


class _Swapped:
    """A model with red and blue exchanged in its input."""

    def __init__(self, model: "Model"):
        self._model = model
        self.input: ModelInput = model.input

    def __call__(self, images: np.ndarray, /) -> np.ndarray:
        return self._model(np.ascontiguousarray(images[..., ::-1]))

    def digest(self) -> str:
        return self._model.digest()
