"""The order of images in which a slow disk is read in long runs: shuffled shards."""

from functools import lru_cache

import numpy as np


class ShardOrder:
    """Images of all epochs in a row, shuffled as far as runs on disk allow.

    A shard is a run of neighbouring images. Every epoch takes the shards in a new order, and
    shuffles the images of `window` shards at a time among themselves. The order is a function of
    the arguments alone, computed window by window, so it may be entered anywhere.

    Args:
      length: images of one epoch.
      seed: of all permutations.
      shard: images of a shard.
      window: shards that are shuffled together.
    """

    def __init__(self, length: int, *, seed: int, shard: int, window: int):
        self._length, self._seed, self._shard, self._window = length, seed, shard, window

    def __getitem__(self, position: int) -> int:
        """The image at a place in the row of all epochs."""
        epoch, inside = divmod(int(position), self._length)
        ends = _ends(self._length, self._seed, epoch, self._shard, self._window)
        number = int(np.searchsorted(ends, inside, side="right"))
        begin = int(ends[number - 1]) if number else 0
        images = _images(self._length, self._seed, epoch, self._shard, self._window, number)
        return int(images[inside - begin])


@lru_cache(maxsize=4)
def _shards(length: int, seed: int, epoch: int, shard: int) -> np.ndarray:
    count = -(-length // shard)
    return np.random.default_rng([seed, epoch]).permutation(count)


@lru_cache(maxsize=4)
def _ends(length: int, seed: int, epoch: int, shard: int, window: int) -> np.ndarray:
    """Where each window ends; the last shard of the data may be a short one."""
    numbers = _shards(length, seed, epoch, shard)
    sizes = np.minimum(shard, length - shard * numbers)
    return np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), window)))


@lru_cache(maxsize=8)
def _images(length: int, seed: int, epoch: int, shard: int, window: int, number: int) -> np.ndarray:
    """The images of a window, shuffled."""
    chosen = _shards(length, seed, epoch, shard)[number * window : (number + 1) * window]
    images = np.concatenate([np.arange(s * shard, min(length, (s + 1) * shard)) for s in chosen])
    return np.random.default_rng([seed, epoch, number]).permutation(images)
