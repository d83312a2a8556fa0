"""A keyed permutation of 0 .. n - 1, computed element by element and never stored.

The order of training (`data/order.py`) and the classes that Partial FC samples
(`heads/partial_fc.py`) are drawn from it.

Source: a Feistel network over Z_a x Z_b, Black and Rogaway, "Ciphers with Arbitrary Finite Domains"
(CT-RSA 2002).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# With three rounds, a chi-square test distinguishes distances between drawn classes from uniform
# ones.
ROUNDS = 8


# With fewer rows or columns, the rounds would not mix enough.
_SMALLEST_SIDE = 8


class Permutation(NamedTuple):
    """A keyed permutation of 0 .. size - 1, computed element by element."""

    keys: jax.Array | np.ndarray
    """(rounds,) uint32."""
    size: jax.Array | np.int32
    """() int32, from 1 to the number of cells in the grid."""
    grid: tuple[int, int]
    """Rows and columns of the grid of cells that the rounds permute."""

    def forward(self, index: jax.Array) -> jax.Array:
        """Returns the image of each of (n,) int32 indices below `size`."""
        return self._walk(self.encrypt, index)

    def inverse(self, index: jax.Array) -> jax.Array:
        """Returns the preimage of each of (n,) int32 indices below `size`."""
        return self._walk(self._decrypt, index)

    def _walk(self, step: Callable[[jax.Array], jax.Array], index: jax.Array) -> jax.Array:
        """Repeats the permutation until the cell is one of the first `size`."""
        size = self.size.astype(jnp.uint32)
        return lax.while_loop(
            lambda cell: jnp.any(cell >= size),
            lambda cell: jnp.where(cell >= size, step(cell), cell),
            step(index.astype(jnp.uint32)),
        ).astype(jnp.int32)

    def encrypt(self, cell: Any) -> Any:
        """Permutes all cells of the grid once: (n,) uint32 to (n,) uint32, of NumPy or JAX."""
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
    """Returns the nearly square grid with at least `size` cells and the fewest spare ones.

    Each spare cell costs some elements another round of the permutation.
    """
    root = math.isqrt(size)
    sides = range(max(root * 3 // 4, _SMALLEST_SIDE), max(root, _SMALLEST_SIDE) + 1)
    spare, rows = min((-size % rows, rows) for rows in sides)
    return rows, max((size + spare) // rows, _SMALLEST_SIDE)


def _mix(value: Any, key: Any) -> Any:
    """Mixes 32 bits of value and key, with the finalizer of MurmurHash3."""
    value = value ^ key
    value = (value ^ (value >> 16)) * np.uint32(0x85EBCA6B)
    value = (value ^ (value >> 13)) * np.uint32(0xC2B2AE35)
    return value ^ (value >> 16)
