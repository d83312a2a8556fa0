"""The order of images in which a slow disk is read in long runs: shuffled shards."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Shards(NamedTuple):
    """An order of training, shuffled as far as runs on disk allow.

    A shard is a run of neighbouring images. Every epoch takes the shards in a new order, and
    shuffles the images of `window` shards at a time among themselves. Computed window by window,
    so it may be entered anywhere, and depends on nothing but these four numbers.
    """

    num_images: int
    seed: int
    shard: int
    """Images of a shard."""
    window: int
    """Shards that are shuffled together."""

    def images(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """(n,) int64 numbers of the images that stand at places of an epoch, (n,) integers."""
        ends = _ends(self, epoch)
        places = np.asarray(places, np.int64)
        windows = np.searchsorted(ends, places, side="right")
        numbers = np.empty(len(places), np.int64)
        for window in np.unique(windows).tolist():
            chosen = windows == window
            begin = ends[window - 1] if window else 0
            numbers[chosen] = _window(self, epoch, window)[places[chosen] - begin]
        return numbers


@lru_cache(maxsize=4)
def _shards(order: Shards, epoch: int) -> np.ndarray:
    count = -(-order.num_images // order.shard)
    return np.random.default_rng([order.seed, epoch]).permutation(count)


@lru_cache(maxsize=4)
def _ends(order: Shards, epoch: int) -> np.ndarray:
    """Where each window ends; the last shard of the data may be a short one."""
    shards = _shards(order, epoch)
    sizes = np.minimum(order.shard, order.num_images - order.shard * shards)
    return np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), order.window)))


@lru_cache(maxsize=8)
def _window(order: Shards, epoch: int, number: int) -> np.ndarray:
    """The images of a window, shuffled."""
    begins = _shards(order, epoch)[number * order.window : (number + 1) * order.window]
    runs = [
        np.arange(s * order.shard, min(order.num_images, (s + 1) * order.shard)) for s in begins
    ]
    return np.random.default_rng([order.seed, epoch, number]).permutation(np.concatenate(runs))
