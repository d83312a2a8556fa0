"""Many equal modules as one: their parameters stacked, their application a scan.

A stack of the modules first .. last has the name `first-last` where each of them would have its
number: `blocks.0-11.mlp.fc1.kernel` holds `blocks.0.mlp.fc1.kernel` .. `blocks.11. ...` along its
leading axis.
"""

import re
from collections.abc import Callable

import jax
from flax import nnx
from jax import lax

from arcface_jax.models.layers import Initializer

_RANGE = re.compile(r"(?:(?<=\.)|^)(\d+)-(\d+)(?=\.)")


def make(build: Callable[[], nnx.Module], count: int, init: Initializer) -> nnx.Module:
    """`count` modules as one whose parameters have a leading axis.

    Args:
      build: makes one of them; called once for each, so that their weights differ.
      count: how many.
      init: what the modules draw their weights from.
    """
    modules = [build() for _ in range(count)]
    graph, _ = nnx.split(modules[0])
    stacked = jax.tree.map(lambda *each: init.stack(each), *map(nnx.state, modules))
    return nnx.merge(graph, stacked)


def scan(
    stack: nnx.Module,
    x: jax.Array,
    inputs: jax.Array,
    *,
    remat: bool,
) -> jax.Array:
    """Applies the modules one behind the other.

    Args:
      stack: of modules without state that moves.
      x: what the first is given.
      inputs: (count, ...), a slice for each module as its second argument.
      remat: whether the backward pass computes each module again instead of keeping its insides.
    """
    graph, parameters = nnx.split(stack)

    def one(x, each):
        weights, given = each
        return nnx.merge(graph, weights)(x, given), None

    if remat:
        one = jax.checkpoint(one, prevent_cse=False)  # a scan's body is not merged with another
    return lax.scan(one, x, (parameters, inputs))[0]


def depth(name: str) -> int:
    """How many leading axes of a parameter are over the modules of a stack."""
    return len(_RANGE.findall(name))


def names_of_members(name: str) -> list[str] | None:
    """The names that the modules of a stack have one by one; None where the name has no stack."""
    found = _RANGE.search(name)
    if found is None:
        return None
    first, last = map(int, found.groups())
    before, after = name[: found.start()], name[found.end() :]
    return [f"{before}{number}{after}" for number in range(first, last + 1)]
