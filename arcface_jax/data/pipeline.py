"""Batches in an order that depends on the seed and the step alone: a resumed run goes on exactly.

Each epoch is a new permutation of all images; the last images that fill no batch are left out of
it.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import grain
import jax
import numpy as np

from arcface_jax.config import DataConfig
from arcface_jax.data.shard_order import Shards
from arcface_jax.data.sources import Source
from arcface_jax.errors import DataError

Batch = dict[str, np.ndarray]


def steps_per_epoch(source: Source, *, global_batch_size: int) -> int:
    """Whole batches in the training set.

    Raises:
      DataError: there is not one.
    """
    if len(source) < global_batch_size:
        raise DataError(
            f"the training set has {len(source)} images, fewer than one batch of "
            f"{global_batch_size}: "
            f"use --data.global-batch-size {len(source)} or less"
        )
    return len(source) // global_batch_size


def batches(
    source: Source, data: DataConfig, *, seed: int, start: int, stop: int
) -> Iterator[Batch]:
    """The batches of steps start .. stop - 1, read ahead by threads.

    Args:
      source: the training set.
      data: batch size, threads, how far to read ahead.
      seed: of the permutations.
      start: the first step wanted; a resumed run names where it stopped.
      stop: the step behind the last.

    Yields:
      This host's part of each global batch: "image" (b, 112, 112, 3) uint8, "label" (b,) int32.

    Raises:
      DataError: while iterating, where an image cannot be read.
    """
    read = _BatchReader(source, data, seed)
    options = grain.ReadOptions(
        num_threads=data.threads, prefetch_buffer_size=data.prefetch_batches
    )
    steps = grain.MapDataset.range(start, stop).map(read)
    return iter(steps.to_iter_dataset(options))


def images_of_step(source: Source, data: DataConfig, *, seed: int, step: int) -> list[str]:
    """Which images this host's part of a step's batch holds, as numbers in the source."""
    return [str(place) for place in _BatchReader(source, data.global_batch_size, seed).images(step)]


class _BatchReader:
    """Reads the batch of a step, or rather this host's share of it."""

    def __init__(self, source: Source, data: DataConfig, seed: int):
        self._source = source
        self._global = global_batch_size = data.global_batch_size
        self._share = global_batch_size // jax.process_count()
        self._first = self._share * jax.process_index()
        self._steps_per_epoch = steps_per_epoch(source, global_batch_size=global_batch_size)
        # Images of all epochs in a row; a permutation that is computed element by element, never
        # stored.
        order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        self._order = cast(Sequence[int], order)  # none is filtered out, so none is None
        # For slow disks.
        shards = Shards(len(source), seed, data.shard_images, data.shard_window)
        self._shards = shards if data.order == "shards" else None

    def images(self, step: int) -> list[int]:
        """The numbers of the images."""
        epoch, number = divmod(step, self._steps_per_epoch)
        first = number * self._global + self._first
        places = range(first, first + self._share)
        if self._shards is not None:
            return self._shards.images(epoch, np.array(places)).tolist()
        return [int(self._order[epoch * len(self._source) + place]) for place in places]

    def __call__(self, step: int) -> Batch:
        items = [self._source[image] for image in self.images(int(step))]
        return {
            "image": np.stack([image for image, _ in items]),
            "label": np.array([label for _, label in items], np.int32),
        }
