"""The learning-rate schedule, and the backbone's optimizer: SGD or AdamW as torch defines them.

The class centers follow the same rule inside the head, block by block (heads/centers.py).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from arcface_jax.config import OptimizerConfig, ScheduleConfig

Schedule = Callable[[jax.Array], jax.Array]


def make_schedule(schedule: ScheduleConfig, *, base_rate: float, steps_per_epoch: int) -> Schedule:
    """The learning rate of each optimizer step.

    Warm-up gives step k of w the rate base * k / w, so the first update has rate 0 / w;
    arcface_torch gives its very first update the full base rate, an accident that is not repeated.
    Polynomial: base * (1 - (k - w) / (total - w)) ** power. Step: base * factor ** (decay epochs
    behind).

    Args:
      schedule: the recipe's section.
      base_rate: rate for the whole global batch.
      steps_per_epoch: optimizer steps.

    Returns:
      A function from the step, () int32 beginning with 0, to the rate, () float32.
    """
    total = schedule.epochs * steps_per_epoch
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if schedule.kind == "polynomial":
        after = optax.polynomial_schedule(base_rate, 0.0, schedule.power, max(total - warmup, 1))
    else:
        after = optax.piecewise_constant_schedule(
            base_rate,
            {
                epoch * steps_per_epoch - warmup: schedule.decay_factor
                for epoch in schedule.decay_epochs
            },
        )
    warm = optax.linear_schedule(0.0, base_rate, max(warmup, 1))
    joined = optax.join_schedules([warm, after], [warmup])
    return lambda step: jnp.asarray(joined(step), jnp.float32)


def make_optimizer(optimizer: OptimizerConfig) -> optax.GradientTransformation:
    """Clips the gradient and turns it into what is subtracted, times the rate.

    sgd: buf = momentum * buf + clipped gradient + decay * parameter, as `torch.optim.SGD` without
    dampening. adamw: m / (sqrt(v) + epsilon) + decay * parameter with the bias-corrected means m
    and v, as `torch.optim.AdamW`.
    """
    decay = optax.add_decayed_weights(optimizer.weight_decay)
    if optimizer.kind == "sgd":
        rule = [decay, optax.trace(decay=optimizer.momentum)]
    else:
        first, second = optimizer.betas
        rule = [optax.scale_by_adam(b1=first, b2=second, eps=optimizer.epsilon), decay]
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), *rule)
