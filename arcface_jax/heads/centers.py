"""The class centers' rows: their number, initialization and optimizer.

The optimizer has separate parts, because the head applies it block by block without a second copy
of the rows: `decay` and `accumulate` update a block's moments, `apply` the centers.
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
"""Optimizer state of the rows, (rows, D) float32 by name."""


def padded_classes(num_classes: int, num_devices: int) -> int:
    """Returns the number of classes to store: padded to make the shards equal."""
    return -(-num_classes // num_devices) * num_devices


def init(key: jax.Array, *, classes: int, subcenters: int, embedding_size: int) -> jax.Array:
    """Returns (classes * subcenters, D) float32, normal(0, 0.01), insightface's initialization.

    Class c has the rows c * subcenters .. (c + 1) * subcenters - 1. A row's values do not depend on
    the number of rows, and so not on the number of devices.
    """
    return INIT_STD * jax.random.normal(key, (classes * subcenters, embedding_size), jnp.float32)


def of_directions(given: jax.Array, random: jax.Array) -> jax.Array:
    """Returns rows in given directions, with the norm of `init`'s rows, sqrt(D) * `INIT_STD`.

    Args:
      given: (rows, D) float32 vectors of any length.
      random: (rows, D) rows of `init`, which stay where the given one is zero.
    """
    length = INIT_STD * random.shape[1] ** 0.5
    norm = jnp.linalg.norm(given, axis=1, keepdims=True)
    return jnp.where(norm > 0, length * given / jnp.maximum(norm, 1e-12), random)


class Rule(NamedTuple):
    """An optimizer whose parts are all element by element."""

    names: tuple[str, ...]
    """Names of its moments."""
    decay: Callable[[Moments, jax.Array], Moments]
    """(moments, centers) -> moments after a step with a gradient of zero."""
    accumulate: Callable[[Moments, jax.Array], Moments]
    """(decayed moments, gradient) -> moments."""
    apply: Callable[[jax.Array, Moments, jax.Array, jax.Array], jax.Array]
    """(centers, moments, () learning rate, () number of steps done before) -> centers."""


def make_rule(optimizer: OptimizerConfig) -> Rule:
    """Makes the centers' part of the optimizer that a configuration names, `optimizer.kind`.

    Raises:
      ConfigError: it is neither built in nor importable.
    """
    make = plugins.load(optimizer.kind, field="optimizer.kind", options=optimizer.options)
    return make(optimizer).centers


def sgd_rule(optimizer: OptimizerConfig) -> Rule:
    """Makes SGD with momentum and weight decay, as `torch.optim.SGD` without dampening."""

    def decay(moments: Moments, centers: jax.Array) -> Moments:
        kept = optimizer.momentum * moments["momentum"]
        return {"momentum": kept + optimizer.weight_decay * centers}

    def accumulate(moments: Moments, gradient: jax.Array) -> Moments:
        return {"momentum": moments["momentum"] + gradient}

    def apply(centers, moments: Moments, rate, steps) -> jax.Array:
        return centers - rate * moments["momentum"]

    return Rule(("momentum",), decay, accumulate, apply)


def adamw_rule(optimizer: OptimizerConfig) -> Rule:
    """Makes AdamW, as `torch.optim.AdamW`."""
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
    """Returns () float32 1 - beta^(steps + 1); a plain difference would be wrong by 5e-5 in
    float32.
    """
    return -jnp.expm1((steps + 1).astype(jnp.float32) * math.log(max(beta, 1e-30)))
