"""The table between arcface_jax's arrays and a torch `state_dict`."""

import re
from pathlib import Path

import numpy as np
import torch

from arcface_jax.convert import twins, weight_files
from arcface_jax.convert.weight_files import StateDict
from arcface_jax.errors import UserError
from arcface_jax.models import registry, stacks
from arcface_jax.models.registry import Arrays

# Our last word: torch's. A kernel's axes are turned too, see `_turn`.
_LAST_WORD = {
    "kernel": "weight",
    "scale": "weight",
    "slope": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "pos_embed": "pos_embed",
    "mask_token": "mask_token",
}
# torch's BatchNorm counts its batches; nothing reads the number where momentum is given.
_COUNTER = "num_batches_tracked"
_PREFIXES = re.compile(r"^((module|backbone|_orig_mod)\.)+")


def to_state_dict(params: Arrays, batch_stats: Arrays) -> StateDict:
    """Arrays by arcface_jax's names to float32 tensors by insightface's."""
    state = {}
    # Of NumPy's arrays the blocks of a stack are views.
    stacked: Arrays = {n: np.asarray(x) for n, x in (*params.items(), *batch_stats.items())}
    for name, array in _torch_arrays(stacked, {}).items():
        state[name] = torch.from_numpy(np.array(array, np.float32, order="C"))
        if name.endswith(".running_var"):
            state[f"{name.removesuffix('running_var')}{_COUNTER}"] = torch.tensor(0)
    return state


def _torch_arrays(params: Arrays, batch_stats: Arrays) -> dict[str, np.ndarray]:
    """By insightface's names, views with torch's order of axes."""
    alone = stacks.unstack({**params, **batch_stats})
    return {_torch_name(name): _turn(array, inverse=False) for name, array in alone.items()}


def from_state_dict(state: StateDict, network: str, *, source: str) -> tuple[Arrays, Arrays]:
    """The reverse, strict in both directions.

    Args:
      state: by insightface's names, with or without a leading `module.` or `backbone.`.
      network: a name in `arcface_jax.models.registry.NETWORKS`; the embedding size is that of `fc`.
      source: where the weights come from, for the error message.

    Returns:
      params, batch_stats: float32 NumPy arrays.

    Raises:
      UserError: naming every key that is missing, unexpected or has another shape.
    """
    twins.require(network)
    state = without_prefixes(state)
    embedding_size = registry.embedding_size(state) or 512
    params, batch_stats = registry.build(network, embedding_size=embedding_size).shapes
    known = _torch_arrays(params, batch_stats)
    counters = {
        f"{n.removesuffix('running_var')}{_COUNTER}" for n in known if n.endswith(".running_var")
    }
    problems = {
        "missing": [n for n in known if n not in state],
        "unexpected": [n for n in state if n not in known and n not in counters],
        "of another shape": [
            f"{n} {tuple(state[n].shape)} instead of {known[n].shape}"
            for n in known
            if n in state and tuple(state[n].shape) != known[n].shape
        ],
    }
    if any(problems.values()):
        raise UserError(
            f"{source} does not hold weights of {network}; name the network they belong to with "
            f"--network ({', '.join(registry.NETWORKS)})"
            + "".join(f"\n{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        )

    def array(name: str) -> np.ndarray:
        turned = _turn(state[_torch_name(name)].float().numpy(), inverse=True)
        return np.ascontiguousarray(turned)

    def arrays(like: Arrays) -> Arrays:
        return stacks.restack({name: array(name) for name in stacks.unstack(like)}, like)

    return arrays(params), arrays(batch_stats)


def without_prefixes(state: StateDict) -> StateDict:
    """The state dict by insightface's own names: without what wrapping modules put before them."""
    bare = {_PREFIXES.sub("", name): tensor for name, tensor in state.items()}
    if len(bare) < len(state):
        twice = [n for n in state if _PREFIXES.match(n) and _PREFIXES.sub("", n) in state]
        raise UserError(f"arrays of one name, with and without a prefix: {', '.join(twice)}")
    return bare


def load(path: Path, network: str) -> tuple[Arrays, Arrays]:
    """Reads a `backbone.pth`, a safetensors file, or the backbone in a checkpoint of arcface_torch.

    Raises:
      UserError: there is no such file, it is not one of these, or it is of another network.
    """
    return from_state_dict(weight_files.read(path), network, source=str(path))


def _torch_name(name: str) -> str:
    stem, dot, last = name.rpartition(".")
    return f"{stem}{dot}{_LAST_WORD[last]}"


def _turn(array: np.ndarray, *, inverse: bool) -> np.ndarray:
    """Kernels: (H, W, in, out) to torch's (out, in, H, W), and (in, out) to (out, in)."""
    if array.ndim == 4:
        return array.transpose((2, 3, 1, 0) if inverse else (3, 2, 0, 1))
    return array.T if array.ndim == 2 else array
