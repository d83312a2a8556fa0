"""How embeddings are spread, and whether training and evaluation mode agree.

A loss may fall while verification stays at chance level: the embeddings of all faces may have
collapsed to a point or a line, or the evaluated network, which normalizes by BatchNorm's running
statistics, may differ from the trained one, which normalizes by each batch's own.
`training.diagnostics` turns these numbers into warnings.
"""

from collections.abc import Callable

import numpy as np


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
    # Singular values are the roots of this small matrix's eigenvalues. Rounding
    # errors are left out: their roots would add up.
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
    """The mean cosine between an image's embeddings in training mode and in evaluation mode.

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


def _unit(embeddings: np.ndarray) -> np.ndarray:
    embeddings = embeddings.astype(np.float64, copy=False)
    lengths = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings))
    return embeddings / np.maximum(lengths, 1e-12)[:, None]
