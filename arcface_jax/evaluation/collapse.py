"""Whether a network still tells faces apart, and if not, what became of its embeddings.

A loss may fall while verification stays at chance: the embeddings of all faces may have become one
point or one line, or the network that is evaluated, which normalises by BatchNorm's running
statistics, may be far from the one that is trained, which normalises by each batch's own.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # which imports this file
    from arcface_jax.evaluation.verification import Verification

_ONE_POINT = 0.9
"""A mean cosine above this: all faces look alike to the network."""
_FEW_DIRECTIONS = 3.0
"""An effective rank below this."""
_OTHER_NETWORK = 0.5
"""A cosine below this between what is trained and what is evaluated."""
_FALLEN = 0.9
"""A loss below this share of the one by chance has learned something."""


def mean_cosine(embeddings: np.ndarray) -> float:
    """The mean cosine between two different images; near 1 where all embeddings are one point.

    Of n unit vectors u it is (|sum u|^2 - sum |u|^2) / (n (n - 1)): no pair is formed.

    Args:
      embeddings: (n, D) float, n at least 2, of any length; zeros count as at right angles.
    """
    unit = _unit(embeddings)
    total = unit.sum(axis=0)
    count = len(unit)
    return float((total @ total - np.sum(unit * unit)) / (count * (count - 1)))


def effective_rank(embeddings: np.ndarray) -> float:
    """How many directions the unit embeddings use: exp of the entropy of their singular values.

    With singular values s and p = s / sum s, exp(-sum p ln p): 1 for a point or a line, D for
    vectors spread evenly over D directions. (O. Roy, M. Vetterli, "The effective rank: a measure
    of effective dimensionality", 2007.)

    Args:
      embeddings: (n, D) float, of any length; 0 where all of them are zero.
    """
    unit = _unit(embeddings)
    # Singular values are the roots of this small matrix's eigenvalues. Those that rounding alone
    # makes are left out: their roots would add up.
    gram = unit.T @ unit if len(unit) >= unit.shape[1] else unit @ unit.T
    squares = np.linalg.eigvalsh(gram)
    values = np.sqrt(squares[squares > 1e-12 * squares[-1]])
    if not values.size:
        return 0.0
    share = values / values.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def mode_cosine(
    evaluated: Callable[[np.ndarray], np.ndarray],
    trained: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    *,
    batch_size: int,
) -> float:
    """The mean cosine between what training makes of images and what evaluation does.

    Near 1 where BatchNorm's running statistics describe the batches; dropout, dropped paths and
    masked tokens lower it a little.

    Args:
      evaluated: embeds with the running statistics.
      trained: embeds with the batch's own; called with one whole batch.
      images: (n, ...) of which a batch is drawn, spread over the set, and repeated if too few.
      batch_size: images in that batch.
    """
    batch = images[np.linspace(0, len(images) - 1, batch_size).astype(int)]
    pairs = _unit(evaluated(batch)) * _unit(trained(batch))
    return float(pairs.sum(axis=1).mean())


def explain(result: "Verification", *, loss: float, chance_loss: float) -> str | None:
    """In words, why a set is verified no better than by chance although the loss has fallen.

    Args:
      result: of the set, its accuracy and what its embeddings look like.
      loss: of training, by now.
      chance_loss: that of a network that knows nothing.

    Returns:
      None where the accuracy is above chance beyond doubt, or the loss has yet to fall.
    """
    share = float(np.mean(result.same))
    chance = max(share, 1 - share)
    if result.interval[0] > chance or not loss < _FALLEN * chance_loss:
        return None
    begin = (
        f"{result.name}: accuracy {result.accuracy:.3f} is no better than chance ({chance:.3f}), "
        f"although the loss fell from about {chance_loss:.1f} to {loss:.1f}. "
    )
    return begin + _cause(result)


def _cause(result: "Verification") -> str:
    if result.mode_cosine is not None and not result.mode_cosine > _OTHER_NETWORK:
        return (
            "The network that is evaluated is not the one that is trained: the cosine between "
            f"their embeddings of one image is {result.mode_cosine:.2f}. BatchNorm's running "
            "statistics do not describe the batches: early in a run they lag behind, so wait some "
            "hundred steps; later, look for batches of one person or one source (shuffle the "
            "training set), or for too small a --model.bn-batch-size"
        )
    if result.mean_cosine > _ONE_POINT:
        return (
            f"All faces have nearly one embedding: the mean cosine of two images is "
            f"{result.mean_cosine:.3f}. Lower --optimizer.learning-rate, lengthen "
            "--schedule.warmup-epochs, and see that the images are aligned faces"
        )
    if result.effective_rank < _FEW_DIRECTIONS:
        return (
            f"The embeddings use {result.effective_rank:.1f} directions of all they have: lower "
            "--optimizer.learning-rate and see that labels are right and identities are many"
        )
    return (
        "The embeddings are spread and those of training, so the set is unlike what was trained "
        "on: look whether both are aligned alike, both RGB, and the set's pairs rightly marked; "
        "or the network knows its training images by heart and needs more identities"
    )


def _unit(embeddings: np.ndarray) -> np.ndarray:
    embeddings = embeddings.astype(np.float64, copy=False)
    lengths = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings))
    return embeddings / np.maximum(lengths, 1e-12)[:, None]
