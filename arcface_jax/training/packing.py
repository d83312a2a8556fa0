"""Pack the backbone's many small arrays into a few buffers, for the train step on GPUs.

An IResNet has hundreds of arrays, most of them smaller than what a GPU reads during a kernel
launch. With packing, the optimizer, the gradient's norm and the check that it is finite take a
kernel or two per buffer, and each buffer's gradient is summed over the devices as soon as the
backward pass has computed it. Only the train step uses buffers: checkpoints, evaluation and reports
use named arrays, which `Packing.unpack` returns.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from arcface_jax.models import stacks
from arcface_jax.models.registry import Arrays, Backbone

FEW = 40
"""A backbone with fewer arrays, such as a ViT of stacks, gains nothing and uses more memory."""
# Most bytes of a buffer: enough for an all-reduce at full speed, and few enough that the first
# buffers are summed while the backward pass computes the others.
_BUFFER = 28 * 2**20
# Most kernels (of convolutions) in a buffer: XLA concatenates this many at once.
_MEMBERS = 32
# By number of axes without a stack's own: matrices are in the last layers, vectors in all layers.
_ORDER = {2: 0, 4: 1, 1: 2}
_Tree = TypeVar("_Tree")
_Value = TypeVar("_Value")


class Buffer(NamedTuple):
    """Arrays packed into one flat array, or a single array with its own name and shape."""

    name: str
    members: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape of each, in order."""

    @property
    def is_flat(self) -> bool:
        """Whether its members are packed end to end."""
        return self.name != self.members[0][0]


Layout = tuple[Buffer, ...]


def plan(
    shapes: Arrays, groups: Mapping[str, Any], *, unrolled: bool, prefix: str = "packed"
) -> Layout:
    """Assigns arrays to buffers.

    Vectors and the kernels of convolutions, of which a network has hundreds, share buffers; the
    last layers, whose gradients are ready first, get the first buffers. Stacks of these share
    buffers too if their layers are applied one by one: each layer's gradient is then a piece of the
    buffer. As a separate array, a stack of kernels has its gradient transposed in the kernel that
    updates it, which therefore cannot update in place: XLA copies the new stacks back. Matrices,
    and stacks that a loop iterates over, are not packed.

    Args:
      shapes: the arrays, or something with their shapes, by dotted name.
      groups: a value for each name; only arrays with equal values may share a buffer.
      unrolled: whether the layers of stacks are applied one by one.
      prefix: what the names of buffers start with; different in each layout of a `Packing`.
    """
    open_buffers: dict[Any, list[str]] = {}
    found: list[list[str]] = []
    leads = {name: stacks.leading_axes(name, array) for name, array in shapes.items()}
    by_readiness = sorted(shapes, key=_depth, reverse=True)
    for name in sorted(
        by_readiness, key=lambda name: _ORDER.get(shapes[name].ndim - leads[name], 1)
    ):
        array, lead = shapes[name], leads[name]
        axes = array.ndim - lead
        if axes not in (1, 4) or (lead and not unrolled):
            found.append([name])
            continue
        kind = (groups[name], axes)
        members = open_buffers.get(kind)
        size = sum(_bytes(shapes[member]) for member in members or ())
        pieces = sum(_layers(member, shapes[member]) for member in (*(members or ()), name))
        full = axes == 4 and pieces > _MEMBERS
        if members is None or full or size + _bytes(array) > _BUFFER:
            members = open_buffers[kind] = []
            found.append(members)
        members.append(name)

    def stays(members: list[str]) -> bool:
        return len(members) == 1 and not (unrolled and leads[members[0]])

    return tuple(
        Buffer(
            members[0] if stays(members) else f"{prefix}.{number}",
            tuple((name, tuple(shapes[name].shape)) for name in members),
        )
        for number, members in enumerate(found)
    )


def separate(shapes: Arrays) -> Layout:
    """Returns the layout without packing."""
    return tuple(Buffer(name, ((name, tuple(a.shape)),)) for name, a in shapes.items())


def _depth(name: str) -> list[tuple[int, str]]:
    """Sort key: compares numbers in a name by value, so that block 10 follows block 9."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D+)(\d*)", "." + name)]


def _layers(name: str, array: Any) -> int:
    return math.prod(array.shape[: stacks.leading_axes(name, array)])


def _bytes(array: Any) -> int:
    return 4 * math.prod(array.shape)


def pack(layout: Layout, arrays: Arrays) -> Arrays:
    """Packs arrays into buffers by name; buffers of missing arrays are left out."""
    return {
        buffer.name: (
            jnp.concatenate([_flat(arrays[name]) for name, _ in buffer.members])
            if buffer.is_flat
            else arrays[buffer.name]
        )
        for buffer in layout
        if buffer.members[0][0] in arrays
    }


def unpack(layout: Layout, packed: Arrays) -> Arrays:
    """Unpacks buffers; the gradient of a buffer is its members' gradients, packed."""
    arrays: Arrays = {}
    for buffer in layout:
        if buffer.name not in packed:
            continue
        if not buffer.is_flat:
            arrays[buffer.name] = packed[buffer.name]
            continue
        sizes = [math.prod(shape) for _, shape in buffer.members]
        parts = lax.split(packed[buffer.name], sizes)
        for (name, shape), part in zip(buffer.members, parts, strict=True):
            arrays[name] = _shaped(part, shape)
    return arrays


def _flat(array: Any) -> jax.Array:
    # Kernels of convolutions have the output channels first, as cuDNN reads them.
    return (jnp.moveaxis(array, -1, -4) if array.ndim >= 4 else array).reshape(-1)


def _shaped(flat: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if len(shape) < 4:
        return flat.reshape(shape)
    *lead, height, width, inputs, outputs = shape
    return jnp.moveaxis(flat.reshape(*lead, outputs, height, width, inputs), -4, -1)


class Packing(NamedTuple):
    """How a run's train step stores the parameters and BatchNorm's statistics."""

    params: Layout
    batch_stats: Layout

    @property
    def packs(self) -> bool:
        """Whether any arrays share a buffer."""
        return any(buffer.is_flat for layout in self for buffer in layout)

    def backbone(self, network: Backbone) -> Backbone:
        """Returns the network as functions of buffers."""

        def apply(params, batch_stats, images, *, train: bool, keys=None):
            named = unpack(self.params, params), unpack(self.batch_stats, batch_stats)
            embeddings, moved = network.apply(*named, images, train=train, keys=keys)
            return embeddings, pack(self.batch_stats, moved) if train else batch_stats

        return network._replace(apply=apply)

    def holds(self, params: Arrays) -> bool:
        """Returns whether the parameters are packed."""
        return params.keys() == {buffer.name for buffer in self.params}

    def pack(self, tree: _Tree) -> _Tree:
        """Packs a state, or part of one; packed parts are returned unchanged.

        Every dict of the backbone's arrays becomes a dict of buffers: the parameters, and their
        counterparts in the optimizer and in the running means.
        """
        return self._change(tree, pack, lambda buffer: [member for member, _ in buffer.members])

    def unpack(self, tree: _Tree) -> _Tree:
        """Unpacks a state, or part of one, to arrays by dotted name."""
        return self._change(tree, unpack, lambda buffer: [buffer.name])

    def _change(
        self,
        tree: _Tree,
        change: Callable[[Layout, Arrays], Arrays],
        names: Callable[[Buffer], list[str]],
    ) -> _Tree:
        for layout in self:
            known = {name for buffer in layout for name in names(buffer)}
            shared = {name for buffer in layout if buffer.is_flat for name in names(buffer)}

            def is_part(x: Any, known=known, shared=shared) -> bool:
                return isinstance(x, dict) and x.keys() <= known and not shared.isdisjoint(x)

            def one(x: Any, layout=layout, is_part=is_part) -> Any:
                return _run(change, layout, x) if is_part(x) else x

            if shared:
                tree = jax.tree.map(one, tree, is_leaf=is_part)
        return tree


def _run(change: Callable[[Layout, Arrays], Arrays], layout: Layout, arrays: Arrays) -> Arrays:
    """Applies a change to arrays on the devices, or to shapes; keeps their placement."""
    first: Any = next(iter(arrays.values()))
    if not isinstance(first, jax.ShapeDtypeStruct):
        # Compiled once per layout: `change` and `layout` are the same objects at every call.
        return jax.jit(change, static_argnums=0)(layout, arrays)
    shapes = jax.eval_shape(partial(change, layout), arrays)
    return {name: x.update(sharding=first.sharding) for name, x in shapes.items()}


def by_buffer(layout: Layout, values: Mapping[str, _Value]) -> dict[str, _Value]:
    """Maps values of arrays by name to values of their buffers, for arrays that have a value."""
    firsts = {buffer.name: buffer.members[0][0] for buffer in layout}
    return {name: values[first] for name, first in firsts.items() if first in values}
