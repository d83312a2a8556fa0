"""Measure whether training mode and evaluation mode agree.

A loss may fall while verification stays at chance level: the embeddings of all faces may have
collapsed to a point or a line, or the evaluated network, which normalizes by BatchNorm's running
statistics, may differ from the trained one, which normalizes by each batch's own.
`training.diagnostics` turns these numbers into warnings.
"""

from collections.abc import Callable

import numpy as np

from arcface_jax.evaluation.embeddings import normalize


def mode_cosine(
    evaluated: Callable[[np.ndarray], np.ndarray],
    trained: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    *,
    batch_size: int,
) -> float:
    """Returns the mean cosine between embeddings in training mode and in evaluation mode.

    Near 1 if BatchNorm's running statistics describe the batches; dropout, dropped paths and masked
    tokens lower it a little.

    Args:
      evaluated: embeds with the running statistics.
      trained: embeds with the batch's own; called with one whole batch.
      images: (n, ...) images; a batch is drawn evenly from them, with repetition if too few.
      batch_size: images in that batch.
    """
    batch = images[np.linspace(0, len(images) - 1, batch_size).astype(int)]
    one, other = (normalize(embed(batch), dtype=np.float64) for embed in (evaluated, trained))
    return float((one * other).sum(axis=1).mean())
