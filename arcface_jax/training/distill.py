"""Losses that pull the embeddings toward a teacher's, and the weight they have at each step.

They enter the step between head and backward pass, as a gradient of the embeddings that is added to
the head's. Micro-batching, float16 loss scaling and the sum over devices come later and need no
special treatment.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from arcface_jax.config import DistillConfig, ScheduleConfig
from arcface_jax.heads.block_forms import normalize
from arcface_jax.training.optim import Schedule

CENTERS = "centers"
"""The loss that adds no term: the head's loss, with the teacher's class means as centers."""


class Taught(NamedTuple):
    """The teacher's contribution to a step."""

    loss: jax.Array
    """() float32: the weighted sum of the losses."""
    d_embeddings: jax.Array
    """(B, D) float32: gradient of `loss`."""
    metrics: dict[str, jax.Array]
    """() float32 by name: `distill_loss`, weighted; `distill_weight`; `teacher_cosine`, the mean
    cosine between embedding and teacher."""


def make_weight(
    distill: DistillConfig, schedule: ScheduleConfig, *, steps_per_epoch: int
) -> Schedule:
    """Returns the weight of the teacher's losses at each step.

    Warm-up gives step k of w the weight weight * k / w. With decay it then falls from step w to the
    last one, linearly or as half a cosine, to zero.

    Args:
      distill: the recipe's section.
      schedule: the length of the run.
      steps_per_epoch: optimizer steps in an epoch.

    Returns:
      A function from the step, () int32 counted from 0, to the weight, () float32.
    """
    total = schedule.epochs * steps_per_epoch
    warmup = round(distill.warmup_epochs * steps_per_epoch)
    rest = max(total - warmup, 1)
    after = {
        "constant": optax.constant_schedule(distill.weight),
        "linear": optax.linear_schedule(distill.weight, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(distill.weight, rest),
    }[distill.decay]
    warm = optax.linear_schedule(0.0, distill.weight, max(warmup, 1))
    joined = optax.join_schedules([warm, after], [warmup])
    return lambda step: jnp.asarray(joined(step), jnp.float32)


def shown(teacher: jax.Array, mirrored: jax.Array | None) -> jax.Array:
    """Returns (B, D) float32: the teacher's embedding of each image as it is shown to the network.

    Args:
      teacher: (B, V, D): one view, or the image and its mirror image.
      mirrored: (B,) bool, which images are mirrored; None for none.
    """
    teacher = teacher.astype(jnp.float32)
    if teacher.shape[1] == 1 or mirrored is None:
        return teacher[:, 0]
    return jnp.where(mirrored[:, None], teacher[:, 1], teacher[:, 0])


def apply(
    embeddings: jax.Array, teacher: jax.Array, *, weight: jax.Array, distill: DistillConfig
) -> Taught:
    """Computes the teacher's losses of a batch, and their gradient.

    Images without a teacher embedding (a row of zeros) are excluded from all means.

    Args:
      embeddings: (B, D) float32, not normalized.
      teacher: (B, D) float32, of length 1 or zeros.
      weight: () float32.
      distill: the recipe's section, which names the losses.
    """
    known = (jnp.sum(jnp.square(teacher), axis=1) > 0).astype(jnp.float32)
    terms = {"cosine": _cosine, "relational": _relational}
    chosen = [terms[name] for name in distill.loss if name != CENTERS]

    def weighted(embeddings: jax.Array) -> jax.Array:
        x = unit(embeddings)
        zero = jnp.zeros((), jnp.float32)
        return weight * sum((term(x, unit(teacher), known) for term in chosen), start=zero)

    loss, gradient = jax.value_and_grad(weighted)(embeddings)
    metrics = {
        "distill_loss": loss,
        "distill_weight": weight,
        "teacher_cosine": 1 - _cosine(unit(embeddings), unit(teacher), known),
    }
    return Taught(loss, gradient, metrics)


def unit(x: jax.Array) -> jax.Array:
    """Scales (n, D) rows to length 1; rows of zeros stay zeros, with a finite gradient."""
    return normalize(x)[0]  # not by jnp.linalg.norm, whose gradient at zero is NaN


def _cosine(x: jax.Array, teacher: jax.Array, known: jax.Array) -> jax.Array:
    """Returns the mean of 1 - cos(x_i, t_i) over the rows with a teacher; unit vectors (B, D)."""
    distances = 1 - jnp.sum(x * teacher, axis=1)
    return jnp.sum(known * distances) / jnp.maximum(jnp.sum(known), 1)


def _relational(x: jax.Array, teacher: jax.Array, known: jax.Array) -> jax.Array:
    """Sums (cos(x_i, x_j) - cos(t_i, t_j))^2 / (2 n) over all pairs; unit vectors (B, D).

    The pairwise form of relational distillation (Park et al., "Relational Knowledge Distillation",
    CVPR 2019), with cosines. Both roles of an embedding have the same gradient, so one is held
    fixed and the other counted twice: each device then needs only the rows of its own images.
    """
    fixed = lax.stop_gradient(x)
    highest = lax.Precision.HIGHEST
    ours = jnp.matmul(x, fixed.T, precision=highest)
    theirs = jnp.matmul(teacher, teacher.T, precision=highest)
    squares = jnp.square(ours - theirs) * (known[:, None] * known[None, :])
    once = jnp.sum(squares) / jnp.maximum(jnp.sum(known), 1)
    return once - lax.stop_gradient(once) / 2  # half the value, the full gradient
