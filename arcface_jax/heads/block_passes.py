"""The forward and the backward pass of `margin_softmax` over the local classes, in blocks.

A block is multiplied with one tile of a large batch at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from arcface_jax.heads.block_forms import (
    Block,
    CentersGradient,
    Form,
    Problem,
    Samples,
    Sums,
    Weights,
    normalize,
    unit_of_gradient,
)
from arcface_jax.heads.blocks import Walk
from arcface_jax.heads.centers import Moments, Rule

# Above this, the gradient of the embeddings is computed and reduced one tile at a time, in a
# separate pass: one more product in five, and no (B, D) float32 array.
_LARGEST_D_X = 96 * 2**20


class Visit(NamedTuple):
    """Inputs of both passes."""

    samples: Samples
    """Samples of all devices, in T tiles: (T, t, ...)."""
    rows: jax.Array
    """(c * K, D) float32 centers of this device, K for each class."""
    walk: Walk
    """The classes to visit."""
    problem: Problem
    form: Form

    @property
    def tiles(self) -> int:
        """Number of tiles, T."""
        return self.samples.target_slot.shape[0]

    def block(self, rows: jax.Array, index: jax.Array, *, written: bool = False) -> Block:
        """Returns block `index` of the walk, with centers `rows`; `written` as in `Form.block`."""
        slots, present = self.walk.slots(index)
        rows, length, operand = self.form.block(rows, self.samples.x.dtype, written=written)
        return Block(rows, length, operand, slots, present, index * self.walk.size)


class Update(NamedTuple):
    """Update of the centers by their gradient."""

    rule: Rule
    learning_rate: jax.Array
    """() float32."""
    step: jax.Array
    """() int32, steps done before this one."""


def target_cosine(visit: Visit, target: jax.Array) -> jax.Array:
    """Returns (B,) float32 cosines with the own classes, 0 for classes on another device.

    Args:
      visit: the embeddings and centers.
      target: (B,) int32 class of each sample on this device, -1 for none.
    """

    def cosine(x: jax.Array, target: jax.Array) -> jax.Array:
        subcenters = visit.problem.subcenters
        rows = jnp.maximum(target, 0)[:, None] * subcenters + jnp.arange(subcenters)[None]
        unit, _ = normalize(visit.rows[rows.reshape(-1)])
        # The operands are rounded as in the blocks, so that target and others have the same error.
        unit = unit.astype(x.dtype).astype(jnp.float32).reshape(*rows.shape, -1)
        cosine = jnp.sum(x.astype(jnp.float32)[:, None] * unit, axis=2).max(axis=1)
        return jnp.where(target >= 0, jnp.clip(cosine, -1, 1), 0)

    target = target.reshape(visit.tiles, -1)
    return map_tiles(cosine, visit.samples.x, target).reshape(-1)


def sum_over_others(visit: Visit, *, shifted: bool) -> Sums:
    """Runs the first pass: the sums over the other classes.

    Args:
      visit: the inputs.
      shifted: whether to subtract the largest logit before exp().

    Returns:
      (B,) each.
    """

    def add(index, sums):
        block = visit.block(visit.walk.read(visit.rows, index), index)

        def add_tile(samples, sums):
            return visit.form.add(visit.problem, samples, block, sums)

        return map_tiles(add_tile, visit.samples, sums)

    shape = visit.samples.target_slot.shape
    lowest = -visit.problem.scale  # finite, because the difference of two infinities is NaN
    start = Sums(
        total=jnp.zeros(shape, jnp.float32),
        hardest=jnp.full(shape, -jnp.inf, jnp.float32),
        shift=jnp.full(shape, lowest, jnp.float32) if shifted else None,
    )
    sums = lax.fori_loop(0, visit.walk.num_blocks, add, start)
    return jax.tree.map(lambda a: a.reshape(-1), sums)


def gradients(
    visit: Visit,
    moments: Moments,
    *,
    log_sum: jax.Array,
    d_target: jax.Array,
    factor: jax.Array,
    update: Update,
    move_centers: bool,
    reduce: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, Moments, jax.Array]:
    """Runs the backward pass: gradients of the loss, and updated moments of the centers.

    Args:
      visit: the inputs; classes that are not visited keep their moments.
      moments: moments of the centers.
      log_sum: (B,) float32 log-sum-exp of all logits, inf for samples that do not count.
      d_target: (B,) float32 gradient of the target cosine, over `factor`.
      factor: () float32, s / number of samples that count.
      update: the centers' optimizer.
      move_centers: whether to update the visited centers as well; see `Form.moves_centers`.
      reduce: maps (t, D), this device's part of the embeddings' gradient, to (t / N, D), the sum
        over the devices for this device's samples.

    Returns:
      (B / N, D) float32 gradient of the normalized embeddings; moments; centers.
    """
    shape, form = visit.samples.target_slot.shape, visit.form
    weights = form.weights(visit.samples, log_sum.reshape(shape), d_target.reshape(shape))
    factor = factor / unit_of_gradient(visit.samples.x.dtype)

    again = partial(
        _visit_again, weights=weights, factor=factor, update=update, move_centers=move_centers
    )

    def finish(d_x: jax.Array, weights: Weights) -> jax.Array:
        return reduce(factor * form.finish(d_x, weights))

    if visit.tiles > 1 and 4 * visit.samples.x.size > _LARGEST_D_X:
        d_x = map_tiles(lambda *tile: finish(_d_x(visit, *tile), tile[1]), visit.samples, weights)
        # Before the centers are written, or XLA keeps a copy of them.
        d_x, rows, moments = lax.optimization_barrier((d_x, visit.rows, moments))
        visit = visit._replace(rows=rows)
        _, moments, rows = again(visit, moments, d_x=None)
    else:
        zeros = jnp.zeros(visit.samples.x.shape, jnp.float32)
        total, moments, rows = again(visit, moments, d_x=zeros)
        d_x = map_tiles(finish, total, weights)
    return d_x.reshape(-1, d_x.shape[-1]), moments, rows


def _visit_again(
    visit: Visit,
    moments: Moments,
    *,
    weights: Weights,
    factor: jax.Array,
    update: Update,
    move_centers: bool,
    d_x: jax.Array | None,
) -> tuple[jax.Array | None, Moments, jax.Array]:
    """Runs `gradients` in one loop: (T, t, D) d_x with all blocks added, if given; moments;
    centers.
    """

    def add(index, d_x, moments, rows):
        stored = visit.walk.read(rows, index)
        block = visit.block(stored, index, written=move_centers)
        d_x, gradient = _block_vjp(visit, weights, block, d_x)
        d_rows = visit.form.d_rows(block, gradient, factor)
        if move_centers:
            stored = block.rows  # the copy, because nothing may read the array being written
        return d_x, _accumulate(visit, update.rule, index, moments, stored, d_rows), stored

    def add_and_move(index, carry):
        d_x, moments, rows = carry
        d_x, moments, stored = add(index, d_x, moments, rows)
        # Read again after a barrier, or XLA recomputes them from their inputs.
        moments, stored = lax.optimization_barrier((moments, stored))
        return d_x, moments, _move_block(visit, update, index, rows, stored, moments)

    blocks = visit.walk.num_blocks
    if move_centers:
        return lax.fori_loop(0, blocks, add_and_move, (d_x, moments, visit.rows))
    # Centers that the loop carried without writing them would be copied.
    d_x, moments = lax.fori_loop(
        0,
        blocks,
        lambda index, carry: add(index, carry[0], carry[1], visit.rows)[:2],
        (d_x, moments),
    )
    return d_x, moments, visit.rows


def _d_x(visit: Visit, samples: Samples, weights: Weights) -> jax.Array:
    """Returns (t, D) float32 gradient of a tile's embeddings, summed over all blocks."""

    def add(index, d_x):
        block = visit.block(visit.walk.read(visit.rows, index), index)
        return d_x + visit.form.vjp(visit.problem, samples, weights, block)[0]

    return lax.fori_loop(0, visit.walk.num_blocks, add, jnp.zeros(samples.x.shape, jnp.float32))


def _block_vjp(
    visit: Visit, weights: Weights, block: Block, d_x: jax.Array | None
) -> tuple[jax.Array | None, CentersGradient]:
    """Adds a block's part to the (T, t, D) gradient of the embeddings; also returns its centers'
    gradient.
    """

    def tile(index):
        return jax.tree.map(lambda a: a[index], (visit.samples, weights))

    def vjp(index):
        samples, weights = tile(index)
        return visit.form.vjp(visit.problem, samples, weights, block)

    if visit.tiles == 1:
        part, total = vjp(0)
        return (None if d_x is None else d_x + part[None]), total

    def add(index, carry):
        d_x, total = carry
        part, more = vjp(index)
        return (
            None if d_x is None else d_x.at[index].add(part),
            jax.tree.map(jnp.add, total, more),
        )

    like = jax.eval_shape(lambda: vjp(0)[1])
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    return lax.fori_loop(0, visit.tiles, add, (d_x, zeros))


def move(visit: Visit, moments: Moments, update: Update) -> jax.Array:
    """Returns the centers with the visited ones updated by their moments."""

    def add(index, rows):
        old = visit.walk.read(rows, index)
        return _move_block(visit, update, index, rows, old, moments)

    return lax.fori_loop(0, visit.walk.num_blocks, add, visit.rows)


def _accumulate(visit: Visit, rule: Rule, index, moments: Moments, rows, d_rows) -> Moments:
    """Returns the moments, with a block's updated by the gradient (n * K, D) of its centers."""
    old = {name: visit.walk.read(moment, index) for name, moment in moments.items()}
    new = rule.accumulate(rule.decay(old, rows), d_rows)
    return {name: visit.walk.write(moment, index, new[name]) for name, moment in moments.items()}


def _move_block(visit: Visit, update: Update, index, rows, old, moments: Moments) -> jax.Array:
    """Writes a block's updated centers, formerly `old`, into `rows`."""
    block = {name: visit.walk.read(moment, index) for name, moment in moments.items()}
    moved = update.rule.apply(old, block, update.learning_rate, update.step)
    return visit.walk.write(rows, index, moved)


def map_tiles(function: Callable, *trees):
    """Maps a function over tiles: arrays (T, t, ...) to (T, ...), in a loop if there are
    several.
    """
    if len(jax.tree.leaves(trees)[0]) > 1:
        return lax.map(lambda tile: function(*tile), trees)
    out = function(*jax.tree.map(lambda a: a[0], trees))
    return jax.tree.map(lambda a: a[None], out)
