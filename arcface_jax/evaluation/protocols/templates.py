"""Templates: pool all images of a person that belong together into one vector, and score pairs."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from arcface_jax.errors import DataError
from arcface_jax.evaluation.embeddings import SHORTEST, lengths, normalize

_ROWS = 32768
"""Images pooled at a time; more if one template has more."""
_PAIRS = 16384
"""Pairs scored at a time by a thread."""


class Templates:
    """T unit vectors, indexed by the templates' numbers.

    Args:
      numbers: (T,) int64, ascending.
      vectors: (T, D) float64 of length 1, or 0 where a template's images cancel out.
    """

    def __init__(self, numbers: np.ndarray, vectors: np.ndarray):
        self.numbers = numbers
        self.vectors = vectors

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the rows of `vectors` with these numbers, all of which must exist."""
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
    """Returns the weight of each image, by options N and D.

    Args:
      features: (n, D) float32.
      detector: (n,) detector scores.
      keep_norm: N: features keep their length; otherwise they are normalized.
      use_detector: D: multiply by the detector's score.

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
    """Pools images: averages each medium's images, sums media, and normalizes the sum.

        t = sum over media m of (1 / |m|) sum over images i in m of w_i f_i,    t / ||t||

    so image i has weight w_i / |m|, and one weighted sum over a template's images, sorted to be
    contiguous, is enough. Computed in float64, some ten thousand images at a time.

    Args:
      features: (n, D) float32.
      weights: (n,) float64, from `image_weights`.
      templates: (n,) int64: the template of each image.
      media: (n,) int64: its medium; a number in two templates stands for two media.
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
    """Returns ranges of templates with about `_ROWS` images each, and at least one template."""
    ends = np.append(starts[1:], total)
    blocks, first = [], 0
    while first < len(starts):
        last = int(np.searchsorted(ends, starts[first] + _ROWS, side="right"))
        last = max(last, first + 1)
        blocks.append((first, last))
        first = last
    return blocks
