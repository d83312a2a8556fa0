"""Whether a network still tells faces apart, and if not, what became of its embeddings.

A loss may fall while verification stays at chance: the embeddings of all faces may have become one
point or one line, or the network that is evaluated, which normalizes by BatchNorm's running
statistics, may be far from the one that is trained, which normalizes by each batch's own.
"""

from collections.abc import Callable

import numpy as np

from arcface_jax.evaluation.embeddings import normalize
from arcface_jax.evaluation.verification import Verification

_ONE_POINT = 0.9
"""A mean cosine above this: all faces look alike to the network."""
_FEW_DIRECTIONS = 3.0
"""An effective rank below this."""
_OTHER_NETWORK = 0.5
"""A cosine below this between what is trained and what is evaluated."""
_FALLEN = 0.9
"""A loss below this share of the one by chance has learned something."""


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
    one, other = (normalize(embed(batch), dtype=np.float64) for embed in (evaluated, trained))
    return float((one * other).sum(axis=1).mean())


def explain(result: Verification, *, loss: float, chance_loss: float) -> str | None:
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


def _cause(result: Verification) -> str:
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
