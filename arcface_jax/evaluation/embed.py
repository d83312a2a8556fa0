"""Embed many images on all devices."""

from collections import deque
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from arcface_jax.errors import ConfigError
from arcface_jax.evaluation.model_input import ModelInput
from arcface_jax.runtime import devices as meshes


class Model(Protocol):
    """What inference and evaluation need of a network, independent of its runtime."""

    def __call__(self, images: np.ndarray, /) -> np.ndarray:
        """Embeds (n, 112, 112, 3) uint8 RGB as (n, D) float32, not normalized."""
        ...

    @property
    def input(self) -> ModelInput:
        """The network's input format, and the run whose operating points apply to it (`digest`)."""
        ...

    def digest(self) -> str:
        """Returns a SHA-256 of exactly these weights and of how their input is prepared.

        Stored embeddings are keyed on it. An export's differs from its run's.
        """
        ...


@runtime_checkable
class ShardedModel(Model, Protocol):
    """A model whose devices are spread over several hosts, each reading its own images."""

    def rows_of_this_host(self, count: int, /) -> np.ndarray:
        """Returns (count,) bool: which images of a call this host reads."""
        ...


Embed = Callable[[np.ndarray], np.ndarray]
"""(n, 112, 112, 3) uint8 RGB to (n, D) float32, not normalized."""

# Batches on the devices, or whose embeddings are being copied back.
_BATCHES_AHEAD = 3


def nothing() -> None:
    """Does nothing between two batches; for callers that do not wait for signals."""


def check_batch_size(batch_size: int) -> None:
    """Refuses a batch without images.

    Raises:
      ConfigError: the batch size is below 1.
    """
    if batch_size < 1:
        raise ConfigError(
            f"batch_size must be at least 1, got {batch_size}: give the images per forward pass, "
            "such as 64"
        )


def batched(
    embed: Callable[[jax.Array], jax.Array],
    *,
    batch_size: int,
    mesh: Mesh,
    between: Callable[[], None] = nothing,
) -> Embed:
    """Makes a function that embeds any number of images in batches of one size.

    Args:
      embed: (batch_size, 112, 112, 3) uint8 on the devices to (batch_size, D) float32.
      batch_size: a multiple of the number of devices; the last batch is padded with black images.
      mesh: the devices, which share every batch equally.
      between: called before each batch; it may raise to stop.
    """
    gather = jax.jit(lambda x: x, out_shardings=meshes.replicated(mesh))
    sharding = meshes.split(mesh)

    def received(out: jax.Array, count: int) -> np.ndarray:
        return np.asarray(out)[:count]

    def run(images: np.ndarray) -> np.ndarray:
        parts, done = deque(), []
        for start in range(0, len(images), batch_size):
            if len(parts) >= _BATCHES_AHEAD:  # or `between` would be called long before they end
                done.append(received(*parts.popleft()))
            between()
            part = images[start : start + batch_size]
            filled = np.zeros((batch_size, *images.shape[1:]), images.dtype)
            filled[: len(part)] = part
            # Every host has all images and passes its devices their part.
            batch = jax.make_array_from_callback(
                filled.shape, sharding, lambda index, filled=filled: filled[index]
            )
            parts.append((gather(embed(batch)), len(part)))
        return np.concatenate(done + [received(*part) for part in parts])

    return run


def rows_of_this_host(count: int, *, batch_size: int, mesh: Mesh) -> np.ndarray:
    """Returns which of `count` images `batched` reads on this host; the others may stay black.

    Returns:
      (count,) bool, all true with a single host.
    """
    parts = meshes.split(mesh).addressable_devices_indices_map((batch_size,))
    batch = np.zeros(batch_size, bool)
    for part in parts.values():
        batch[part] = True
    return np.resize(batch, count)
