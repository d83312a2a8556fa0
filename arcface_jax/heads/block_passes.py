"""The two visits of a device to its classes, block by block; see `margin_softmax`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from arcface_jax.heads.blocks import Walk
from arcface_jax.heads.centers import Moments, Rule

# fp16 knows nothing between 0 and 6e-8, and at a million classes most probabilities are smaller.
_FP16_UNIT = 2.0**12


class Visit(NamedTuple):
    """What both visits look at."""

    x: jax.Array
    """(B, D) normalized embeddings of all devices, in the operands' type."""
    rows: jax.Array
    """(c * K, D) float32 centers of this device, K for each class."""
    walk: Walk
    """Which classes are visited."""
    target_slot: jax.Array
    """(B,) int32 slot of each sample's class; -1 where it is not on this device."""
    subcenters: int
    """K."""
    scale: float
    """s."""
    negative_transform: Callable[[jax.Array], jax.Array] | None
    """The margin's change of (B, n) cosines with other classes; None leaves them."""

    def cosines(self, unit: jax.Array) -> jax.Array:
        """(B, n, K) float32 cosines with a block's normalized centers (n * K, D)."""
        cosine = jnp.clip(_product(self.x, unit.astype(self.x.dtype), contract=(1, 1)), -1, 1)
        return cosine.reshape(len(self.x), -1, self.subcenters)

    def is_target(self, slots: jax.Array) -> jax.Array:
        """(B, n) bool."""
        return slots[None] == self.target_slot[:, None]


def target_cosine(visit: Visit, target: jax.Array) -> jax.Array:
    """(B,) float32 cosines with the own classes, 0 where these are on another device.

    Args:
      visit: the embeddings and centers.
      target: (B,) int32 class of each sample on this device, -1 where there is none.
    """
    rows = jnp.maximum(target, 0)[:, None] * visit.subcenters + jnp.arange(visit.subcenters)[None]
    unit, _ = normalize(visit.rows[rows.reshape(-1)])
    # The operands are rounded as in the blocks, so that target and others have the same error.
    unit = unit.astype(visit.x.dtype).astype(jnp.float32).reshape(*rows.shape, -1)
    cosine = jnp.sum(visit.x.astype(jnp.float32)[:, None] * unit, axis=2).max(axis=1)
    return jnp.where(target >= 0, jnp.clip(cosine, -1, 1), 0)


def sum_over_others(
    visit: Visit, *, shifted: bool
) -> tuple[jax.Array, jax.Array | float, jax.Array]:
    """The first visit.

    Args:
      visit: what to look at.
      shifted: whether to subtract the largest logit before exp().

    Returns:
      (B,) sum of exp(s value - shift) over the other classes; (B,) shift, or 0; (B,) their largest
      cosine. -inf is the largest of none.
    """

    def add(index, carry):
        total, shift, hardest = carry
        slots, present = visit.walk.slots(index)
        unit, _ = normalize(visit.walk.read(visit.rows, index))
        cosine = visit.cosines(unit).max(axis=2)
        others = present[None] & ~visit.is_target(slots)
        hardest = jnp.maximum(hardest, jnp.max(jnp.where(others, cosine, -jnp.inf), axis=1))
        transform = visit.negative_transform
        logit = visit.scale * (transform(cosine) if transform else cosine)
        if shifted:
            largest = jnp.max(jnp.where(others, logit, -jnp.inf), axis=1)
            before, shift = shift, jnp.maximum(shift, largest)
            total *= jnp.exp(before - shift)
            logit -= shift[:, None]
        total += jnp.sum(jnp.where(others, jnp.exp(logit), 0), axis=1)
        return total, shift, hardest

    batch = visit.target_slot.shape
    lowest = -visit.scale  # finite, for the difference of two infinities is not a number
    start = (
        jnp.zeros(batch, jnp.float32),
        jnp.full(batch, lowest, jnp.float32) if shifted else 0.0,
        jnp.full(batch, -jnp.inf, jnp.float32),
    )
    return lax.fori_loop(0, visit.walk.num_blocks, add, start)


def gradients(
    visit: Visit,
    moments: Moments,
    *,
    log_sum: jax.Array,
    d_target: jax.Array,
    factor: jax.Array,
    rule: Rule,
) -> tuple[jax.Array, Moments]:
    """The second visit: gradients of the loss, and the moments moved by those of the centers.

    Args:
      visit: what to look at; classes that are not visited keep their moments.
      moments: of the centers.
      log_sum: (B,) float32 log-sum-exp of all logits, inf for samples that do not count.
      d_target: (B,) float32 gradient of the target cosine, over `factor`.
      factor: () float32, s / number of samples that count.
      rule: the centers' optimizer.

    Returns:
      (B, D) float32, this device's part of the gradient of the normalized embeddings; moments.
    """
    dtype = visit.x.dtype
    unit_of_gradient = _FP16_UNIT if dtype == jnp.float16 else 1.0
    d_target = d_target * unit_of_gradient
    if dtype == jnp.float16:  # whose largest number is 65504
        d_target = jnp.clip(d_target, jnp.finfo(dtype).min, jnp.finfo(dtype).max)
    log_weight = jnp.log(unit_of_gradient) - log_sum
    factor = factor / unit_of_gradient

    def add(index, carry):
        d_x, moments = carry
        slots, present = visit.walk.slots(index)
        rows = visit.walk.read(visit.rows, index)
        unit, norm = normalize(rows)
        by_center = visit.cosines(unit)
        cosine = by_center.max(axis=2)
        transform = visit.negative_transform
        value, vjp = jax.vjp(transform, cosine) if transform else (cosine, None)
        d = jnp.exp(visit.scale * value + log_weight[:, None])
        d = vjp(d)[0] if vjp else d
        d = jnp.where(visit.is_target(slots), d_target[:, None], d)
        d = jnp.where(present[None], d, 0)
        if visit.subcenters > 1:  # the nearest center of a class takes it all
            nearest = jax.nn.one_hot(jnp.argmax(by_center, axis=2), visit.subcenters)
            d = (d[:, :, None] * nearest).reshape(len(d), -1)
        d = d.astype(dtype)
        d_x += _product(d, unit.astype(dtype), contract=(1, 0))
        d_rows = normalize_vjp(factor * _product(d, visit.x, contract=(0, 0)), unit, norm)
        old = {name: visit.walk.read(moment, index) for name, moment in moments.items()}
        new = rule.accumulate(rule.decay(old, rows), d_rows)
        moments = {
            name: visit.walk.write(moment, index, new[name]) for name, moment in moments.items()
        }
        return d_x, moments

    start = jnp.zeros(visit.x.shape, jnp.float32), moments
    d_x, moments = lax.fori_loop(0, visit.walk.num_blocks, add, start)
    return factor * d_x, moments


def move(
    visit: Visit, moments: Moments, *, rule: Rule, learning_rate: jax.Array, step: jax.Array
) -> jax.Array:
    """The centers, those that are visited moved by their moments; the others are not touched."""

    def add(index, rows):
        old = visit.walk.read(rows, index)
        block = {name: visit.walk.read(moment, index) for name, moment in moments.items()}
        return visit.walk.write(rows, index, rule.apply(old, block, learning_rate, step))

    return lax.fori_loop(0, visit.walk.num_blocks, add, visit.rows)


def normalize(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of length 1, and (rows, 1) their lengths before; a zero row stays zero."""
    norm = jnp.sqrt(jnp.maximum(jnp.sum(rows * rows, axis=1, keepdims=True), 1e-24))
    return rows / norm, norm


def normalize_vjp(d_unit: jax.Array, unit: jax.Array, norm: jax.Array) -> jax.Array:
    """Gradient of the rows from the gradient of the normalized rows."""
    return (d_unit - unit * jnp.sum(d_unit * unit, axis=1, keepdims=True)) / norm


def _product(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    """A matrix product over one dimension of each, accumulated and returned in float32."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        # float32 operands mean float32: recent GPUs would round them to TF32.
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
