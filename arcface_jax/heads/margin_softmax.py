"""Margin softmax over class centers that are sharded over the devices that share the batch.

Each device keeps a contiguous range of centers. It gathers all embeddings and passes twice over its
classes, or a sample of them (Partial FC), in blocks: first for the sum of exponentials and then,
with the log-sum-exp of all classes, to compute each block's gradient and update its moments.
Neither the B x C logits nor the gradient of the centers ever exists as a whole.

No maximum is subtracted before exp() if the others' cosines are at most 1: logits are then at most
`scale`, which with ln(C) stays far below 88, where float32 overflows (`validation.py` refuses
larger scales). Margins with larger values, such as CurricularFace, keep a running maximum.
docs/head.md has the formulas.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from arcface_jax.config import HeadConfig, OptimizerConfig
from arcface_jax.heads import automatic, block_passes, margins, partial_fc
from arcface_jax.heads import centers as class_centers
from arcface_jax.heads import softmax as softmax_loss
from arcface_jax.heads.block_forms import FORMS, Problem, Samples, normalize, normalize_vjp
from arcface_jax.heads.block_passes import Update, Visit
from arcface_jax.heads.blocks import EveryClass, ListedClasses, Walk
from arcface_jax.heads.centers import Moments
from arcface_jax.heads.margins import Margin, State
from arcface_jax.heads.softmax import Batch, Loss, Softmax
from arcface_jax.runtime.devices import AXIS, compute_capability

# Margins that give the other classes values of at most this need no maximum before exp().
UNSHIFTED_BOUND = 1.0


class Centers(NamedTuple):
    """State of the head between steps."""

    rows: jax.Array
    """(C_padded * subcenters, D) float32, sharded over the devices; not normalized."""
    moments: Moments
    """Optimizer state of each row, with the same shape and sharding."""
    state: State
    """State of the margin, () float32 on every device."""


class HeadOutput(NamedTuple):
    """Result of one step of the head."""

    loss: jax.Array
    """() float32: mean of -log softmax of the target, over the samples with a known class."""
    d_embeddings: jax.Array
    """(B, D) float32: gradient of the loss; NaN if the centers are unchanged, so that the backbone
    skips the step too."""
    centers: Centers
    """Centers after the update; unchanged if the loss or its gradient is not finite."""
    metrics: dict[str, jax.Array]
    """() float32, means over the samples with a known class, by name: accuracy: share of targets
    whose cosine is the largest of all classes in this step, without margin; target_cosine;
    hardest_negative_cosine: the largest of another class; below_hardest and
    below_hardest_with_margin: share of targets below that, without and with margin; largest_cosine:
    of all, not a mean; invalid_labels: () int32, how many samples have no known class."""


def needs_shift(margin: Margin) -> bool:
    """Returns whether the head has to subtract a running maximum before exp()."""
    return margin.negatives is not None and margin.negatives_bound > UNSHIFTED_BOUND


def init_centers(
    key: jax.Array,
    *,
    num_classes: int,
    embedding_size: int,
    num_devices: int,
    head: HeadConfig,
    optimizer: OptimizerConfig,
) -> Centers:
    """Makes the initial centers; each class's do not depend on the number of devices."""
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
    """Computes loss and gradient of the embeddings, and updates the centers.

    loss = mean_i [ log sum_j exp(s z_ij) - s z_iy ] over the classes j that take part, z_ij =
    cos(x_i, w_j), and z_iy = margin(cos(x_i, w_y)).

    Args:
      embeddings: (B, D) float32, not normalized, sharded over the devices.
      labels: (B,) int32. Labels outside [0, num_classes) are excluded from loss and gradient.
      centers: the head's state.
      learning_rate: () float32.
      step: () int32, steps done before this one.
      key: random key of the step; which classes are drawn depends on it and the device.
      num_classes: C; classes from C on are padding.
      head: margin, scale, sampling, operand type, block size and form.
      optimizer: optimizer of the centers; its clip_norm applies to the backbone only.
      mesh: the devices.
    """
    head = automatic.resolve(
        head,
        platform=mesh.devices.flat[0].platform,
        batch=len(embeddings),
        capability=compute_capability(mesh),
    )
    shard = P(AXIS)
    placed = Centers._make((shard, shard, P()))
    # Some values are not known to be equal on all devices, for example the sampled classes.
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
    margin = margins.make(head)
    unit, norm = normalize(embeddings)
    batch = _gather(unit, norm, labels, num_classes=num_classes, head=head, margin=margin)
    stored = len(centers.rows) // head.subcenters
    target = batch.labels - lax.axis_index(AXIS) * stored
    target = jnp.where(batch.valid & (target >= 0) & (target < stored), target, -1)
    walk, target_slot = _choose(target, key, stored=stored, num_classes=num_classes, head=head)
    visit = Visit(
        Samples(batch.x, target_slot.reshape(batch.x.shape[:2]), jnp.zeros(batch.x.shape[:2])),
        centers.rows,
        walk,
        Problem(head.subcenters, head.scale, negative_transform=None),
        FORMS[head.block_form],
    )
    visit, softmax = _first_visit(visit, target, batch, centers.state, margin)
    loss = softmax_loss.evaluate(softmax, batch, margin, scale=head.scale)

    # Keeps NaN and infinity out of the centers; a finite loss may have an infinite gradient.
    finite = jnp.isfinite(loss.mean) & jnp.all(jnp.isfinite(loss.d_target))
    d_unit, centers = _second_visit(
        visit,
        centers,
        loss,
        finite=finite,
        factor=head.scale / batch.num_valid,
        update=Update(class_centers.make_rule(optimizer), learning_rate, step),
        touch_all=head.sample_rate == 1 or head.unsampled == "decayed",
        reduce=partial(_reduce, dtype=head.reduce_dtype),
    )
    state = jax.tree.map(partial(jnp.where, finite), softmax.state, centers.state)
    d_embeddings = normalize_vjp(d_unit, unit, norm)
    if margin.uses_norms:
        d_norms = _own_part(loss.d_norms.reshape(batch.x.shape[:2]), len(unit))
        d_embeddings += d_norms[:, None] * unit
    return HeadOutput(
        loss.mean,
        jnp.where(finite, d_embeddings, jnp.nan),  # no block was visited: it would be zero
        centers._replace(state=state),
        softmax_loss.metrics(softmax, loss, batch),
    )


def _gather(unit, norm, labels, *, num_classes: int, head: HeadConfig, margin: Margin) -> Batch:
    """Gathers the samples of all devices, in tiles with equally many from each device."""
    devices = lax.axis_size(AXIS)
    tiles = automatic.tiles(head, batch=len(unit) * devices, devices=devices)

    def gather(array):
        parts = array.reshape(tiles, -1, *array.shape[1:])
        return block_passes.map_tiles(partial(lax.all_gather, axis_name=AXIS, tiled=True), parts)

    labels = gather(labels).reshape(-1)
    valid = (labels >= 0) & (labels < num_classes)
    return Batch(
        x=gather(unit.astype(head.dtype)),
        norms=gather(norm[:, 0]).reshape(-1) if margin.uses_norms else jnp.ones(len(labels)),
        labels=labels,
        valid=valid,
        num_valid=jnp.maximum(jnp.sum(valid), 1),
    )


def _reduce(d_x: jax.Array, *, dtype: str) -> jax.Array:
    """Sums (t, D) float32 over the devices, to (t / N, D) for this device's samples."""
    total = lax.psum_scatter(d_x.astype(dtype), AXIS, scatter_dimension=0, tiled=True)
    return total.astype(jnp.float32)


def _choose(
    target, key, *, stored: int, num_classes: int, head: HeadConfig
) -> tuple[Walk, jax.Array]:
    """Returns this device's classes of the step, and the (B,) slots of the targets among them."""
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
    """Runs the first pass over the other classes; also returns the inputs of the second."""
    z_target = block_passes.target_cosine(visit, target)
    target_first = _target_first(margin)
    if target_first:
        z_target = lax.psum(z_target, AXIS)
        state = margin.update(state, z_target, batch.norms, batch.valid)
    negatives, moved = margin.negatives, state
    if negatives is not None:
        own = z_target.reshape(batch.x.shape[:2])
        visit = visit._replace(
            samples=visit.samples._replace(own_cosine=own),
            problem=visit.problem._replace(
                negative_transform=lambda cosine, own: negatives(cosine, own, moved)
            ),
        )
    shifted = needs_shift(margin)
    exp_sum, hardest, local = block_passes.sum_over_others(visit, shifted=shifted)
    shift = 0.0
    if local is not None:
        shift, hardest = lax.pmax(jnp.stack([local, hardest]), AXIS)
        exp_sum *= jnp.exp(local - shift)
    else:
        hardest = lax.pmax(hardest, AXIS)
    if target_first:
        exp_sum = lax.psum(exp_sum, AXIS)
    else:
        z_target, exp_sum = lax.psum(jnp.stack([z_target, exp_sum]), AXIS)
        state = margin.update(state, z_target, batch.norms, batch.valid)
    return visit, Softmax(z_target, jnp.log(exp_sum) + shift, hardest, state)


def _target_first(margin: Margin) -> bool:
    """Returns whether `negatives` needs the target cosines, or the state that they update."""
    uses_state = margin.negatives_need_state and bool(margin.initial_state)
    return margin.negatives_need_target or (margin.negatives is not None and uses_state)


def _second_visit(
    visit: Visit,
    centers: Centers,
    loss: Loss,
    *,
    finite,
    factor,
    update: Update,
    touch_all: bool,
    reduce: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, Centers]:
    """Returns (B / N, D) gradient of this device's normalized embeddings, and updated centers.

    Args:
      visit: the inputs.
      centers: before the update.
      loss: loss of the first visit.
      finite: () bool, whether to change the centers and their moments at all.
      factor: () float32, s / number of samples that count.
      update: the optimizer of the centers.
      touch_all: whether momentum and decay also apply to classes that are not visited.
      reduce: see `block_passes.gradients`.
    """
    rows, moments, rule = centers.rows, centers.moments, update.rule
    # Not `where` on whole arrays at the end, which would keep the old arrays alive.
    visit = visit._replace(walk=visit.walk.only_if(finite))
    update = update._replace(learning_rate=jnp.where(finite, update.learning_rate, 0))
    every = isinstance(visit.walk, EveryClass)
    if touch_all and not every:
        moments = jax.tree.map(partial(jnp.where, finite), rule.decay(moments, rows), moments)
        rule = rule._replace(decay=lambda moments, rows: moments)
        update = update._replace(rule=rule)
    move_centers = visit.form.moves_centers and every
    d_unit, moments, rows = block_passes.gradients(
        visit,
        moments,
        log_sum=loss.log_sum,
        d_target=loss.d_target,
        factor=factor,
        update=update,
        move_centers=move_centers,
        reduce=reduce,
    )
    # In a separate loop, or in none: if one loop wrote both centers and moments, XLA would copy the
    # shard, except in forms that read the centers only once.
    if touch_all and not move_centers:
        rows = rule.apply(rows, moments, update.learning_rate, update.step)
    elif not move_centers:
        rows = block_passes.move(visit, moments, update)
    return d_unit, Centers(rows, moments, centers.state)


def _own_part(everywhere: jax.Array, size: int) -> jax.Array:
    """Returns this device's (size,) part of an array (T, t) over all samples."""
    parts = everywhere.reshape(len(everywhere), lax.axis_size(AXIS), -1)
    return lax.dynamic_index_in_dim(parts, lax.axis_index(AXIS), axis=1).reshape(size)
