"""Exact TAR at FAR over all pairs of many images, without storing or sorting their scores.

The scores are float32, so there are 2^32 values. A first pass counts them by their upper 16 bits,
which locates the bin of each FAR's threshold. A second pass counts the scores of those bins by
their lower 16 bits, which locates the threshold itself. Two histograms thus replace the sorted
scores, whatever their number, and ties and the tail are exact.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from arcface_jax.errors import DataError
from arcface_jax.evaluation import roc
from arcface_jax.evaluation.embeddings import normalize
from arcface_jax.evaluation.roc import TarAtFar

_BINS = 1 << 16
_SIDE = 1024
"""Rows and columns of a block of scores."""

Block = tuple[np.ndarray, np.ndarray | bool]
"""(m,) float32 scores, and (m,) bool: whether each is of one person; one bool if all agree."""


def pairs_of(features: np.ndarray, labels: np.ndarray) -> Callable[[], Iterator[Block]]:
    """Yields the cosines of all n (n - 1) / 2 pairs of images, in blocks.

    Args:
      features: (n, D) float, not normalized.
      labels: (n,) person of each.

    Returns:
      A function that iterates over the blocks each time it is called.

    Raises:
      DataError: a feature is not finite, or the numbers of labels and features differ.
    """
    if len(features) != len(labels) or features.ndim != 2:
        raise DataError(
            f"features of shape {features.shape} and {len(labels)} labels: pass one label per row"
        )
    if not np.isfinite(features).all():
        raise DataError("features are not finite: look for NaN in the network's output")
    # Sorted by person, most blocks contain pairs of different people only.
    _, person = np.unique(labels, return_inverse=True)
    order = np.argsort(person, kind="stable")
    person = person[order]
    unit = normalize(features)[order]
    starts = range(0, len(unit), _SIDE)

    def blocks() -> Iterator[Block]:
        for top in starts:
            rows = slice(top, top + _SIDE)
            for left in starts[top // _SIDE :]:
                columns = slice(left, left + _SIDE)
                score = unit[rows] @ unit[columns].T
                overlap = person[rows][-1] >= person[columns][0]
                same = person[rows][:, None] == person[columns][None, :] if overlap else False
                if top == left:
                    upper = np.triu_indices(len(score), 1)
                    yield score[upper], same[upper] if isinstance(same, np.ndarray) else same
                else:
                    yield score.ravel(), same.ravel() if isinstance(same, np.ndarray) else same

    return blocks


def tar_at_far(blocks: Callable[[], Iterable[Block]], *, fars: Sequence[float]) -> list[TarAtFar]:
    """Computes `roc.tar_at_far` from blocks of scores, in two passes.

    Args:
      blocks: yields the same blocks each time it is called; scores are finite.
      fars: the targets, each in (0, 1).

    Raises:
      DataError: the pairs are all of one kind, or a target is outside (0, 1).
    """
    roc.check_fars(fars)
    # (different | same, bins): bins in the order of their values.
    coarse = np.zeros((2, _BINS), np.int64)
    for score, same in blocks():
        upper, _ = _halves(score)
        _count(coarse, upper, same)
    coarse = _ordered(coarse)
    different, genuine = (int(total) for total in coarse.sum(axis=1))
    if not (different and genuine):
        raise DataError(
            f"{genuine} pairs show one person, {different} two: FAR and TAR need pairs of both"
        )
    places = {far: _place(coarse[0], roc.allowed(far, different)) for far in fars}
    bins = {bin_ for place in places.values() if place for bin_ in _with_next(coarse, place[0])}
    fine = {bin_: np.zeros((2, _BINS), np.int64) for bin_ in bins}
    for score, same in blocks() if bins else ():
        upper, lower = _halves(score)
        for bin_, counts in fine.items():
            inside = upper == _upper_bits(bin_)
            _count(counts, lower[inside], same[inside] if isinstance(same, np.ndarray) else same)
    return [_read_off(far, places[far], coarse, fine) for far in fars]


def _halves(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits each float32 into its upper and lower 16 bits, both (m,) uint16."""
    bits = (score + np.float32(0)).view(np.uint32)  # -0 becomes 0, which is equal
    return (bits >> 16).astype(np.uint16), bits.astype(np.uint16)


def _count(counts: np.ndarray, halves: np.ndarray, same: np.ndarray | bool) -> None:
    if isinstance(same, bool | np.bool):
        counts[int(same)] += np.bincount(halves, minlength=_BINS)
        return
    for kind in (0, 1):
        counts[kind] += np.bincount(halves[same == kind], minlength=_BINS)


def _ordered(counts: np.ndarray) -> np.ndarray:
    """Orders bins of upper bits by value: negative floats count backwards."""
    half = _BINS // 2
    return np.concatenate([counts[:, half:][:, ::-1], counts[:, :half]], axis=1)


def _upper_bits(bin_: int) -> int:
    """Returns the upper bits of the scores in a bin of the ordered histogram."""
    half = _BINS // 2
    return bin_ - half if bin_ >= half else _BINS - 1 - bin_


def _place(different: np.ndarray, count: int) -> tuple[int, int] | None:
    """Returns the bin of the (count + 1)-th highest score, and its rank from the top in there."""
    if not count:
        return None
    from_top = different[::-1].cumsum()
    steps = int(np.searchsorted(from_top, count + 1))
    above = int(from_top[steps - 1]) if steps else 0
    return len(different) - 1 - steps, count + 1 - above


def _with_next(coarse: np.ndarray, bin_: int) -> list[int]:
    """Returns a bin and, if any, the next higher one that has a score."""
    above = np.flatnonzero(coarse[:, bin_ + 1 :].any(axis=0))
    return [bin_, *(bin_ + 1 + above[:1]).tolist()]


def _read_off(
    far: float, place: tuple[int, int] | None, coarse: np.ndarray, fine: dict[int, np.ndarray]
) -> TarAtFar:
    needed = roc.pairs_needed(far)
    if place is None:
        return TarAtFar(far, needed, tar=None, interval=None, threshold=None)
    bin_, from_top = place
    counts = _fine_ordered(fine, bin_)
    refused = _BINS - 1 - int(np.searchsorted(counts[0, ::-1].cumsum(), from_top))
    genuine = int(coarse[1].sum())
    accepted = int(coarse[1, bin_ + 1 :].sum() + counts[1, refused + 1 :].sum())
    tar = accepted / genuine
    threshold = _lowest(bin_, counts, refused + 1)
    if threshold is None:
        *_, above = _with_next(coarse, bin_)
        threshold = _lowest(above, _fine_ordered(fine, above), 0) if above != bin_ else np.inf
    assert threshold is not None
    interval = roc.wilson(tar, genuine)
    return TarAtFar(far, needed, tar=tar, interval=interval, threshold=threshold)


def _fine_ordered(fine: dict[int, np.ndarray], bin_: int) -> np.ndarray:
    """Orders a bin's second histogram by the scores' values."""
    return fine[bin_] if bin_ >= _BINS // 2 else fine[bin_][:, ::-1]


def _lowest(bin_: int, counts: np.ndarray, begin: int) -> float | None:
    """Returns the lowest score of a bin from a position in its order on, if any."""
    there = np.flatnonzero(counts[:, begin:].any(axis=0))
    if not len(there):
        return None
    place = begin + int(there[0])
    lower = place if bin_ >= _BINS // 2 else _BINS - 1 - place
    return float(np.uint32(_upper_bits(bin_) << 16 | lower).view(np.float32))
