"""Forms of multiplying a block of classes with a batch, one of which is chosen at start.

All forms compute the same sums and gradients up to the rounding of the operands:

- `unit` normalizes the block's centers, then multiplies.
- `scaled` multiplies the centers as they are and divides the cosines by their lengths, and takes
  the gradient's part along a center from the cosines. No normalized copy of the block is written
  or read, which is most of the traffic at small batches.
- `powers` writes exp(s cosine) in the operands' type at the end of the product, and no cosine.
  Factors per sample are multiplied into the embeddings, not into the block. Fewest bytes at large
  batches; for bfloat16 and float32, one center per class, and cosines that no margin changes.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

# fp16 underflows below 6e-8, and at a million classes most probabilities are smaller.
_FP16_UNIT = 2.0**12


class Samples(NamedTuple):
    """The batch, or a tile of it: t samples."""

    x: jax.Array
    """(t, D) normalized embeddings, in the operands' type."""
    target_slot: jax.Array
    """(t,) int32 slot of each sample's class; -1 if it is not on this device."""
    own_cosine: jax.Array
    """(t,) float32 cosines with the own classes, for margins that compare with them."""

    def is_target(self, slots: jax.Array) -> jax.Array:
        """Returns (t, n) bool."""
        return slots[None] == self.target_slot[:, None]


class Block(NamedTuple):
    """The centers of n classes, ready for products."""

    rows: jax.Array
    """(n * K, D) float32, as stored; normalized in the form `unit`."""
    length: jax.Array
    """(n * K, 1) float32 lengths before normalization; their inverse in forms that multiply by
    it."""
    operand: jax.Array
    """(n * K, D) the operand of the product."""
    slots: jax.Array
    """(n,) int32."""
    present: jax.Array
    """(n,) bool: which slots contain a class to visit."""
    first: jax.Array
    """() int32: the first slot that no other block visits."""


class Sums(NamedTuple):
    """Sums accumulated in the first pass."""

    total: jax.Array
    """(t,) float32 sum of exp(s value - shift) over the other classes."""
    hardest: jax.Array
    """(t,) float32 largest cosine with them; -inf if there are none."""
    shift: jax.Array | None
    """(t,) float32 largest logit so far; None if nothing is subtracted."""


class Weights(NamedTuple):
    """Factors of each sample in the second pass."""

    others: jax.Array
    """(t,) float32, a summand of the logits, or a factor of the gradient in the form `powers`."""
    own: jax.Array
    """(t,) gradient of the target cosines, in units of the others' gradient."""
    x: jax.Array | None
    """(t, D) embeddings multiplied by `others`; None if a form does not need them, or computes them
    tile by tile."""


class CentersGradient(NamedTuple):
    """Contribution of the samples to the gradient of a block's centers, over s / samples."""

    centers: jax.Array
    """(n * K, D) float32."""
    along: jax.Array | None
    """(n * K,) float32 part along each center, if the form computes it from the cosines."""


class Problem(NamedTuple):
    """Values that are the same for all blocks and samples."""

    subcenters: int
    """K, the number of centers per class."""
    scale: float
    """s, the scale."""
    negative_transform: Callable[[jax.Array, jax.Array], jax.Array] | None
    """The margin's change of (t, n) cosines with other classes, given (t, 1) own cosines; None if
    there is none."""


class Form(Protocol):
    """A way to compute a block's products."""

    moves_centers: bool
    """Whether the second pass over all classes can update the centers in the same loop."""

    def block(
        self, rows: jax.Array, dtype: jax.typing.DTypeLike, *, written: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns (rows, length, operand) of a `Block`; `written` if the loop also updates the
        centers.
        """
        ...

    def add(self, problem: Problem, samples: Samples, block: Block, sums: Sums) -> Sums:
        """Returns the sums with a block's classes added."""
        ...

    def weights(self, samples: Samples, log_sum: jax.Array, d_target: jax.Array) -> Weights:
        """Returns weights of all samples from (T, t) log-sum-exps, inf for samples that do not
        count, and (T, t) gradients of the target cosines.
        """
        ...

    def vjp(
        self, problem: Problem, samples: Samples, weights: Weights, block: Block
    ) -> tuple[jax.Array, CentersGradient]:
        """Returns (t, D) float32 gradient of the embeddings before `finish`, and the centers'
        gradient.
        """
        ...

    def finish(self, d_x: jax.Array, weights: Weights) -> jax.Array:
        """Returns the gradient of the embeddings, once all blocks are summed."""
        ...

    def d_rows(self, block: Block, gradient: CentersGradient, factor: jax.Array) -> jax.Array:
        """Returns (n * K, D) float32 gradient of the centers as stored."""
        ...


class Cosines(NamedTuple):
    """Forms `unit` and `scaled`: cosines in float32, for every margin and type."""

    scale_after: bool
    """Whether to divide by the lengths after the product."""

    moves_centers = False

    def block(
        self, rows: jax.Array, dtype: jax.typing.DTypeLike, *, written: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        if self.scale_after:
            squares = jnp.maximum(jnp.sum(rows * rows, axis=1, keepdims=True), 1e-24)
            return rows, lax.rsqrt(squares), rows.astype(dtype)
        unit, norm = normalize(rows)
        return unit, norm, unit.astype(dtype)

    def cosines(self, problem: Problem, samples: Samples, block: Block) -> jax.Array:
        """Returns (t, n, K) float32."""
        cosine = product(samples.x, block.operand, contract=(1, 1))
        if self.scale_after:
            cosine *= block.length[:, 0][None]
        return jnp.clip(cosine, -1, 1).reshape(len(samples.x), -1, problem.subcenters)

    def add(self, problem: Problem, samples: Samples, block: Block, sums: Sums) -> Sums:
        total, hardest, shift = sums
        cosine = self.cosines(problem, samples, block).max(axis=2)
        others = block.present[None] & ~samples.is_target(block.slots)
        hardest = jnp.maximum(hardest, jnp.max(jnp.where(others, cosine, -jnp.inf), axis=1))
        transform = problem.negative_transform
        logit = transform(cosine, samples.own_cosine[:, None]) if transform else cosine
        logit = problem.scale * logit
        if shift is not None:
            largest = jnp.max(jnp.where(others, logit, -jnp.inf), axis=1)
            before, shift = shift, jnp.maximum(shift, largest)
            total *= jnp.exp(before - shift)
            logit -= shift[:, None]
        total += jnp.sum(jnp.where(others, jnp.exp(logit), 0), axis=1)
        return Sums(total, hardest, shift)

    def weights(self, samples: Samples, log_sum: jax.Array, d_target: jax.Array) -> Weights:
        unit = unit_of_gradient(samples.x.dtype)
        d_target = d_target * unit
        if samples.x.dtype == jnp.float16:  # its largest number is 65504
            limits = jnp.finfo(jnp.float16)
            d_target = jnp.clip(d_target, limits.min, limits.max)
        return Weights(jnp.log(unit) - log_sum, d_target, None)

    def vjp(
        self, problem: Problem, samples: Samples, weights: Weights, block: Block
    ) -> tuple[jax.Array, CentersGradient]:
        by_center = self.cosines(problem, samples, block)
        cosine = by_center.max(axis=2)
        value, vjp = cosine, None
        if problem.negative_transform:
            own, transform = samples.own_cosine[:, None], problem.negative_transform
            value, vjp = jax.vjp(lambda z: transform(z, own), cosine)
        d = jnp.exp(problem.scale * value + weights.others[:, None])
        d = vjp(d)[0] if vjp else d
        d = jnp.where(samples.is_target(block.slots), weights.own[:, None], d)
        d = jnp.where(block.present[None], d, 0)
        if problem.subcenters > 1:  # the nearest center of a class gets the whole gradient
            nearest = jax.nn.one_hot(jnp.argmax(by_center, axis=2), problem.subcenters)
            d = (d[:, :, None] * nearest).reshape(len(d), -1)
        along = None
        if self.scale_after:
            along = jnp.sum(d * by_center.reshape(d.shape), axis=0)
            d *= block.length[:, 0][None]
        d = d.astype(samples.x.dtype)
        d_x = product(d, block.operand, contract=(1, 0))
        return d_x, CentersGradient(product(d, samples.x, contract=(0, 0)), along)

    def finish(self, d_x: jax.Array, weights: Weights) -> jax.Array:
        return d_x

    def d_rows(self, block: Block, gradient: CentersGradient, factor: jax.Array) -> jax.Array:
        if gradient.along is None:
            return normalize_vjp(factor * gradient.centers, block.rows, block.length)
        along = gradient.along[:, None] * jnp.square(block.length)
        return factor * (gradient.centers - block.rows * along)


class Powers(NamedTuple):
    """Form `powers`: exp(s cosine) in the operands' type, if nothing changes the cosines.

    Only constants are applied after the product, so XLA can fuse the exponential into it. bfloat16
    has the range of float32, and its rounding equals that of the other operands; sums are float32.
    """

    moves_centers = True

    def block(
        self, rows: jax.Array, dtype: jax.typing.DTypeLike, *, written: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        # Separate from the division, or XLA copies the block for one kernel that does both.
        squares = jnp.sum(rows * rows, axis=1)
        if written:  # everything reads one copy of the block instead of the array
            rows, squares = lax.optimization_barrier((rows, squares))
        else:
            squares = lax.optimization_barrier(squares)
        inverse = lax.rsqrt(jnp.maximum(squares, 1e-24))[:, None]
        return rows, inverse, (rows * inverse).astype(dtype)

    def _powers(self, problem: Problem, samples: Samples, block: Block) -> jax.Array:
        """Returns (t, n) exp(s cosine) in the operands' type."""
        cosine = jnp.clip(product(samples.x, block.operand, contract=(1, 1)), -1, 1)
        return jnp.exp(problem.scale * cosine).astype(samples.x.dtype)

    def add(self, problem: Problem, samples: Samples, block: Block, sums: Sums) -> Sums:
        power = self._powers(problem, samples, block)
        others = block.present[None] & ~samples.is_target(block.slots)
        power = jnp.where(others, power, 0)
        largest = jnp.max(power, axis=1).astype(jnp.float32)
        return Sums(
            sums.total + jnp.sum(power.astype(jnp.float32), axis=1),
            jnp.maximum(sums.hardest, jnp.log(largest) / problem.scale),
            None,
        )

    def weights(self, samples: Samples, log_sum: jax.Array, d_target: jax.Array) -> Weights:
        weight = jnp.exp(-log_sum)
        # With equal embeddings the quotient exceeds the type's range. Half of the range leaves room
        # for the other summands of the products.
        largest = float(jnp.finfo(samples.x.dtype).max) / 2
        own = jnp.clip(d_target / weight, -largest, largest)
        own = jnp.where(weight > 0, own, 0).astype(samples.x.dtype)
        one_tile = len(own) == 1  # more tiles would need a second copy of the batch
        return Weights(weight, own, _weighted(samples.x, weight) if one_tile else None)

    def vjp(
        self, problem: Problem, samples: Samples, weights: Weights, block: Block
    ) -> tuple[jax.Array, CentersGradient]:
        operand = jnp.where(block.present[:, None], block.operand, 0)
        d = self._powers(problem, samples, block._replace(operand=operand))
        place = samples.target_slot - block.slots[0]
        here = (samples.target_slot >= block.first) & (place < len(block.slots))
        d = d.at[jnp.arange(len(d)), jnp.where(here, place, len(block.slots))].set(
            weights.own, mode="drop", unique_indices=True, indices_are_sorted=True
        )
        d_x = product(d, operand, contract=(1, 0))
        x = _weighted(samples.x, weights.others) if weights.x is None else weights.x
        return d_x, CentersGradient(product(d, x, contract=(0, 0)), None)

    def finish(self, d_x: jax.Array, weights: Weights) -> jax.Array:
        return d_x * weights.others[:, None]

    def d_rows(self, block: Block, gradient: CentersGradient, factor: jax.Array) -> jax.Array:
        along = jnp.sum(gradient.centers * block.rows, axis=1, keepdims=True)
        along *= jnp.square(block.length)
        return factor * block.length * (gradient.centers - block.rows * along)


def _weighted(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiplies each sample (..., D) by its weight (...), in the type of x."""
    return (x.astype(jnp.float32) * weight[..., None]).astype(x.dtype)


FORMS: dict[str, Form] = {
    "unit": Cosines(scale_after=False),
    "scaled": Cosines(scale_after=True),
    "powers": Powers(),
}


def unit_of_gradient(dtype: jax.typing.DTypeLike) -> float:
    """Returns the factor on gradients before they are rounded to the operands' type."""
    return _FP16_UNIT if dtype == jnp.float16 else 1.0


def normalize(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scales rows to length 1; returns them and their (rows, 1) lengths. A zero row stays zero."""
    norm = jnp.sqrt(jnp.maximum(jnp.sum(rows * rows, axis=1, keepdims=True), 1e-24))
    return rows / norm, norm


def normalize_vjp(d_unit: jax.Array, unit: jax.Array, norm: jax.Array) -> jax.Array:
    """Returns the gradient of the rows from the gradient of the normalized rows."""
    return (d_unit - unit * jnp.sum(d_unit * unit, axis=1, keepdims=True)) / norm


def product(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    """Returns a matrix product over one dimension of each, accumulated and returned in float32."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        # Keep float32 operands in float32: recent GPUs would round them to TF32.
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
