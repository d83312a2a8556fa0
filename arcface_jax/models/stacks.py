"""Many equal modules as one: their parameters stacked, their application a scan.

A stack of the modules first .. last has the name `first-last` where each of them would have its
number: `layer3.1-29.conv1.kernel` holds `layer3.1.conv1.kernel` .. `layer3.29.conv1.kernel` along
its leading axis, or, if its scan is nested, in order along its two leading axes.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from arcface_jax.models.layers import Initializer, ShapeInitializer

_RANGE = re.compile(r"(?:(?<=\.)|^)(\d+)-(\d+)(?=\.)")


class _Repeated:
    """Draws the arrays of many modules as if for one."""

    def __init__(self, lead: tuple[int, ...], init: Initializer):
        self._lead, self._init = lead, init

    def normal(self, shape: tuple[int, ...], *, std: float) -> np.ndarray:
        return self._init.normal((*self._lead, *shape), std=std)

    def uniform(self, shape: tuple[int, ...], *, bound: float) -> np.ndarray:
        return self._init.uniform((*self._lead, *shape), bound=bound)

    def rngs(self) -> nnx.Rngs:
        """Not for a stack: Flax's layers draw for one module only."""
        raise NotImplementedError("stacks.make needs modules that draw from `init` itself")


def make(build: Callable[..., nnx.Module], lead: tuple[int, ...], init: Initializer) -> nnx.Module:
    """Many modules as one whose parameters and statistics have leading axes.

    Args:
      build: makes one of them, given `init`; called twice, however many there are.
      lead: the leading axes, whose product is the number of modules; a single module has none.
      init: what the modules draw their weights from.
    """
    graph, one = nnx.split(build(init=ShapeInitializer()))
    many = nnx.state(build(init=_Repeated(lead, init)))

    def stacked(one: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        # What is not drawn, as a BatchNorm's scale of one, is the same in all modules.
        return np.broadcast_to(drawn, (*lead, *one.shape))

    return nnx.merge(graph, jax.tree.map(stacked, one, many))


def plan(first: int, count: int, *, nested: bool) -> list[tuple[int, tuple[int, ...]]]:
    """How `count` equal modules are stored: the first number and the leading axes of each stack.

    Nested, about the square root of their number are computed again together, and the rest, which
    fills no such group, is a stack of its own. A single module has no leading axis.
    """
    inner = math.isqrt(count) if nested else 1
    outer = count // inner if inner > 1 else 0
    stacks: list[tuple[int, tuple[int, ...]]] = [(first, (outer, inner))] if outer else []
    rest = count - outer * inner
    if rest:
        stacks.append((first + outer * inner, (rest,) if rest > 1 else ()))
    return stacks


def name(first: int, lead: tuple[int, ...]) -> str:
    """Of a stack, or of a single module."""
    return f"{first}-{first + math.prod(lead) - 1}" if lead else str(first)


def apply(
    stack: nnx.Module,
    x: jax.Array,
    one: Callable[[Any, jax.Array, Any], jax.Array],
    inputs: Any = None,
    *,
    axes: int = 1,
    remat: bool,
    unrolled: bool = False,
) -> jax.Array:
    """Applies the modules one after the other; their BatchNorm statistics move in the stack.

    Args:
      stack: of modules.
      x: what the first is given.
      one: (module, x, its slice of `inputs`) to what the next is given.
      inputs: arrays with the stack's leading axes.
      axes: how many leading axes there are.
      remat: whether the backward pass computes each module again instead of keeping its insides;
        with two axes each group of modules too.
      unrolled: whether to apply the modules of a stack with one axis without a loop.
    """
    graph, *arrays = nnx.split(stack, nnx.Param, nnx.BatchStat)

    def body(x, each):
        *arrays, given = each
        module = nnx.merge(graph, *arrays)
        return one(module, x, given), nnx.state(module, nnx.BatchStat)

    run = _unroll if unrolled else partial(_scan, axes=axes, remat=remat)
    x, moved = run(body, x, (*arrays, inputs))
    nnx.update(stack, moved)
    return x


_Body = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


def _scan(body: _Body, x: jax.Array, stacked: Any, *, axes: int, remat: bool):
    """What the last module returns, and the others' statistics, as a loop."""
    for _ in range(axes):
        if remat:
            body = jax.checkpoint(body, prevent_cse=False)  # a scan's body is merged with no other
        body = partial(lax.scan, body)
    return body(x, stacked)


def _unroll(body: _Body, x: jax.Array, stacked: Any):
    """The same without a loop, for a stack of one axis.

    The gradient of `lax.split` is one concatenation; of indexing it would be a sum of arrays as
    large as the stack.
    """
    arrays, tree = jax.tree.flatten(stacked)
    parts = zip(*(lax.split(array, [1] * len(array)) for array in arrays), strict=True)
    moved = []
    for each in parts:
        x, statistics = body(x, jax.tree.unflatten(tree, [lax.squeeze(part, [0]) for part in each]))
        moved.append(statistics)
    return x, jax.tree.map(lambda *each: jnp.stack(each), *moved)


def names_of_members(name: str) -> list[str] | None:
    """The names that the modules of a stack have one by one; None where the name has no stack."""
    found = _RANGE.search(name)
    if found is None:
        return None
    first, last = map(int, found.groups())
    before, after = name[: found.start()], name[found.end() :]
    return [f"{before}{number}{after}" for number in range(first, last + 1)]


def leading_axes(name: str, array: Any) -> int:
    """Returns how many axes of an array go over the modules of a stack: none, one, or two."""
    members = names_of_members(name)
    if members is None:
        return 0
    return 1 if array.shape[0] == len(members) else 2


def unstack(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the NumPy arrays of every module under its own name, as views."""
    unstacked = {}
    for name, given in arrays.items():
        array, members = np.asarray(given), names_of_members(name)
        if members is None:
            unstacked[name] = array
        else:
            flat = array.reshape(len(members), *array.shape[leading_axes(name, array) :])
            unstacked.update(zip(members, flat, strict=True))
    return unstacked


def restack(arrays: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters or statistics in the form of `like`: the same modules, stacked in another way.

    Args:
      arrays: by name, stacked in whichever way, or not at all.
      like: arrays, or their shapes, whose names and leading axes the result has.

    Raises:
      KeyError: a module of `like` is not among the arrays.
    """
    unstacked, stacked = unstack(arrays), {}
    for name, wanted in like.items():
        members = names_of_members(name)
        if members is None:
            stacked[name] = unstacked[name]
        else:
            # Not to the whole wanted shape: a mismatch after the leading axes has to show.
            each = np.stack([unstacked[member] for member in members])
            lead = 1 if wanted.shape[0] == len(members) else 2
            stacked[name] = each.reshape(*wanted.shape[:lead], *each.shape[1:])
    return stacked
