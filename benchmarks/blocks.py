"""The equal blocks of a large IResNet's third stage: scanned against unrolled."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arcface_jax.config import Dtype
from arcface_jax.machine import timing
from arcface_jax.models import stacks
from arcface_jax.models.iresnet import Block
from arcface_jax.models.layers import RandomInitializer

_SIZE, _CHANNELS = 14, 256
METHODS = ("unrolled", "scanned", "rematerialized")


class Measurement(NamedTuple):
    """Forward and backward pass of one block."""

    method: str
    seconds: float
    ratio: float
    """Ratio to the time of the same block without a scan."""


def measure(*, batch: int, blocks: int, dtype: Dtype, repeats: int) -> list[Measurement]:
    """Times the gradient of a stack's weights and input on one device, the methods in turn.

    Args:
      batch: images of 14 x 14 x 256, as in the third stage.
      blocks: number of blocks; the time is divided by it.
      dtype: compute type.
      repeats: timed runs of each method.

    Returns:
      A measurement for each of `METHODS`; rematerialized blocks run forward twice.
    """
    one: Any = partial(
        *(Block, _CHANNELS, _CHANNELS),
        stride=1,
        down_sample=False,
        bn_groups=1,
        dtype=jnp.dtype(dtype),
    )
    stack = stacks.make(one, (blocks,), RandomInitializer(0))
    graph, weights, statistics = nnx.split(stack, nnx.Param, nnx.BatchStat)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, _SIZE, _SIZE, _CHANNELS)), dtype)

    def run(weights: nnx.State, x: jax.Array, *, method: str) -> tuple[jax.Array, nnx.State]:
        if method == "unrolled":
            moved = []
            for number in range(blocks):
                own = jax.tree.map(lambda array, i=number: array[i], (weights, statistics))
                block: Any = nnx.merge(graph, *own)
                x = block(x, train=True)
                moved.append(nnx.state(block, nnx.BatchStat))
            return x.astype(jnp.float32).sum(), jax.tree.map(lambda *m: jnp.stack(m), *moved)
        # The map recreates the variables, so that they may change inside the gradient.
        module = nnx.merge(graph, weights, jax.tree.map(jnp.asarray, statistics))
        x = stacks.apply(
            module,
            x,
            lambda block, x, _: block(x, train=True),
            remat=method == "rematerialized",
        )
        return x.astype(jnp.float32).sum(), nnx.state(module, nnx.BatchStat)

    def runner(method: str):
        gradient = jax.jit(jax.grad(partial(run, method=method), (0, 1), has_aux=True))
        return lambda: gradient(weights, x)

    seconds = timing.in_turn({method: runner(method) for method in METHODS}, repeats=repeats)
    base = seconds["unrolled"]
    return [Measurement(m, seconds[m] / blocks, seconds[m] / base) for m in METHODS]
