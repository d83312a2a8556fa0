"""Iterate over a device's classes block by block: all of them, or a list of them.

Both walks number the visited classes by slots. Block i has the slots `Walk.slots(i)`, and each
class has `subcenters` rows in the arrays that are read and written.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax


class Walk(Protocol):
    """Interface of a walk."""

    @property
    def size(self) -> int:
        """Number of classes in a block."""
        ...

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        ...

    def slots(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the block's slots, (size,) int32, and which contain a class to visit, (size,)
        bool.
        """
        ...

    def read(self, array: jax.Array, index: jax.Array) -> jax.Array:
        """Returns the block's rows of an array (rows, D): (size * subcenters, D)."""
        ...

    def write(self, array: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
        """Returns the array with the rows of the block's visited classes replaced."""
        ...

    def only_if(self, condition: jax.Array) -> "Walk":
        """Returns the same walk, but without visits unless the condition, () bool, holds."""
        ...


class EveryClass(NamedTuple):
    """All classes in their order; a slot is the class's number on this device.

    The last block ends with the last class, so it may overlap the block before it, whose classes it
    does not visit again.
    """

    classes: int
    """Number of classes stored on this device."""
    used: jax.Array
    """() int32: number of actual classes; the others are padding."""
    block_size: int
    subcenters: int

    @property
    def size(self) -> int:
        return min(self.block_size, self.classes)

    @property
    def num_blocks(self) -> int:
        return -(-self.classes // self.size)

    def slots(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        slots = self._start(index) + jnp.arange(self.size)
        return slots, (slots >= index * self.size) & (slots < self.used)

    def read(self, array: jax.Array, index: jax.Array) -> jax.Array:
        start, size = self._start(index) * self.subcenters, self.size * self.subcenters
        return lax.dynamic_slice_in_dim(array, start, size)

    def write(self, array: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
        visited = jnp.repeat(self.slots(index)[1], self.subcenters)[:, None]
        new = jnp.where(visited, new, self.read(array, index))
        return lax.dynamic_update_slice_in_dim(
            array, new, self._start(index) * self.subcenters, axis=0
        )

    def only_if(self, condition: jax.Array) -> "EveryClass":
        return self._replace(used=jnp.where(condition, self.used, 0))

    def _start(self, index: jax.Array) -> jax.Array:
        return jnp.minimum(index * self.size, self.classes - self.size)


class ListedClasses(NamedTuple):
    """The classes of a list, gathered and scattered; a slot is a position in the list."""

    listed: jax.Array
    """(slots,) int32: distinct classes of this device; -1 for an empty slot."""
    block_size: int
    subcenters: int

    @property
    def size(self) -> int:
        return min(self.block_size, len(self.listed))

    @property
    def num_blocks(self) -> int:
        return -(-len(self.listed) // self.size)

    def slots(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        slots = index * self.size + jnp.arange(self.size)
        return slots, self._classes(index) >= 0

    def read(self, array: jax.Array, index: jax.Array) -> jax.Array:
        return array.at[self._rows(index)].get(mode="clip")

    def write(self, array: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
        rows = self._rows(index)
        beyond = len(array) + jnp.arange(len(rows))  # distinct too, and dropped
        return array.at[jnp.where(rows >= 0, rows, beyond)].set(
            new, mode="drop", unique_indices=True
        )

    def only_if(self, condition: jax.Array) -> "ListedClasses":
        return self._replace(listed=jnp.where(condition, self.listed, -1))

    def _classes(self, index: jax.Array) -> jax.Array:
        slots = index * self.size + jnp.arange(self.size)
        return self.listed.at[slots].get(mode="fill", fill_value=-1)

    def _rows(self, index: jax.Array) -> jax.Array:
        """Returns (size * subcenters,) int32, negative for empty slots."""
        first = self._classes(index) * self.subcenters
        return (first[:, None] + jnp.arange(self.subcenters)[None]).reshape(-1)
