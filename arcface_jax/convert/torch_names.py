"""Map names and axes of arrays between this project and torch projects, with a table for each.

insightface's names are the common form: a foreign style is renamed to them when it is read.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from arcface_jax.models import stacks
from arcface_jax.models.registry import Arrays

# Last components that torch names otherwise. A kernel's axes are transposed too, by `turn`.
_LAST_WORD = {
    "kernel": "weight",
    "scale": "weight",
    "slope": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
# torch's BatchNorm counts its batches; the counter is not used if momentum is set.
COUNTER = "num_batches_tracked"

T = TypeVar("T")


def torch_arrays(arrays: Arrays) -> dict[str, np.ndarray]:
    """Returns views by insightface's names, with torch's order of axes."""
    single = stacks.unstack(arrays)
    return {torch_name(name): turn(array, inverse=False) for name, array in single.items()}


def torch_name(name: str) -> str:
    """Returns insightface's name of an array that is not part of a stack."""
    stem, dot, last = name.rpartition(".")
    return f"{stem}{dot}{_LAST_WORD.get(last, last)}"


def turn(array: np.ndarray, *, inverse: bool) -> np.ndarray:
    """Permutes kernels: (H, W, in, out) to torch's (out, in, H, W), and (in, out) to (out, in)."""
    if array.ndim == 4:
        return array.transpose((2, 3, 1, 0) if inverse else (3, 2, 0, 1))
    return array.T if array.ndim == 2 else array


def counters(names: Mapping[str, object]) -> set[str]:
    """Returns the batch counters that belong to the BatchNorms among the names."""
    stems = (n.removesuffix("running_var") for n in names if n.endswith(".running_var"))
    return {f"{stem}{COUNTER}" for stem in stems}


# AdaFace's and CVLface's IR networks: one list of blocks, `body`, and numbered layers.
_ADAFACE = {
    "input_layer.0": "conv1",
    "input_layer.1": "bn1",
    "input_layer.2": "prelu",
    "output_layer.0": "bn2",
    "output_layer.3": "fc",
    "output_layer.4": "features",
}
_ADAFACE_BLOCK = {
    "res_layer.0": "bn1",
    "res_layer.1": "conv1",
    "res_layer.2": "bn2",
    "res_layer.3": "prelu",
    "res_layer.4": "conv2",
    "res_layer.5": "bn3",
    "shortcut_layer.0": "downsample.0",
    "shortcut_layer.1": "downsample.1",
}
_BLOCK = re.compile(r"(.*?)body\.(\d{1,4})\.((?:res|shortcut)_layer\.\d)\.(\w+)")
_OUTER = re.compile(r"(.*?)((?:in|out)put_layer\.\d)\.(\w+)")


class Renamed(NamedTuple):
    """A state dict of AdaFace's style, renamed to insightface's names."""

    entries: dict[str, Any]
    prefix: str
    """Prefix of the names of the backbone."""


def from_adaface(entries: Mapping[str, Any]) -> Renamed | None:
    """Renames the arrays of an IR network of AdaFace or CVLface.

    A stage starts where the number of channels changes. Names outside the network are kept.

    Args:
      entries: objects with a `shape`, by name.

    Returns:
      None for another style.
    """
    kernels = {
        (found[1], int(found[2])): tuple(entry.shape)
        for name, entry in entries.items()
        if (found := _BLOCK.fullmatch(name)) and hasattr(entry, "shape")
        if (found[3], found[4]) == ("res_layer.1", "weight") and len(entry.shape) == 4
    }
    if not kernels:
        return None
    prefix = min(kernels)[0]
    places, stage, block, width = {}, 0, 0, 0
    for (before, number), shape in sorted(kernels.items()):
        if before == prefix:
            stage, block = (stage, block + 1) if shape[0] == width else (stage + 1, 0)
            width = shape[0]
            places[number] = f"layer{stage}.{block}"
    return Renamed({_from_adaface(name, prefix, places): e for name, e in entries.items()}, prefix)


def _from_adaface(name: str, prefix: str, places: dict[int, str]) -> str:
    block, outer = _BLOCK.fullmatch(name), _OUTER.fullmatch(name)
    if block and block[1] == prefix and int(block[2]) in places and block[3] in _ADAFACE_BLOCK:
        return f"{prefix}{places[int(block[2])]}.{_ADAFACE_BLOCK[block[3]]}.{block[4]}"
    if outer and outer[1] == prefix and outer[2] in _ADAFACE:
        return f"{prefix}{_ADAFACE[outer[2]]}.{outer[3]}"
    return name
