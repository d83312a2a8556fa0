"""Which images each step trains on, as a function of the seed and the step alone."""

from functools import cache
from typing import NamedTuple

import numpy as np

from arcface_jax.config import DataConfig
from arcface_jax.data.shard_order import Shards
from arcface_jax.errors import DataError
from arcface_jax.heads import partial_fc


class Order(NamedTuple):
    """The order of training: a new permutation of all images in each epoch.

    A permutation is computed place by place, never stored: 40 million images cost no memory.
    `data.order shards` shuffles less, as far as runs on disk allow.
    """

    num_images: int
    global_batch_size: int
    steps_per_epoch: int
    seed: int
    shards: Shards | None = None

    def places(self, step: int) -> tuple[int, np.ndarray]:
        """The epoch of a step, and its (B,) int64 places in the order of that epoch.

        Where the last batch is padded, its places behind the end begin again at the first.
        """
        epoch, number = divmod(step, self.steps_per_epoch)
        first = number * self.global_batch_size
        return epoch, np.arange(first, first + self.global_batch_size) % self.num_images

    def images(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """(n,) int64 numbers of the images that stand at places of an epoch, (n,) integers."""
        if self.shards is not None:
            return self.shards.images(epoch, places)
        permutation = self._permutation(epoch)
        cells = permutation.encrypt(places.astype(np.uint32))
        # The grid is larger than the set: from a cell outside one goes on until one is inside.
        while (outside := cells >= self.num_images).any():
            cells[outside] = permutation.encrypt(cells[outside])
        return cells.astype(np.int64)

    def _permutation(self, epoch: int) -> partial_fc.Permutation:
        random = np.random.SeedSequence((self.seed, epoch))
        keys = random.generate_state(partial_fc.ROUNDS, np.uint32)
        return partial_fc.Permutation(keys, np.int32(self.num_images), _grid(self.num_images))


def make(num_images: int, data: DataConfig, *, seed: int) -> Order:
    """The order of a training set.

    Args:
      num_images: in the set.
      data: batch size, and what becomes of the images that do not fill a batch.
      seed: of the permutations.

    Raises:
      DataError: there is not one batch.
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


_grid = cache(partial_fc.grid)
