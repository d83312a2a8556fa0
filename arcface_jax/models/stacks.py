"""Represent many equal modules as one, with stacked parameters, applied by a scan.

A stack of the modules first .. last has the name `first-last` in place of their numbers:
`layer3.1-29.conv1.kernel` contains `layer3.1.conv1.kernel` .. `layer3.29.conv1.kernel` along its
leading axis, or, if its scan is nested, in order along its two leading axes.
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
        """Refuses, because Flax's own layers draw for a single module only."""
        raise NotImplementedError("stacks.make needs modules that draw from `init` itself")


def make(build: Callable[..., nnx.Module], lead: tuple[int, ...], init: Initializer) -> nnx.Module:
    """Makes many modules as one whose parameters and statistics have leading axes.

    Args:
      build: makes one of them, given `init`; called twice, whatever the number.
      lead: the leading axes, whose product is the number of modules; a single module has none.
      init: source of the modules' initial weights.
    """
    graph, one = nnx.split(build(init=ShapeInitializer()))
    many = nnx.state(build(init=_Repeated(lead, init)))

    def stacked(one: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        # Constants, such as a BatchNorm's scale of one, are the same in all modules.
        return np.broadcast_to(drawn, (*lead, *one.shape))

    return nnx.merge(graph, jax.tree.map(stacked, one, many))


def plan(first: int, count: int, *, nested: bool) -> list[tuple[int, tuple[int, ...]]]:
    """Plans the stacks of `count` equal modules: first number and leading axes of each.

    If nested, groups of about the square root of their number are recomputed together, and the
    remainder is a separate stack. A single module has no leading axis.
    """
    inner = math.isqrt(count) if nested else 1
    outer = count // inner if inner > 1 else 0
    stacks: list[tuple[int, tuple[int, ...]]] = [(first, (outer, inner))] if outer else []
    rest = count - outer * inner
    if rest:
        stacks.append((first + outer * inner, (rest,) if rest > 1 else ()))
    return stacks


def name(first: int, lead: tuple[int, ...]) -> str:
    """Returns the name of a stack, or of a single module."""
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
    """Applies the modules one after the other; updates their BatchNorm statistics in the stack.

    Args:
      stack: the stack of modules.
      x: input of the first module.
      one: maps (module, x, its slice of `inputs`) to the next module's input.
      inputs: arrays with the stack's leading axes.
      axes: number of leading axes.
      remat: whether the backward pass recomputes each module instead of storing its intermediate
        values; with two axes, also each group of modules.
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
    """Applies a stack as a loop: returns the last module's output, and the statistics."""
    for _ in range(axes):
        if remat:
            body = jax.checkpoint(body, prevent_cse=False)  # nothing merges a scan's body
        body = partial(lax.scan, body)
    return body(x, stacked)


def _unroll(body: _Body, x: jax.Array, stacked: Any):
    """Applies a stack of one axis without a loop.

    The gradient of `lax.split` is one concatenation; with indexing it would be a sum of arrays as
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
    """Returns the names of a stack's modules one by one; None if the name is not a stack's."""
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
    """Converts parameters or statistics to the stacking of `like`, with the same modules.

    Args:
      arrays: arrays by name, in any stacking, or none.
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
            # Not reshaped to the whole wanted shape, so that a mismatch after the leading axes
            # shows.
            each = np.stack([unstacked[member] for member in members])
            lead = leading_axes(name, wanted)
            stacked[name] = each.reshape(*wanted.shape[:lead], *each.shape[1:])
    return stacked
