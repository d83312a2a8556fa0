"""State dicts in files: torch's `.pth` and `.pt`, and `.safetensors`."""

import pickle
from pathlib import Path

import torch

from arcface_jax.convert.packages import require
from arcface_jax.errors import UserError
from arcface_jax.runtime.files import atomic_files

StateDict = dict[str, torch.Tensor]

# Where training programs keep the backbone in a checkpoint; the first is arcface_torch's.
_KEYS = ("state_dict_backbone", "state_dict", "model_state_dict", "model", "backbone")


def read(path: Path) -> StateDict:
    """The tensors of a file, or those of the backbone in a full checkpoint.

    Raises:
      UserError: there is no such file, or it holds anything but tensors.
    """
    if not path.is_file():
        raise UserError(f"no weights at {path}: name an existing .pth or .safetensors file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    state = read_torch(path)
    if isinstance(state, dict):
        state = next((state[key] for key in _KEYS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise UserError(
            f"{path} holds a {type(state).__name__} that is not a state_dict of tensors, nor has "
            f"one under {', '.join(_KEYS)}"
        )
    return state


def read_torch(path: Path) -> object:
    """What a torch file holds, on the CPU; tensors and plain containers alone.

    Raises:
      UserError: it is no torch file, or holds objects that only running code could restore.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise UserError(
            f"{path} is not a file of torch weights: {str(error).splitlines()[0]}"
        ) from error


def write(path: Path, state: StateDict) -> None:
    """Writes a state dict in the format that the suffix names; never half a file.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        with atomic_files(path) as part:
            if path.suffix == ".safetensors":
                require("safetensors.torch").save_file(state, part, metadata={"format": "pt"})
            else:
                torch.save(state, part)
    except (OSError, RuntimeError) as reason:
        raise UserError(f"cannot write {path}: {reason}") from reason


def _read_safetensors(path: Path) -> StateDict:
    files = require("safetensors.torch")
    try:
        return files.load_file(path)
    except (require("safetensors").SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error
