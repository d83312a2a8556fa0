"""Which images each step trains on, as a function of seed and step only."""

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from arcface_jax.config import DataConfig
from arcface_jax.errors import DataError
from arcface_jax.permutation import ROUNDS, Permutation, grid


class Shards(NamedTuple):
    """A shuffled order of training that reads the disk in contiguous runs.

    A shard is a run of neighboring images. Every epoch takes the shards in a new order, and
    shuffles the images of `window` shards at a time among themselves. It is computed window by
    window, so it can start anywhere, and depends only on these four numbers.
    """

    num_images: int
    seed: int
    shard: int
    """Images in a shard."""
    window: int
    """Shards that are shuffled together."""

    def images(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Returns (n,) int64 image numbers at the given places of an epoch, (n,) integers."""
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
    """Returns the end of each window; the last shard may be a short one."""
    shards = _shards(order, epoch)
    sizes = np.minimum(order.shard, order.num_images - order.shard * shards)
    return np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), order.window)))


@lru_cache(maxsize=8)
def _window(order: Shards, epoch: int, number: int) -> np.ndarray:
    """Returns the images of a window, shuffled."""
    begins = _shards(order, epoch)[number * order.window : (number + 1) * order.window]
    runs = [
        np.arange(s * order.shard, min(order.num_images, (s + 1) * order.shard)) for s in begins
    ]
    return np.random.default_rng([order.seed, epoch, number]).permutation(np.concatenate(runs))


class Order(NamedTuple):
    """The order of training: a new permutation of all images in each epoch.

    A permutation is computed place by place, never stored: 40 million images cost no memory.
    `data.order shards` shuffles less, to read the disk in contiguous runs.
    """

    num_images: int
    global_batch_size: int
    steps_per_epoch: int
    seed: int
    shards: Shards | None = None

    def places(self, step: int) -> tuple[int, np.ndarray]:
        """Returns the epoch of a step, and its (B,) int64 places in the order of that epoch.

        If the last batch is padded, its places past the end wrap around to the first.
        """
        epoch, number = divmod(step, self.steps_per_epoch)
        first = number * self.global_batch_size
        return epoch, np.arange(first, first + self.global_batch_size) % self.num_images

    def images(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Returns (n,) int64 image numbers at the given places of an epoch, (n,) integers."""
        if self.shards is not None:
            return self.shards.images(epoch, places)
        permutation = self._permutation(epoch)
        cells = permutation.encrypt(places.astype(np.uint32))
        # The grid is larger than the set: cells outside are followed until one is inside.
        while (outside := cells >= self.num_images).any():
            cells[outside] = permutation.encrypt(cells[outside])
        return cells.astype(np.int64)

    def _permutation(self, epoch: int) -> Permutation:
        random = np.random.SeedSequence((self.seed, epoch))
        keys = random.generate_state(ROUNDS, np.uint32)
        return Permutation(keys, np.int32(self.num_images), _grid(self.num_images))


def make(num_images: int, data: DataConfig, *, seed: int) -> Order:
    """Returns the order of a training set.

    Args:
      num_images: images in the set.
      data: section with the batch size and the treatment of an incomplete last batch.
      seed: random seed of the permutations.

    Raises:
      DataError: the set is smaller than one batch.
    """
    batch = data.global_batch_size
    if num_images < (batch if data.last_batch == "drop" else 1):
        raise DataError(
            f"the training set has {num_images} images, fewer than one batch of {batch}: use "
            f"--data.global-batch-size {num_images} or less, or --data.last-batch pad"
        )
    whole, rest = divmod(num_images, batch)
    steps = whole + (data.last_batch == "pad" and rest > 0)
    shards = Shards(num_images, seed, data.shard_images, data.shard_window)
    return Order(num_images, batch, steps, seed, shards if data.order == "shards" else None)


_grid = cache(grid)
