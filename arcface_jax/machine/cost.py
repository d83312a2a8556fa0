"""Cost of a network: parameters, and multiply-accumulates of convolutions and products."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arcface_jax import plugins
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.models import registry


class Cost(NamedTuple):
    """Cost for one image."""

    parameters: int
    """Numbers in all weights, including a frozen scale, as insightface counts them."""
    macs: int
    """Multiply-accumulates of convolutions, linear layers and attention, in inference."""


def measure(network: str, *, embedding_size: int = 512, options: plugins.Options = ()) -> Cost:
    """Counts from shapes; nothing is initialized or run."""
    backbone = registry.build(network, embedding_size=embedding_size, options=options)
    params, batch_stats = backbone.shapes
    frozen = [array.size for name, array in batch_stats.items() if name.endswith(".scale")]
    image = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
    program = jax.make_jaxpr(lambda *given: backbone.apply(*given, train=False)[0])(
        params, batch_stats, image
    )
    return Cost(sum(a.size for a in params.values()) + sum(frozen), _macs(program.jaxpr))


def _macs(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = given["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = given["dimension_numbers"].rhs_spec[0]
            each = math.prod(kernel) // kernel[outputs]  # inputs of a group, times the window
            total += equation.outvars[0].aval.size * each
        repeats = given["length"] if name == "scan" else 1
        total += repeats * sum(map(_macs, _programs_in(given)))
    return total


def _programs_in(parameters: dict[str, Any]) -> Iterator[Any]:
    """Yields the programs that an equation calls: loop bodies, jitted and rematerialized
    functions.
    """
    for value in parameters.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            program = getattr(item, "jaxpr", item)
            if hasattr(program, "eqns"):
                yield program
