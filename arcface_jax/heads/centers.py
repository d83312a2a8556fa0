"""The class centers' rows: how many there are, their first values, and their optimizer.

The optimizer is written in parts, because the head applies it to a block of rows at a time and must
not hold a second copy of them: `decay` and `accumulate` change a block's moments, `apply` the
centers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from arcface_jax import plugins
from arcface_jax.config import OptimizerConfig

INIT_STD = 0.01

Moments = dict[str, jax.Array]
"""What the optimizer remembers of each row, (rows, D) float32 by name."""


def padded_classes(num_classes: int, num_devices: int) -> int:
    """Classes to store: those there are, and as many unused ones as make the shards equal."""
    return -(-num_classes // num_devices) * num_devices


def init(key: jax.Array, *, classes: int, subcenters: int, embedding_size: int) -> jax.Array:
    """Returns (classes * subcenters, D) float32, normal(0, 0.01), insightface's initialization.

    Class c has the rows c * subcenters .. (c + 1) * subcenters - 1. A row's values do not depend
    on how many rows follow it, and so not on the number of devices.
    """
    return INIT_STD * jax.random.normal(key, (classes * subcenters, embedding_size), jnp.float32)


class Rule(NamedTuple):
    """An optimizer; every part is element by element."""

    names: tuple[str, ...]
    """The moments that it keeps."""
    decay: Callable[[Moments, jax.Array], Moments]
    """(moments, centers) -> moments, as a gradient of zero would leave them."""
    accumulate: Callable[[Moments, jax.Array], Moments]
    """(decayed moments, gradient) -> moments."""
    apply: Callable[[jax.Array, Moments, jax.Array, jax.Array], jax.Array]
    """(centers, moments, learning rate (), steps done before this one ()) -> centers."""


def make_rule(optimizer: OptimizerConfig) -> Rule:
    """Makes the centers' part of the optimizer that a configuration names, `optimizer.kind`.

    Raises:
      ConfigError: it is neither built in nor importable.
    """
    make = plugins.load(optimizer.kind, field="optimizer.kind", options=optimizer.options)
    return make(optimizer).centers


def sgd_rule(optimizer: OptimizerConfig) -> Rule:
    """SGD with momentum and weight decay, as `torch.optim.SGD` without dampening."""

    def decay(moments: Moments, centers: jax.Array) -> Moments:
        kept = optimizer.momentum * moments["momentum"]
        return {"momentum": kept + optimizer.weight_decay * centers}

    def accumulate(moments: Moments, gradient: jax.Array) -> Moments:
        return {"momentum": moments["momentum"] + gradient}

    def apply(centers, moments: Moments, rate, steps) -> jax.Array:
        return centers - rate * moments["momentum"]

    return Rule(("momentum",), decay, accumulate, apply)


def adamw_rule(optimizer: OptimizerConfig) -> Rule:
    """AdamW, as `torch.optim.AdamW`."""
    first, second = optimizer.betas

    def decay(moments: Moments, centers: jax.Array) -> Moments:
        return {"mean": first * moments["mean"], "square": second * moments["square"]}

    def accumulate(moments: Moments, gradient: jax.Array) -> Moments:
        return {
            "mean": moments["mean"] + (1 - first) * gradient,
            "square": moments["square"] + (1 - second) * jnp.square(gradient),
        }

    def apply(centers, moments: Moments, rate, steps) -> jax.Array:
        mean = moments["mean"] / _share_seen(first, steps)
        square = moments["square"] / _share_seen(second, steps)
        direction = mean / (jnp.sqrt(square) + optimizer.epsilon)
        return centers - rate * (direction + optimizer.weight_decay * centers)

    return Rule(("mean", "square"), decay, accumulate, apply)


def _share_seen(beta: float, steps: jax.Array) -> jax.Array:
    """() float32 1 - beta^(steps + 1); as a difference, float32 would have it wrong by 5e-5."""
    return -jnp.expm1((steps + 1).astype(jnp.float32) * math.log(max(beta, 1e-30)))
