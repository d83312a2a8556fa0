"""insightface's verification protocol, on embeddings.

The embedding of an image is f(image) + f(mirrored image), normalised; the score of a pair the
squared distance of its embeddings. Ten contiguous folds: the threshold that is best on nine
decides the tenth.
"""

from typing import NamedTuple

import numpy as np

from arcface_jax.data.pairs import PairSet
from arcface_jax.errors import DataError
from arcface_jax.evaluation.embed import Embed

FOLDS = 10
THRESHOLDS = np.arange(0, 4, 0.01)


class Verification(NamedTuple):
    """The outcome on one set."""

    name: str
    accuracy: float
    """Mean over the ten folds."""
    accuracy_std: float
    """Standard deviation over the folds."""
    threshold: float
    """Mean of the folds' thresholds on the squared distance; as a cosine, 1 - threshold / 2."""
    xnorm: float
    """Mean length of the embeddings before normalisation; insightface's XNorm."""
    distance: np.ndarray
    """(n,) float64: the pairs' squared distances, 0 .. 4."""

    def metrics(self) -> dict[str, float]:
        """The numbers, as `eval/NAME/accuracy` and so on."""
        names = ("accuracy", "accuracy_std", "threshold", "xnorm")
        return {f"eval/{self.name}/{name}": getattr(self, name) for name in names}


def verify(embed: Embed, pairs: PairSet) -> Verification:
    """Embeds a set, mirrored too, and applies the protocol.

    Raises:
      DataError: an embedding is not finite, or there are fewer pairs than folds.
    """
    plain, mirrored = embed(pairs.images), embed(pairs.images[:, :, ::-1])
    if not (np.isfinite(plain).all() and np.isfinite(mirrored).all()):
        raise DataError(
            f"{pairs.name}: the network's embeddings are not finite: the weights are damaged, or "
            "training "
            f"diverged (try a lower --optimizer.learning-rate)"
        )
    distance = pair_distances(plain.astype(np.float64) + mirrored)
    accuracies, thresholds = ten_fold(distance, pairs.same)
    norms = np.linalg.norm(np.concatenate([plain, mirrored]).astype(np.float64), axis=1)
    return Verification(
        name=pairs.name,
        accuracy=float(accuracies.mean()),
        accuracy_std=float(accuracies.std()),
        threshold=float(thresholds.mean()),
        xnorm=float(norms.mean()),
        distance=distance,
    )


def raw_pixel_accuracy(pairs: PairSet) -> float:
    """Accuracy of gray pixels less their mean: the score of a model that learned nothing."""
    gray = pairs.images.mean(axis=3).reshape(len(pairs.images), -1)
    distance = pair_distances(gray - gray.mean(axis=1, keepdims=True))
    return float(ten_fold(distance, pairs.same)[0].mean())


def pair_distances(embeddings: np.ndarray) -> np.ndarray:
    """(2 n, D) embeddings, two a pair, to (n,) float64 squared distances when normalised."""
    unit = embeddings.astype(np.float64)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    return np.sum(np.square(unit[0::2] - unit[1::2]), axis=1)


def ten_fold(distance: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of each fold, with the threshold that is best on the other nine.

    A pair is called the same where distance < threshold, for the thresholds 0.00, 0.01 .. 3.99;
    the first of several equally good ones is taken. All thresholds are counted at once: a pair is
    right from, or up to, one place in their list.

    Args:
      distance: (n,) float64 squared distances.
      same: (n,) bool.

    Returns:
      accuracies (10,), thresholds (10,).

    Raises:
      DataError: fewer than ten pairs.
    """
    count = len(same)
    if count < FOLDS:
        raise DataError(f"{count} pairs are too few for {FOLDS} folds: give at least {FOLDS}")
    # Folds as scikit-learn's KFold: the first (n mod 10) hold one pair more.
    sizes = np.full(FOLDS, count // FOLDS) + (np.arange(FOLDS) < count % FOLDS)
    fold = np.repeat(np.arange(FOLDS), sizes)
    # The first threshold that the distance lies below.
    place = np.searchsorted(THRESHOLDS, distance, side="right")
    slots = len(THRESHOLDS) + 1

    def per_fold(chosen: np.ndarray) -> np.ndarray:
        cells = np.bincount(fold[chosen] * slots + place[chosen], minlength=FOLDS * slots)
        return cells.reshape(FOLDS, slots)[:, :-1].cumsum(axis=1)

    called_same, called_same_wrongly = per_fold(same), per_fold(~same)
    different = np.bincount(fold[~same], minlength=FOLDS)
    right = called_same + different[:, None] - called_same_wrongly
    best = np.argmax(right.sum(axis=0) - right, axis=1)
    return right[np.arange(FOLDS), best] / sizes, THRESHOLDS[best]
