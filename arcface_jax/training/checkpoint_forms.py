"""Restore checkpoints whose blocks are stacked differently than in this version's networks."""

from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from arcface_jax.models import stacks
from arcface_jax.models.registry import Arrays

Backbone = dict[str, Arrays]
"""`params` and `batch_stats`; only names and shapes of their arrays are used."""


def stored(manager: ocp.CheckpointManager, number: int) -> Backbone:
    """Returns the names and shapes of the backbone in a checkpoint."""
    # The manager's own metadata is empty until it has saved or restored something.
    folder = manager.directory / str(number) / "backbone"
    metadata: Any = ocp.PyTreeCheckpointHandler().metadata(folder)
    return {part: dict(metadata[part]) for part in ("params", "batch_stats")}


def as_stored(tree: Any, backbone: Backbone, stored: Backbone) -> Any:
    """Returns the shapes of the arrays to restore, in their stored form.

    Args:
      tree: holds dicts with the names of `backbone`: itself, and the optimizer's moments.
      backbone: in the form of this version.
      stored: names and shapes in the checkpoint, from `stored`.
    """

    def shapes(arrays: Arrays, like: Arrays) -> dict[str, Any]:
        one: Any = next(iter(arrays.values()))  # all have the same type and devices
        return {
            name: jax.ShapeDtypeStruct(x.shape, one.dtype, sharding=one.sharding)
            for name, x in like.items()
        }

    return _change(tree, backbone, stored, shapes)


def as_wanted(tree: Any, stored: Backbone, backbone: Backbone) -> Any:
    """Converts restored arrays to the form of this version; the reverse of `as_stored`.

    Raises:
      KeyError: a part of the backbone is not stored.
    """

    def restacked(arrays: Arrays, like: Arrays) -> Arrays:
        one: Any = next(iter(arrays.values()))
        return jax.device_put(stacks.restack(arrays, like), one.sharding)

    return _change(tree, stored, backbone, restacked)


def _change(
    tree: Any, old: Backbone, new: Backbone, change: Callable[[Arrays, Arrays], Arrays]
) -> Any:
    """Converts each dict with the names of a part of `old` to one with the names of `new`."""
    for part, arrays in old.items():
        names = arrays.keys()
        if names == new[part].keys():
            continue

        def of_part(x: Any, names=names) -> bool:
            return isinstance(x, dict) and x.keys() == names

        tree = jax.tree.map(
            lambda x, like=new[part], of_part=of_part: change(x, like) if of_part(x) else x,
            tree,
            is_leaf=of_part,
        )
    return tree
