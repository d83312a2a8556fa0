"""Folders in the layout of model hubs: weights, their description and a model card; no code.

This project writes FOLDER/
  model.safetensors          float32 tensors by insightface's names, for JAX and torch alike
  config.json                network, embedding size, the `ModelInput`, library version
  preprocessor_config.json   the same preprocessing for `transformers.AutoImageProcessor`
  README.md                  the model card (`arcface_jax.convert.model_card`)

and also reads CVLface's folders: pretrained_model/model.yaml has size and color order, the weights
are pretrained_model/model.pt or model.safetensors, and the Python files next to them are not
opened. Both are read offline.
"""

import errno
import json
from pathlib import Path
from typing import Literal

import pydantic
import torch

from arcface_jax.convert import model_card, parity, twins, weight_files, weights
from arcface_jax.convert.packages import require
from arcface_jax.convert.weights import Loaded
from arcface_jax.errors import DataError, UserError
from arcface_jax.evaluation.model_input import ColorOrder, ModelInput
from arcface_jax.models import registry
from arcface_jax.models.registry import Arrays
from arcface_jax.runtime import foreign
from arcface_jax.runtime.files import atomic_folder, write_atomic
from arcface_jax.training import manifest
from arcface_jax.training.network import Network, weights_digest

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_PREPROCESSOR = "preprocessor_config.json"
_CARD = "README.md"
_LIBRARY = "arcface_jax"
_CVLFACE_YAML = Path("pretrained_model/model.yaml")
_CVLFACE_WEIGHTS = (Path("pretrained_model/model.pt"), Path(WEIGHTS))
# These configurations have a few hundred bytes.
_MOST_BYTES = 1 << 20


class _Config(pydantic.BaseModel):
    """The fields of config.json that are read."""

    library_name: str
    network: str
    embedding_size: pydantic.PositiveInt
    input: ModelInput


class _CvlfaceConfig(pydantic.BaseModel):
    """The fields of pretrained_model/model.yaml that are read."""

    color_space: ColorOrder = "RGB"
    input_size: tuple[Literal[3], Literal[112], Literal[112]] = (3, 112, 112)


def is_cvlface(folder: Path) -> bool:
    """Returns whether a folder has CVLface's layout."""
    return (folder / _CVLFACE_YAML).is_file()


def export(model: Network, output: Path, *, card: model_card.Card) -> float:
    """Writes a folder after checking the embeddings against the torch network's.

    Args:
      model: the network.
      output: folder to create; new or empty.
      card: contents of the model card beyond the network.

    Returns:
      Largest relative difference of the embeddings.

    Raises:
      UserError: the folder is not empty or cannot be written, the network comes from outside this
        package, weights are not finite, or the embeddings differ.
    """
    _require_new(output)
    _require_built_in(model.network, "export torch or ONNX instead")
    parity.require_finite(model)
    state = weights.to_state_dict(model.params, model.batch_stats)
    error = parity.check(model, state, network=model.network)
    described = model.input
    config = {
        "library_name": _LIBRARY,
        "library_version": manifest.versions().get("arcface-jax", ""),
        "model_type": _LIBRARY,
        "network": model.network,
        "embedding_size": model.embedding_size,
        "input": json.loads(described.to_json()),
    }
    text = model_card.render(
        card, network=model.network, described=described, parameters=_count(model.params)
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(output) as folder:
            weight_files.write(folder / WEIGHTS, state)
            write_atomic(folder / CONFIG, json.dumps(config, indent=2) + "\n")
            write_atomic(folder / _PREPROCESSOR, json.dumps(_preprocessor(described), indent=2))
            write_atomic(folder / _CARD, text)
    except OSError as reason:
        raise UserError(f"cannot write {output}: {reason.strerror}") from reason
    return error


def read(folder: str | Path, *, color_order: ColorOrder | None = None) -> Loaded:
    """Reads the network and weights of a folder.

    Args:
      folder: of `export`, or in CVLface's layout.
      color_order: channel order that CVLface's weights expect; by default what the folder states.

    Raises:
      UserError: it has neither layout, is damaged, or needs code or an input that this project does
        not support.
    """
    folder = Path(folder)
    if is_cvlface(folder):
        return _read_cvlface(folder, color_order)
    if color_order == "BGR":
        raise UserError(
            f"--color-order BGR is for weights of other projects: {folder} takes RGB; leave it out"
        )
    return _read_own(folder)


def load_torch(folder: str | Path) -> torch.nn.Module:
    """Loads the torch module of a folder, in evaluation mode.

    It takes (B, 3, 112, 112) float32, (x - 127.5) / 127.5, RGB, and returns (B, D), not normalized.

    Raises:
      UserError: as `read`.
    """
    model = read(folder)
    state = weights.to_state_dict(model.params, model.batch_stats)
    return twins.load(model.network, state).eval()


def _read_own(folder: Path) -> Loaded:
    path = folder / CONFIG
    try:
        config = _Config.model_validate_json(_text(path))
    except pydantic.ValidationError as error:
        raise DataError(
            f"{path} does not describe a model of {_LIBRARY} ({_first(error)}): name a folder of "
            f"`arcface-jax export hub`, or of CVLface with its {_CVLFACE_YAML}"
        ) from error
    if config.library_name != _LIBRARY:
        raise DataError(
            f"{path} is of the library {config.library_name!a}; expected {_LIBRARY}: name its "
            "file of weights instead of the folder"
        )
    _require_built_in(config.network, f"{path} cannot be used; export the model again")
    model = weights.load(folder / WEIGHTS, config.network)
    size = registry.embedding_size(model.params)
    if size != config.embedding_size:
        raise DataError(
            f"{path} has embedding_size {config.embedding_size}, and the weights have {size}: "
            f"the files are from different models; download or export the folder again"
        )
    if weights_digest(model.network, model.params, model.batch_stats) != config.input.digest:
        raise DataError(
            f"{folder / WEIGHTS} does not hold the weights that {CONFIG} was written for: download "
            "or export the folder again"
        )
    return model._replace(notes=(), compatible_with=config.input.compatible_with)


def _read_cvlface(folder: Path, color_order: ColorOrder | None) -> Loaded:
    path = folder / _CVLFACE_YAML
    yaml = require("yaml")
    try:
        config = _CvlfaceConfig.model_validate(yaml.safe_load(_text(path)))
    except pydantic.ValidationError as error:
        raise DataError(
            f"{path} cannot be used ({_first(error)}): expected CVLface's configuration of a model "
            "for images of [3, 112, 112], RGB or BGR"
        ) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DataError(f"{path} is not a YAML file: download the folder again") from error
    found = next((folder / name for name in _CVLFACE_WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise DataError(
            f"{folder} holds no weights: expected {' or '.join(map(str, _CVLFACE_WEIGHTS))}; "
            "download the whole repository"
        )
    return weights.load(found, color_order=color_order or config.color_space)


def _first(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "the text"
    return f"{place}: {first['msg']}"


def _text(path: Path) -> str:
    """Reads a small text file.

    Raises:
      DataError: the file is missing, or is not a small text file.
    """
    try:
        return foreign.read(path, most=_MOST_BYTES).decode()
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise DataError(f"{path} has more than 1 MiB: it does not describe a model") from None
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file: download the folder again") from error


def _preprocessor(described: ModelInput) -> dict:
    """Returns the settings of transformers' image processor: x / 255, minus mean, divided by
    std.
    """
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "size": {"height": described.height, "width": described.width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [described.mean / 255] * 3,
        "image_std": [described.scale / 255] * 3,
        "do_convert_rgb": True,
    }


def _require_new(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and is not empty: choose a new folder")


def _require_built_in(network: str, fix: str) -> None:
    """Refuses a network from outside the package, because loading the folder would import code."""
    if network not in registry.NETWORKS:
        raise UserError(
            f"{network} is not a network of this package, and a hub folder contains no code: {fix}"
        )


def _count(arrays: Arrays) -> int:
    return sum(array.size for array in arrays.values())
