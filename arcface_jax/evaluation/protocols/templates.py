"""Templates: one vector for all the images of a person that belong together, and their scores."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from arcface_jax.errors import DataError
from arcface_jax.evaluation.embeddings import SHORTEST, lengths, normalize

_ROWS = 32768
"""Images that are pooled at a time, more where one template has more."""
_PAIRS = 16384
"""Pairs that are scored at a time by a thread."""


class Templates:
    """T unit vectors, found by the templates' numbers.

    Args:
      numbers: (T,) int64, rising.
      vectors: (T, D) float64 of length 1, or 0 where a template's images cancel out.
    """

    def __init__(self, numbers: np.ndarray, vectors: np.ndarray):
        self.numbers = numbers
        self.vectors = vectors

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the rows of `vectors` with these numbers, each of which must be there."""
        row = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)
        if not np.array_equal(self.numbers[row], numbers):
            raise DataError("a template is asked for that no image belongs to")
        return row

    def scores(self, first: np.ndarray, second: np.ndarray, *, threads: int = 2) -> np.ndarray:
        """Returns (p,) float64: the dot product of the vectors of each pair of template numbers."""
        one, other = self.rows(first), self.rows(second)
        score = np.empty(len(one))

        def block(start: int) -> None:
            part = slice(start, start + _PAIRS)
            a, b = self.vectors[one[part]], self.vectors[other[part]]
            np.einsum("nd,nd->n", a, b, out=score[part])

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(block, range(0, len(one), _PAIRS)))
        return score


def image_weights(
    features: np.ndarray, detector: np.ndarray, *, keep_norm: bool, use_detector: bool
) -> np.ndarray:
    """What each image counts: options N and D.

    Args:
      features: (n, D) float32.
      detector: (n,) detector scores.
      keep_norm: N: a feature counts with its length; without it, features are normalized.
      use_detector: D: times the detector's score.

    Returns:
      (n,) float64.
    """
    weights = np.ones(len(features))
    if not keep_norm:
        weights /= np.maximum(lengths(features), SHORTEST)
    return weights * detector if use_detector else weights


def pool(
    features: np.ndarray, weights: np.ndarray, *, templates: np.ndarray, media: np.ndarray
) -> Templates:
    """Images of a medium are averaged, media are summed, and the sum is normalized.

        t = sum over media m of (1 / |m|) sum over images i in m of w_i f_i,    t / ||t||

    so that an image counts w_i / |m|, and one weighted sum over the images of a template, sorted
    to lie side by side, does it. float64, some ten thousand images at a time.

    Args:
      features: (n, D) float32.
      weights: (n,) float64, see `image_weights`.
      templates: (n,) int64: the template of each image.
      media: (n,) int64: its medium; the same number in two templates is two media.
    """
    order = np.lexsort((media, templates))
    template, medium = templates[order], media[order]
    new_template = np.concatenate([[True], template[1:] != template[:-1]])
    new_medium = new_template | np.concatenate([[True], medium[1:] != medium[:-1]])
    of_medium = np.cumsum(new_medium) - 1
    share = weights[order] / np.bincount(of_medium)[of_medium]
    starts = np.flatnonzero(new_template)
    vectors = np.empty((len(starts), features.shape[1]))
    for first, last in _blocks(starts, len(order)):
        begin = starts[first]
        end = starts[last] if last < len(starts) else len(order)
        weighted = features[order[begin:end]] * share[begin:end, None]
        vectors[first:last] = np.add.reduceat(weighted, starts[first:last] - begin, axis=0)
    return Templates(template[starts], normalize(vectors, dtype=np.float64))


def _blocks(starts: np.ndarray, total: int) -> list[tuple[int, int]]:
    """Ranges of templates with about `_ROWS` images each, and one template at least."""
    ends = np.append(starts[1:], total)
    blocks, first = [], 0
    while first < len(starts):
        last = int(np.searchsorted(ends, starts[first] + _ROWS, side="right"))
        last = max(last, first + 1)
        blocks.append((first, last))
        first = last
    return blocks
