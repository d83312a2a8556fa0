"""Margin softmax over class centers that are split over the devices which share the batch.

Each device keeps a contiguous range of centers. It gathers all embeddings and visits its centers in
blocks of `block_size` classes, twice: once for the sum of exponentials, and, when the log-sum-exp
of all classes is known, once more to form the block's gradient and move its momentum. Neither the
B x
C logits nor the gradient of the centers ever exists as a whole.

No maximum is subtracted before exp(): cosines are bounded, so logits are at most `scale`, which
with ln(C) stays far below 88, where float32 overflows (`config.validate` refuses larger scales).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from arcface_jax.config import HeadConfig, OptimizerConfig
from arcface_jax.heads import margins
from arcface_jax.mesh import AXIS

_INIT_STD = 0.01


class HeadOutput(NamedTuple):
    """What one visit of the head gives."""

    loss: jax.Array
    """() float32: mean over the batch of -log softmax of the target, margin applied."""
    d_embeddings: jax.Array
    """(B, D) float32: gradient of the loss."""
    centers: jax.Array
    """(C_padded, D) float32, after the update."""
    momentum: jax.Array
    """(C_padded, D) float32, after the update."""
    accuracy: jax.Array
    """() float32: share of the batch whose target has the largest cosine, without margin."""
    target_cosine: jax.Array
    """() float32: mean cosine between embeddings and their own centers."""


def padded_classes(num_classes: int, num_devices: int) -> int:
    """Rows of the stored centers: the classes, and as many unused rows as make the shards equal."""
    return -(-num_classes // num_devices) * num_devices


def init_centers(key: jax.Array, *, num_classes: int, embedding_size: int, num_devices: int):
    """(C_padded, D) float32, normal(0, 0.01); each row the same on any number of devices."""
    rows = padded_classes(num_classes, num_devices)
    return _INIT_STD * jax.random.normal(key, (rows, embedding_size), jnp.float32)


def apply(
    embeddings: jax.Array,
    labels: jax.Array,
    centers: jax.Array,
    momentum: jax.Array,
    learning_rate: jax.Array,
    *,
    num_classes: int,
    head: HeadConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh,
) -> HeadOutput:
    """Loss, gradient of the embeddings, and one SGD step of the centers.

    loss = mean_i [ log sum_j exp(s z_ij) - s z_iy ], z_ij = cos(x_i, w_j), and z_iy =
    margin(cos(x_i, w_y)).

    Args:
      embeddings: (B, D) float32, not normalised, split over the devices.
      labels: (B,) int32. A label outside [0, num_classes) takes no part in loss and gradient.
      centers: (C_padded, D) float32, split over the devices; not normalised.
      momentum: (C_padded, D) float32, split in the same way.
      learning_rate: () float32.
      num_classes: C; rows behind it are padding.
      head: margin, scale, operand type, block size.
      optimizer: momentum and weight decay.
      mesh: the devices.
    """
    shard = P(AXIS)
    return jax.shard_map(
        partial(_on_one_device, num_classes=num_classes, head=head, optimizer=optimizer),
        mesh=mesh,
        in_specs=(shard, shard, shard, shard, P()),
        out_specs=HeadOutput._make((P(), shard, shard, shard, P(), P())),
        check_vma=False,
    )(embeddings, labels, centers, momentum, learning_rate)


def _on_one_device(
    embeddings, labels, centers, momentum, learning_rate, *, num_classes, head, optimizer
) -> HeadOutput:
    local = centers.shape[0]
    first = lax.axis_index(AXIS) * local
    dtype = jnp.dtype(head.dtype)
    unit, norm = _normalise(embeddings)
    x = lax.all_gather(unit.astype(dtype), AXIS, tiled=True)
    labels = lax.all_gather(labels, AXIS, tiled=True)
    valid = (labels >= 0) & (labels < num_classes)
    # Row of each sample's target on this device; -1, which no row has, where it is on another.
    mine = valid & (labels >= first) & (labels < first + local)
    target_row = jnp.where(mine, labels - first, -1)
    blocks = _Blocks(centers, block_size=head.block_size, used=num_classes - first)

    target_cosine = lax.psum(_target_cosine(x, centers, target_row), AXIS)
    margin_cosine, pull_margin = jax.vjp(margins.make(head), target_cosine)
    exp_sum, hardest = _sum_over_negatives(x, target_row, blocks, scale=head.scale)
    hardest = lax.pmax(hardest, AXIS)
    target_logit = head.scale * margin_cosine
    # How far the negatives lie above the target. Loss and gradient follow from the difference:
    # taken from the log-sum-exp, a trained network's small loss would be lost in rounding.
    excess = jnp.log(lax.psum(exp_sum, AXIS)) - target_logit
    losses = jax.nn.softplus(excess)
    lse = target_logit + losses

    weight = valid / valid.size
    (d_target,) = pull_margin(-weight * head.scale * jax.nn.sigmoid(excess))

    d_x, momentum = _gradients(
        x,
        target_row,
        blocks,
        momentum,
        log_weight=jnp.where(valid, jnp.log(head.scale / valid.size) - lse, -jnp.inf),
        d_target=d_target,
        scale=head.scale,
        optimizer=optimizer,
    )
    d_unit = lax.psum_scatter(d_x, AXIS, scatter_dimension=0, tiled=True)
    return HeadOutput(
        loss=jnp.sum(weight * losses),
        d_embeddings=_pull_normalise(d_unit, unit, norm),
        # Outside the loop: were centers and momentum both written in it, XLA would copy the shard.
        centers=centers - learning_rate * momentum,
        momentum=momentum,
        accuracy=jnp.sum(valid & (target_cosine >= hardest)) / valid.size,
        target_cosine=jnp.sum(weight * target_cosine),
    )


class _Blocks(NamedTuple):
    """This device's centers, seen `block_size` rows at a time.

    The last block ends with the last row, and so may begin inside the block before it: its `fresh`
    rows are those that no earlier block held.
    """

    centers: jax.Array
    block_size: int
    used: jax.Array
    """Rows of the shard that are classes; the rest is padding."""

    @property
    def size(self) -> int:
        return min(self.block_size, self.centers.shape[0])

    @property
    def count(self) -> int:
        return -(-self.centers.shape[0] // self.size)

    def block(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """start (), rows (size,), fresh (size,) and the centers (size, D) of a block."""
        start = jnp.minimum(index * self.size, self.centers.shape[0] - self.size)
        rows = start + jnp.arange(self.size)
        fresh = (rows >= index * self.size) & (rows < self.used)
        return start, rows, fresh, lax.dynamic_slice_in_dim(self.centers, start, self.size)


def _target_cosine(x: jax.Array, centers: jax.Array, target_row: jax.Array) -> jax.Array:
    """(B,) float32 cosines with the targets on this device, 0 where the target is on another."""
    unit, _ = _normalise(centers[jnp.maximum(target_row, 0)])
    # The operands are rounded as in the blocks, so that target and negatives have the same error.
    cosine = jnp.sum(x.astype(jnp.float32) * unit.astype(x.dtype).astype(jnp.float32), axis=1)
    return jnp.where(target_row >= 0, jnp.clip(cosine, -1, 1), 0)


def _sum_over_negatives(x, target_row, blocks: _Blocks, *, scale):
    """(B,) sum of exp(scale cos) over this device's negatives, and (B,) their largest cosine."""

    def add(index, carry):
        total, hardest = carry
        _, rows, fresh, centers = blocks.block(index)
        cosine = _cosines(x, _normalise(centers)[0])
        negative = fresh[None] & (rows[None] != target_row[:, None])
        total += jnp.sum(jnp.where(negative, jnp.exp(scale * cosine), 0), axis=1)
        hardest = jnp.maximum(hardest, jnp.max(jnp.where(negative, cosine, -jnp.inf), axis=1))
        return total, hardest

    batch = (x.shape[0],)
    start = jnp.zeros(batch, jnp.float32), jnp.full(batch, -jnp.inf, jnp.float32)
    return lax.fori_loop(0, blocks.count, add, start)


def _gradients(
    x, target_row, blocks: _Blocks, momentum, *, log_weight, d_target, scale, optimizer
) -> tuple[jax.Array, jax.Array]:
    """This device's part of the gradient of the normalised embeddings, and the moved momentum.

    Args:
      x: (B, D) normalised embeddings in the operand type.
      target_row: (B,) int32.
      blocks: the centers.
      momentum: (c, D) float32.
      log_weight: (B,) float32, log(scale / B) - lse: exp(scale cos + log_weight) is a negative's
        gradient.
      d_target: (B,) float32, gradient of the target cosine.
      scale: s.
      optimizer: momentum and weight decay.
    """

    def visit(index, carry):
        d_x, momentum = carry
        start, rows, fresh, centers = blocks.block(index)
        unit, norm = _normalise(centers)
        gradient = jnp.exp(scale * _cosines(x, unit) + log_weight[:, None])
        gradient = jnp.where(rows[None] == target_row[:, None], d_target[:, None], gradient)
        gradient = jnp.where(fresh[None], gradient, 0).astype(x.dtype)
        d_x += _product(gradient, unit.astype(x.dtype), contract=(1, 0))
        d_unit = _product(gradient, x, contract=(0, 0))
        d_centers = _pull_normalise(d_unit, unit, norm) + optimizer.weight_decay * centers
        old = lax.dynamic_slice_in_dim(momentum, start, blocks.size)
        new = jnp.where(fresh[:, None], optimizer.momentum * old + d_centers, old)
        return d_x, lax.dynamic_update_slice_in_dim(momentum, new, start, 0)

    start = jnp.zeros(x.shape, jnp.float32), momentum
    return lax.fori_loop(0, blocks.count, visit, start)


def _normalise(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of length 1, and (rows, 1) their lengths before; a zero row stays zero."""
    norm = jnp.sqrt(jnp.maximum(jnp.sum(rows * rows, axis=1, keepdims=True), 1e-24))
    return rows / norm, norm


def _pull_normalise(d_unit: jax.Array, unit: jax.Array, norm: jax.Array) -> jax.Array:
    """Gradient of the rows from the gradient of the normalised rows."""
    return (d_unit - unit * jnp.sum(d_unit * unit, axis=1, keepdims=True)) / norm


def _cosines(x: jax.Array, unit: jax.Array) -> jax.Array:
    """(B, D) and (n, D), both normalised, to (B, n) float32."""
    return jnp.clip(_product(x, unit.astype(x.dtype), contract=(1, 1)), -1, 1)


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
