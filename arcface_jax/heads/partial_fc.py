"""Partial FC: sample the classes of a step.

The sample consists of every class in the batch, and negatives drawn without replacement. There is
no sorting and no array over all classes: a keyed permutation of the device's classes is computed
element by element, its first k places are the sample, and its inverse tells whether a class of the
batch is among them. Those that are not replace the sample's last negatives.

Source: An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face
Recognition CNNs by Partial FC" (CVPR 2022); the permutation is a Feistel network over Z_a x Z_b,
Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from arcface_jax.permutation import ROUNDS, Permutation, grid


class Sample(NamedTuple):
    """The classes of a step on one device."""

    listed: jax.Array
    """(slots,) int32: distinct classes; -1 for an empty slot."""
    target_slot: jax.Array
    """(B,) int32 slot of each sample's class; -1 if it is on another device."""


def sample_sizes(num_classes: int, num_devices: int, sample_rate: float) -> np.ndarray:
    """Returns (N,) int32: int(sample_rate * classes) of each device, including the batch's own."""
    return (sample_rate * classes_by_device(num_classes, num_devices)).astype(np.int32)


def classes_by_device(num_classes: int, num_devices: int) -> np.ndarray:
    """Returns (N,) int32: how many of the classes stored on each device are not padding."""
    stored = -(-num_classes // num_devices)
    return np.clip(num_classes - stored * np.arange(num_devices), 0, stored).astype(np.int32)


def num_slots(stored: int, batch: int, wanted: int) -> int:
    """Returns the number of slots for any sample: the wanted number, or all classes of a batch."""
    return max(wanted, min(batch, stored))


def draw(
    key: jax.Array,
    target: jax.Array,
    *,
    used: jax.Array,
    wanted: jax.Array,
    stored: int,
    slots: int,
) -> Sample:
    """Draws the classes of a step on one device.

    Args:
      key: random key of the step and the device.
      target: (B,) int32 class of each sample on this device; -1 if it is on another.
      used: () int32, classes on this device.
      wanted: () int32, k: total number to draw, at most `used`. If the batch has more classes,
        exactly these are taken.
      stored: classes on this device, padding included.
      slots: length of the list, see `num_slots`.
    """
    permutation = Permutation(
        keys=jax.random.bits(key, (ROUNDS,)), size=jnp.maximum(used, 1), grid=grid(stored)
    )
    place = jnp.arange(slots)
    listed = permutation.forward(jnp.minimum(place, permutation.size - 1))
    listed = jnp.where(place < wanted, listed, -1)

    # The batch's distinct classes, in order; other devices' classes go to the end.
    order = jnp.argsort(jnp.where(target >= 0, target, stored))
    ordered = target[order]
    positive = (ordered >= 0) & (ordered != jnp.roll(ordered, 1)).at[0].set(True)
    drawn_at = permutation.inverse(jnp.maximum(ordered, 0))
    drawn = drawn_at < wanted
    missing = positive & ~drawn

    spare = _last_negatives(
        jnp.where(positive & drawn, drawn_at, slots), wanted, slots, len(target)
    )
    slot = jnp.where(drawn, drawn_at, spare[jnp.maximum(jnp.cumsum(missing) - 1, 0)])
    listed = listed.at[jnp.where(missing, slot, slots)].set(ordered, mode="drop")

    # Samples of one class are consecutive, and only the first of them was given a slot above.
    first = lax.cummax(jnp.where(positive, jnp.arange(len(target)), 0))
    target_slot = jnp.zeros_like(target).at[order].set(slot[first])
    return Sample(listed, jnp.where(target >= 0, target_slot, -1))


def _last_negatives(taken: jax.Array, wanted: jax.Array, slots: int, batch: int) -> jax.Array:
    """Returns (B,) slots for classes that were not drawn: the last with negatives, then empty ones.

    Args:
      taken: (B,) int32 slots with classes of the batch; `slots` for none.
      wanted: () int32 number of used slots.
      slots: length of the list.
      batch: B.
    """
    is_taken = jnp.zeros((slots,), bool).at[taken].set(True, mode="drop")
    # At most B are taken and at most B are requested: the last 2 B places are enough.
    place = wanted - 1 - jnp.arange(min(slots, 2 * batch))
    free = (place >= 0) & ~is_taken[place]
    rank = jnp.cumsum(free) - 1
    beyond = jnp.arange(batch) - jnp.sum(free) + wanted
    return beyond.at[jnp.where(free, rank, batch)].set(place, mode="drop")
