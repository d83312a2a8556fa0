"""Convert between arcface_jax's arrays and torch's `state_dict`."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from arcface_jax.convert import state_dicts, torch_names, weight_files
from arcface_jax.convert.state_dicts import Where
from arcface_jax.convert.weight_files import StateDict
from arcface_jax.evaluation import model_input
from arcface_jax.evaluation.model_input import ColorOrder
from arcface_jax.models import registry, stacks
from arcface_jax.models.registry import Arrays
from arcface_jax.training.network import weights_digest


class Loaded(NamedTuple):
    """A backbone from a file."""

    network: str
    params: Arrays
    batch_stats: Arrays
    notes: tuple[str, ...]
    """How it was found in the file and what was ignored, one sentence each."""
    compatible_with: str = ""
    """`ModelInput.compatible_with` of a file with such a description; empty for others."""


def to_state_dict(params: Arrays, batch_stats: Arrays) -> StateDict:
    """Converts arrays by arcface_jax's names to float32 tensors by insightface's."""
    state = {}
    # The blocks of a stack are views of NumPy's arrays.
    stacked: Arrays = {n: np.asarray(x) for n, x in (*params.items(), *batch_stats.items())}
    for name, array in torch_names.torch_arrays(stacked).items():
        state[name] = torch.from_numpy(np.array(array, np.float32, order="C"))
        if name.endswith(".running_var"):
            state[f"{name.removesuffix('running_var')}{torch_names.COUNTER}"] = torch.tensor(0)
    return state


def from_state_dict(state: StateDict, network: str, *, source: str) -> tuple[Arrays, Arrays]:
    """Converts a state dict to arrays; every array of the network must be present.

    Args:
      state: tensors by insightface's or AdaFace's names, with any prefix; other parts, such as a
        head, are ignored.
      network: a name in `arcface_jax.models.registry.NETWORKS`, or a plug-in; the embedding size is
        read from the last layer.
      source: origin of the weights, for the error message.

    Returns:
      params, batch_stats: float32 NumPy arrays.

    Raises:
      UserError: with keys that are missing, unexpected or have another shape.
    """
    held = weight_files.in_memory(state)
    return arrays_of(state_dicts.find(held, Where(network=network), source=source))


def load(
    path: Path,
    network: str | None = None,
    *,
    prefix: str | None = None,
    key: str | None = None,
    color_order: ColorOrder | None = None,
) -> Loaded:
    """Reads the backbone in a file of torch or safetensors, in the form that this project trains.

    Args:
      path: the file; its format is detected by content.
      network: its network; by default detected by names and shapes.
      prefix: prefix of the backbone's names; by default detected.
      key: keys to the state dict, joined with dots; by default detected.
      color_order: channel order that the weights expect; by default their project's. BGR is turned
        to RGB in the first convolution.

    Raises:
      UserError: the file does not exist, is not a file of weights, or has no known network.
      DataError: the description in a safetensors file is damaged.
    """
    where = Where(network=network, prefix=prefix, key=key, color_order=color_order)
    contents = weight_files.contents(path)
    found = state_dicts.find(contents, where, source=str(path))
    loaded = Loaded(found.network, *arrays_of(found), found.notes)
    text = contents.metadata.get(model_input.METADATA_KEY)
    if text is None:
        return loaded
    described = model_input.from_json(text, source=str(path))
    if described.digest != weights_digest(loaded.network, loaded.params, loaded.batch_stats):
        return loaded  # the weights were changed after this project wrote the description
    return loaded._replace(compatible_with=described.compatible_with)


def arrays_of(found: state_dicts.Found) -> tuple[Arrays, Arrays]:
    """Returns a backbone's params and batch_stats as independent float32 NumPy arrays."""
    size = registry.embedding_size(found.state) or 512

    def array(name: str) -> np.ndarray:
        tensor = found.state[torch_names.torch_name(name)]
        return np.array(torch_names.turn(tensor.float().numpy(), inverse=True), order="C")

    def arrays(like: Arrays) -> Arrays:
        return stacks.restack({name: array(name) for name in stacks.unstack(like)}, like)

    params, batch_stats = registry.build(found.network, embedding_size=size).shapes
    return arrays(params), arrays(batch_stats)
