"""The learning-rate schedule, the backbone's optimizer, the loss scale and the weights' EMA.

The class centers follow the same rule inside the head, block by block (heads/centers.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arcface_jax import plugins
from arcface_jax.config import OptimizerConfig, ScheduleConfig
from arcface_jax.errors import ConfigError
from arcface_jax.heads import centers as class_centers
from arcface_jax.models import stacks
from arcface_jax.models.registry import Arrays

Schedule = Callable[[jax.Array], jax.Array]


def make_schedule(schedule: ScheduleConfig, *, base_rate: float, steps_per_epoch: int) -> Schedule:
    """Returns the learning rate of each optimizer step.

    Warm-up gives step k of w the rate base * k / w, so the first update has rate 0; arcface_torch's
    first update has the full base rate, a bug that is not reproduced here. Polynomial: base * (1 -
    (k - w) / (total - w)) ** power. Step: base * factor ** (decay epochs passed). Cosine: base * (1
    + cos(pi (k - w) / (total - w))) / 2.

    Args:
      schedule: the recipe's section.
      base_rate: rate for the whole global batch.
      steps_per_epoch: optimizer steps in an epoch.

    Returns:
      A function from the step, () int32 counted from 0, to the rate, () float32.

    Examples:
      >>> from arcface_jax.config import ScheduleConfig
      >>> rate = make_schedule(
      ...     ScheduleConfig(epochs=10, warmup_epochs=2), base_rate=0.1, steps_per_epoch=5
      ... )
      >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 50)]
      [0.0, 0.05, 0.1, 0.0]
    """
    total = schedule.epochs * steps_per_epoch
    warmup = schedule.warmup_steps or round(schedule.warmup_epochs * steps_per_epoch)
    if schedule.kind == "polynomial":
        after = optax.polynomial_schedule(base_rate, 0.0, schedule.power, max(total - warmup, 1))
    elif schedule.kind == "cosine":
        after = optax.cosine_decay_schedule(base_rate, max(total - warmup, 1))
    else:
        after = optax.piecewise_constant_schedule(
            base_rate,
            {
                epoch * steps_per_epoch - warmup: schedule.decay_factor
                for epoch in schedule.decay_epochs
                if epoch < schedule.epochs
            },
        )
    warm = optax.linear_schedule(0.0, base_rate, max(warmup, 1))
    joined = optax.join_schedules([warm, after], [warmup])
    return lambda step: jnp.asarray(joined(step), jnp.float32)


class Optimizer(NamedTuple):
    """One update rule for the backbone and for the class centers, both before the learning rate."""

    backbone: tuple[optax.GradientTransformation, ...]
    """Links of an `optax.chain` over the parameters by dotted name. Their output is multiplied by
    the learning rate and subtracted; their input is the clipped gradient."""
    centers: class_centers.Rule
    """The same, element by element, for a block of class centers."""
    elementwise: bool = False
    """Whether `backbone` also updates every element independently of the array it belongs to: GPUs
    then update many arrays at once, packed end to end."""


def make_optimizer(optimizer: OptimizerConfig) -> optax.GradientTransformation:
    """Clips the backbone's gradient, then apply the rule that `optimizer.kind` names.

    The result is multiplied by the learning rate and subtracted.

    Raises:
      ConfigError: the rule is neither built in nor importable, or is not an `Optimizer`.
    """
    rule = _load(optimizer)
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), *rule.backbone)


def is_elementwise(optimizer: OptimizerConfig) -> bool:
    """Returns whether the rule treats every element independently, as `Optimizer.elementwise`.

    Raises:
      ConfigError: as `make_optimizer`.
    """
    return _load(optimizer).elementwise


def _load(optimizer: OptimizerConfig) -> Optimizer:
    make = plugins.load(optimizer.kind, field="optimizer.kind", options=optimizer.options)
    made = make(optimizer)
    if not isinstance(made, Optimizer):
        raise ConfigError(
            f"optimizer.kind {optimizer.kind} returned {type(made).__name__}; expected "
            "arcface_jax.training.optim.Optimizer"
        )
    links: Any = made.backbone
    # A transformation is a tuple too, of functions.
    if not isinstance(links, (tuple, list)) or not all(
        isinstance(link, optax.GradientTransformation) for link in links
    ):
        raise ConfigError(
            f"optimizer.kind {optimizer.kind} has a backbone of type {type(links).__name__}; "
            "expected a tuple of optax.GradientTransformation"
        )
    if not isinstance(made.centers, class_centers.Rule):
        raise ConfigError(
            f"optimizer.kind {optimizer.kind} has centers of type {type(made.centers).__name__}; "
            "expected arcface_jax.heads.centers.Rule"
        )
    return made


def sgd(optimizer: OptimizerConfig) -> Optimizer:
    """Makes buf = momentum * buf + gradient + decay * parameter, undampened as
    `torch.optim.SGD`.
    """
    return Optimizer(
        (optax.add_decayed_weights(optimizer.weight_decay), optax.trace(optimizer.momentum)),
        class_centers.sgd_rule(optimizer),
        elementwise=True,
    )


def adamw(optimizer: OptimizerConfig) -> Optimizer:
    """Makes m / (sqrt(v) + epsilon) + decay * parameter, as `torch.optim.AdamW`.

    m and v are the bias-corrected running means of the gradient and of its square.
    """
    return Optimizer(
        (_adam(optimizer), optax.add_decayed_weights(optimizer.weight_decay)),
        class_centers.adamw_rule(optimizer),
        elementwise=True,
    )


def lars(optimizer: OptimizerConfig) -> Optimizer:
    """Makes SGD whose sum of gradient and decay is scaled to `trust` times the array's norm.

    Vectors (of BatchNorm, and biases) have neither decay nor scaling; the members of a stack have
    separate norms. The centers follow SGD.

    Source: You et al., "Large Batch Training of Convolutional Networks" (2017).
    """
    return Optimizer(
        (
            optax.add_decayed_weights(optimizer.weight_decay, mask=_matrices),
            _by_norm(optimizer.trust),
            optax.trace(optimizer.momentum),
        ),
        class_centers.sgd_rule(optimizer),
    )


def lamb(optimizer: OptimizerConfig) -> Optimizer:
    """Makes AdamW with its sum scaled to the array's norm; vectors and centers as plain AdamW.

    Source: You et al., "Large Batch Optimization for Deep Learning" (ICLR 2020).
    """
    return Optimizer(
        (
            _adam(optimizer),
            optax.add_decayed_weights(optimizer.weight_decay, mask=_matrices),
            _by_norm(1.0),
        ),
        class_centers.adamw_rule(optimizer),
    )


def _adam(optimizer: OptimizerConfig) -> optax.GradientTransformation:
    first, second = optimizer.betas
    return optax.scale_by_adam(b1=first, b2=second, eps=optimizer.epsilon)


def _by_norm(trust: float) -> optax.GradientTransformation:
    """Scales each matrix's update to `trust` times the matrix's norm."""
    ratio = optax.scale_by_trust_ratio(trust_coefficient=trust)

    def one(update: Any, param: Any) -> Any:
        return ratio.update(update, optax.EmptyState(), param)[0]

    def by_norm(updates: Any, params: Any) -> Any:
        scaled = dict(updates)
        for name, is_matrix in _matrices(params).items():
            if is_matrix:
                member = one
                for _ in range(stacks.leading_axes(name, params[name])):
                    member = jax.vmap(member)
                scaled[name] = member(updates[name], params[name])
        return scaled

    return optax.stateless(by_norm)


def _matrices(params: Any) -> dict[str, bool]:
    """Returns which arrays have more than one axis, excluding stack axes."""
    return {
        name: np.ndim(array) - stacks.leading_axes(name, array) > 1
        for name, array in params.items()
    }


def first_scale(optimizer: OptimizerConfig, dtype: str) -> Arrays:
    """Returns the initial loss scale and the steps since it changed, for float16; else nothing."""
    if dtype != "float16":
        return {}
    return {"factor": jnp.float32(optimizer.loss_scale), "steps": jnp.int32(0)}


def next_scale(scale: Arrays, finite: jax.Array, optimizer: OptimizerConfig) -> Arrays:
    """Halves the loss scale after an overflow, and doubles it after enough steps without one.

    (Micikevicius et al., "Mixed Precision Training", ICLR 2018.)
    """
    if not scale:
        return scale
    steps = jnp.where(finite, scale["steps"] + 1, 0)
    grows = steps >= optimizer.loss_scale_steps
    factor = scale["factor"] * jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
    return {"factor": jnp.clip(factor, 1.0, 2.0**24), "steps": jnp.where(grows, 0, steps)}


def update_ema(ema: Arrays, weights: Arrays, *, ema_decay: float, steps: jax.Array) -> Arrays:
    """Updates the running mean of the weights: ema_decay * ema + (1 - ema_decay) * weights.

    Early in a run the decay is only (1 + steps) / (10 + steps), so that the initial weights fade
    quickly.
    """
    steps = steps.astype(jnp.float32)
    share = 1 - jnp.minimum(ema_decay, (1 + steps) / (10 + steps))
    return {name: ema[name] + share * (weights[name] - ema[name]) for name in ema}
