"""Partial FC: which classes take part in a step.

Every class of the batch does, and negatives drawn without repetition fill up the rest. Nothing is
sorted and nothing of the number of classes is stored: a keyed permutation of the device's classes
is computed element by element, the first k places of it are the sample, and its inverse tells
whether a class of the batch is among them. Those that are not replace the sample's last negatives.

Source: An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face
Recognition CNNs by Partial FC" (CVPR 2022); the permutation is a Feistel network over Z_a x Z_b,
Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# With three, chi-square tells the distances between drawn classes from uniform ones.
ROUNDS = 8
# Fewer rows or columns of the grid would leave the rounds too little to mix.
_SMALLEST_SIDE = 8


class Sample(NamedTuple):
    """The classes that take part on one device."""

    listed: jax.Array
    """(slots,) int32, different classes; -1 where a slot is empty."""
    target_slot: jax.Array
    """(B,) int32 slot of each sample's class; -1 where that is on another device."""


def sample_sizes(num_classes: int, num_devices: int, sample_rate: float) -> np.ndarray:
    """(N,) int32: on each device int(sample_rate * its classes), the batch's own included."""
    return (sample_rate * classes_by_device(num_classes, num_devices)).astype(np.int32)


def classes_by_device(num_classes: int, num_devices: int) -> np.ndarray:
    """(N,) int32: how many of the classes stored on each device are not padding."""
    stored = -(-num_classes // num_devices)
    return np.clip(num_classes - stored * np.arange(num_devices), 0, stored).astype(np.int32)


def num_slots(stored: int, batch: int, wanted: int) -> int:
    """Slots that hold any sample: as many as wanted, or all the classes that a batch can have."""
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
    """Draws the classes of a step, on one device.

    Args:
      key: of the step and the device.
      target: (B,) int32 class of each sample on this device; -1 where it is on another.
      used: () int32, classes on this device.
      wanted: () int32, k: how many to draw in total, at most `used`. Where the batch has more
        classes than that, all of them are taken and nothing else.
      stored: classes on this device, padding included.
      slots: length of the list, see `num_slots`.
    """
    permutation = Permutation(
        keys=jax.random.bits(key, (ROUNDS,)), size=jnp.maximum(used, 1), grid=grid(stored)
    )
    place = jnp.arange(slots)
    listed = permutation.forward(jnp.minimum(place, permutation.size - 1))
    listed = jnp.where(place < wanted, listed, -1)

    # The batch's different classes, in order; those of other devices go to the end.
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

    # Samples of one class follow one another, and only the first of them was given a slot above.
    first = lax.cummax(jnp.where(positive, jnp.arange(len(target)), 0))
    target_slot = jnp.zeros_like(target).at[order].set(slot[first])
    return Sample(listed, jnp.where(target >= 0, target_slot, -1))


def _last_negatives(taken: jax.Array, wanted: jax.Array, slots: int, batch: int) -> jax.Array:
    """(B,) slots for classes that were not drawn: the last that hold negatives, then empty ones.

    Args:
      taken: (B,) int32 slots that hold classes of the batch; `slots` where there is none.
      wanted: () int32, slots that hold anything.
      slots: length of the list.
      batch: B.
    """
    is_taken = jnp.zeros((slots,), bool).at[taken].set(True, mode="drop")
    # At most B are taken and at most B are asked for: the last 2 B places have enough.
    place = wanted - 1 - jnp.arange(min(slots, 2 * batch))
    free = (place >= 0) & ~is_taken[place]
    rank = jnp.cumsum(free) - 1
    beyond = jnp.arange(batch) - jnp.sum(free) + wanted
    return beyond.at[jnp.where(free, rank, batch)].set(place, mode="drop")


class Permutation(NamedTuple):
    """A keyed permutation of 0 .. size - 1, computed element by element."""

    keys: jax.Array | np.ndarray
    """(rounds,) uint32."""
    size: jax.Array | np.int32
    """() int32, from 1 to the number of cells in the grid."""
    grid: tuple[int, int]
    """Rows and columns of the cells that the rounds permute."""

    def forward(self, index: jax.Array) -> jax.Array:
        """Where each of (n,) int32, all below `size`, goes to."""
        return self._walk(self.encrypt, index)

    def inverse(self, index: jax.Array) -> jax.Array:
        """Where each of (n,) int32, all below `size`, comes from."""
        return self._walk(self._decrypt, index)

    def _walk(self, step: Callable[[jax.Array], jax.Array], index: jax.Array) -> jax.Array:
        """Steps on until the cell is one of the first `size`."""
        size = self.size.astype(jnp.uint32)
        return lax.while_loop(
            lambda cell: jnp.any(cell >= size),
            lambda cell: jnp.where(cell >= size, step(cell), cell),
            step(index.astype(jnp.uint32)),
        ).astype(jnp.int32)

    def encrypt(self, cell: Any) -> Any:
        """One turn over all cells of the grid: (n,) uint32 to the same, NumPy's or JAX's."""
        rows, columns = (np.uint32(n) for n in self.grid)
        row, column = cell // columns, cell % columns
        for number in range(len(self.keys)):
            if number % 2 == 0:
                row = (row + _mix(column, self.keys[number]) % rows) % rows
            else:
                column = (column + _mix(row, self.keys[number]) % columns) % columns
        return row * columns + column

    def _decrypt(self, cell: jax.Array) -> jax.Array:
        rows, columns = (jnp.uint32(n) for n in self.grid)
        row, column = cell // columns, cell % columns
        for number in reversed(range(len(self.keys))):
            if number % 2 == 0:
                row = (row + rows - _mix(column, self.keys[number]) % rows) % rows
            else:
                column = (column + columns - _mix(row, self.keys[number]) % columns) % columns
        return row * columns + column


def grid(size: int) -> tuple[int, int]:
    """Rows and columns of the nearly square grid that holds `size` cells with the fewest to spare.

    Each spare cell costs some elements another turn of the permutation.
    """
    root = math.isqrt(size)
    sides = range(max(root * 3 // 4, _SMALLEST_SIDE), max(root, _SMALLEST_SIDE) + 1)
    spare, rows = min((-size % rows, rows) for rows in sides)
    return rows, max((size + spare) // rows, _SMALLEST_SIDE)


def _mix(value: Any, key: Any) -> Any:
    """32 bits that depend on every bit of the value and the key: the end of MurmurHash3."""
    value = value ^ key
    value = (value ^ (value >> 16)) * np.uint32(0x85EBCA6B)
    value = (value ^ (value >> 13)) * np.uint32(0xC2B2AE35)
    return value ^ (value >> 16)
