"""Margin softmax over class centers that are split over the devices which share the batch.

Each device keeps a contiguous range of centers. It gathers all embeddings and visits its classes,
or a sample of them (Partial FC), in blocks, twice: once for the sum of exponentials, and, when the
log-sum-exp of all classes is known, once more to form the block's gradient and move its moments.
Neither the B x C logits nor the gradient of the centers ever exists as a whole.

No maximum is subtracted before exp() where the others' cosines are at most 1: logits are then at
most `scale`, which with ln(C) stays far below 88, where float32 overflows (`validation.py` refuses
larger scales). Margins that go beyond, as CurricularFace, keep a running maximum. docs/head.md has
the formulas.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from arcface_jax.config import HeadConfig, OptimizerConfig
from arcface_jax.heads import block_passes, margins, partial_fc
from arcface_jax.heads import centers as class_centers
from arcface_jax.heads import softmax as softmax_loss
from arcface_jax.heads.block_passes import Visit
from arcface_jax.heads.blocks import EveryClass, ListedClasses, Walk
from arcface_jax.heads.centers import Moments, Rule
from arcface_jax.heads.margins import Margin, State
from arcface_jax.heads.softmax import Batch, Loss, Softmax
from arcface_jax.runtime.devices import AXIS

# A margin whose values stay below this times the scale needs no maximum in front of exp().
UNSHIFTED_BOUND = 1.0


class Centers(NamedTuple):
    """What the head keeps from step to step."""

    rows: jax.Array
    """(C_padded * subcenters, D) float32, split over the devices; not normalized."""
    moments: Moments
    """The optimizer's memory of each row, the same shape and placement."""
    state: State
    """The margin's memory, () float32 on every device."""


class HeadOutput(NamedTuple):
    """What one visit of the head gives."""

    loss: jax.Array
    """() float32: mean of -log softmax of the target, over the samples with a known class."""
    d_embeddings: jax.Array
    """(B, D) float32: gradient of the loss."""
    centers: Centers
    """After the update; as before where the loss is not finite."""
    metrics: dict[str, jax.Array]
    """() float32, means over the samples with a known class, by name:
    accuracy: share of targets whose cosine is the largest of all classes that took part, without
    margin; target_cosine; hardest_negative_cosine: the largest of another class; below_hardest and
    below_hardest_with_margin: share of targets below that, without and with margin;
    largest_cosine: of all, not a mean;
    invalid_labels: () int32, how many samples have no known class."""


def init_centers(
    key: jax.Array,
    *,
    num_classes: int,
    embedding_size: int,
    num_devices: int,
    head: HeadConfig,
    optimizer: OptimizerConfig,
) -> Centers:
    """Centers before the first step, each class's the same on any number of devices."""
    rows = class_centers.init(
        key,
        classes=class_centers.padded_classes(num_classes, num_devices),
        subcenters=head.subcenters,
        embedding_size=embedding_size,
    )
    names = class_centers.make_rule(optimizer).names
    state = margins.make(head).initial_state
    return Centers(
        rows,
        {name: jnp.zeros_like(rows) for name in names},
        {name: jnp.float32(value) for name, value in state.items()},
    )


def apply(
    embeddings: jax.Array,
    labels: jax.Array,
    centers: Centers,
    *,
    learning_rate: jax.Array,
    step: jax.Array,
    key: jax.Array,
    num_classes: int,
    head: HeadConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh,
) -> HeadOutput:
    """Loss, gradient of the embeddings, and one update of the centers.

    loss = mean_i [ log sum_j exp(s z_ij) - s z_iy ] over the classes j that take part, z_ij =
    cos(x_i, w_j), and z_iy = margin(cos(x_i, w_y)).

    Args:
      embeddings: (B, D) float32, not normalized, split over the devices.
      labels: (B,) int32. A label outside [0, num_classes) takes no part in loss and gradient.
      centers: what the head keeps.
      learning_rate: () float32.
      step: () int32, steps done before this one.
      key: of the step; which classes are drawn depends on it and the device.
      num_classes: C; classes behind it are padding.
      head: margin, scale, sampling, operand type, block size.
      optimizer: of the centers; its clip_norm is for the backbone alone.
      mesh: the devices.
    """
    shard = P(AXIS)
    placed = Centers._make((shard, shard, P()))
    # Not everything is known to be the same on all devices, for instance what was drawn.
    return jax.shard_map(
        partial(_on_one_device, num_classes=num_classes, head=head, optimizer=optimizer),
        mesh=mesh,
        in_specs=(shard, shard, placed, P(), P(), P()),
        out_specs=HeadOutput._make((P(), shard, placed, P())),
        check_vma=False,
    )(embeddings, labels, centers, learning_rate, step, key)


def _on_one_device(
    embeddings,
    labels,
    centers: Centers,
    learning_rate,
    step,
    key,
    *,
    num_classes: int,
    head: HeadConfig,
    optimizer: OptimizerConfig,
) -> HeadOutput:
    margin, rule = margins.make(head), class_centers.make_rule(optimizer)
    unit, norm = block_passes.normalize(embeddings)
    batch = _gather(unit, norm, labels, num_classes=num_classes, head=head, margin=margin)
    stored = len(centers.rows) // head.subcenters
    target = batch.labels - lax.axis_index(AXIS) * stored
    target = jnp.where(batch.valid & (target >= 0) & (target < stored), target, -1)
    walk, target_slot = _choose(target, key, stored=stored, num_classes=num_classes, head=head)
    visit = Visit(
        batch.x,
        centers.rows,
        walk,
        target_slot,
        head.subcenters,
        head.scale,
        negative_transform=None,
    )
    visit, softmax = _first_visit(visit, target, batch, centers.state, margin)
    loss = softmax_loss.evaluate(softmax, batch, margin, scale=head.scale)

    update = jnp.isfinite(loss.mean)  # nothing that is not a number gets into the centers
    d_x, centers = _second_visit(
        visit,
        centers,
        loss,
        update=update,
        factor=head.scale / batch.num_valid,
        rule=rule,
        learning_rate=learning_rate,
        step=step,
        touch_all=head.sample_rate == 1 or head.unsampled == "decayed",
    )
    state = jax.tree.map(partial(jnp.where, update), softmax.state, centers.state)
    d_unit = lax.psum_scatter(d_x, AXIS, scatter_dimension=0, tiled=True)
    d_embeddings = block_passes.normalize_vjp(d_unit, unit, norm)
    if margin.uses_norms:
        d_embeddings += _own_part(loss.d_norms, len(unit))[:, None] * unit
    return HeadOutput(
        loss.mean,
        d_embeddings,
        centers._replace(state=state),
        softmax_loss.metrics(softmax, loss, batch),
    )


def _gather(unit, norm, labels, *, num_classes: int, head: HeadConfig, margin: Margin) -> Batch:
    labels = lax.all_gather(labels, AXIS, tiled=True)
    valid = (labels >= 0) & (labels < num_classes)
    norms = jnp.ones(len(labels))
    if margin.uses_norms:
        norms = lax.all_gather(norm[:, 0], AXIS, tiled=True)
    return Batch(
        x=lax.all_gather(unit.astype(head.dtype), AXIS, tiled=True),
        norms=norms,
        labels=labels,
        valid=valid,
        num_valid=jnp.maximum(jnp.sum(valid), 1),
    )


def _choose(
    target, key, *, stored: int, num_classes: int, head: HeadConfig
) -> tuple[Walk, jax.Array]:
    """The classes of this device that take part, and the (B,) slots of the targets among them."""
    num_devices, device = lax.axis_size(AXIS), lax.axis_index(AXIS)
    used = jnp.asarray(partial_fc.classes_by_device(num_classes, num_devices))[device]
    if head.sample_rate == 1:
        return EveryClass(stored, used, head.block_size, head.subcenters), target
    wanted = partial_fc.sample_sizes(num_classes, num_devices, head.sample_rate)
    sample = partial_fc.draw(
        jax.random.fold_in(key, device),
        target,
        used=used,
        wanted=jnp.asarray(wanted)[device],
        stored=stored,
        slots=partial_fc.num_slots(stored, len(target), int(wanted.max())),
    )
    return ListedClasses(sample.listed, head.block_size, head.subcenters), sample.target_slot


def _first_visit(
    visit: Visit, target, batch: Batch, state: State, margin: Margin
) -> tuple[Visit, Softmax]:
    """The sum over the other classes, and the visit as its second time has to be."""
    z_target = block_passes.target_cosine(visit, target)
    if margin.negatives_need_target:
        z_target = lax.psum(z_target, AXIS)
        state = margin.update(state, z_target, batch.norms, batch.valid)
    negatives, known, moved = margin.negatives, z_target[:, None], state
    if negatives is not None:
        visit = visit._replace(negative_transform=lambda cosine: negatives(cosine, known, moved))
    shifted = margin.negatives_bound > UNSHIFTED_BOUND
    exp_sum, shift, hardest = block_passes.sum_over_others(visit, shifted=shifted)
    if shifted:
        local = shift
        shift, hardest = lax.pmax(jnp.stack([local, hardest]), AXIS)
        exp_sum *= jnp.exp(local - shift)
    else:
        hardest = lax.pmax(hardest, AXIS)
    if margin.negatives_need_target:
        exp_sum = lax.psum(exp_sum, AXIS)
    else:
        z_target, exp_sum = lax.psum(jnp.stack([z_target, exp_sum]), AXIS)
        state = margin.update(state, z_target, batch.norms, batch.valid)
    return visit, Softmax(z_target, jnp.log(exp_sum) + shift, hardest, state)


def _second_visit(
    visit: Visit,
    centers: Centers,
    loss: Loss,
    *,
    update,
    factor,
    rule: Rule,
    learning_rate,
    step,
    touch_all: bool,
) -> tuple[jax.Array, Centers]:
    """(B, D) this device's part of the gradient of the normalized embeddings; updated centers.

    Args:
      visit: what to look at.
      centers: before the update.
      loss: of the first visit.
      update: () bool, whether to change the centers and their moments at all.
      factor: () float32, s / number of samples that count.
      rule: the optimizer of the centers.
      learning_rate: () float32.
      step: () int32.
      touch_all: whether momentum and decay move the classes that are not visited too.
    """
    rows, moments = centers.rows, centers.moments
    # Not `where` on whole arrays at the end, which would keep the old ones alive.
    visit = visit._replace(walk=visit.walk.only_if(update))
    learning_rate = jnp.where(update, learning_rate, 0)
    if touch_all and isinstance(visit.walk, ListedClasses):
        moments = jax.tree.map(partial(jnp.where, update), rule.decay(moments, rows), moments)
        rule = rule._replace(decay=lambda moments, rows: moments)
    d_x, moments = block_passes.gradients(
        visit,
        moments,
        log_sum=loss.log_sum,
        d_target=loss.d_target,
        factor=factor,
        rule=rule,
    )
    # In a loop of its own, or in none: were centers and moments both written in one, XLA would
    # copy the shard.
    if touch_all:
        rows = rule.apply(rows, moments, learning_rate, step)
    else:
        rows = block_passes.move(visit, moments, rule=rule, learning_rate=learning_rate, step=step)
    return d_x, Centers(rows, moments, centers.state)


def _own_part(everywhere: jax.Array, size: int) -> jax.Array:
    """This device's (size,) of an array over all samples."""
    return lax.dynamic_slice_in_dim(everywhere, lax.axis_index(AXIS) * size, size)
