"""Description of a model's input and output, stored with every export.

Evaluation, calibration, embedding, distillation and cleaning read it from the open model
(`Model.input`), whatever runs it. A run needs no file for it: its networks take the output of
`arcface_jax.models.preprocess`, and the digest comes from the weights.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal

import pydantic

from arcface_jax.config.choices import ColorOrder
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.errors import DataError
from arcface_jax.models import preprocess

METADATA_KEY = "model_input"
"""Key of the JSON in ONNX and safetensors files."""
Layout = Literal["NCHW", "NHWC"]
_PREPARATION = ("color_order", "mean", "scale", "output")


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """How to prepare aligned uint8 faces: (x - mean) / scale, in this channel order and layout."""

    height: int = IMAGE_SIZE
    width: int = IMAGE_SIZE
    color_order: ColorOrder = "RGB"
    """Channel order of the model's input; images are RGB before."""
    mean: float = preprocess.MEAN
    """Subtracted by the caller; 0 if the model normalizes its input."""
    scale: float = preprocess.SCALE
    """The caller then divides by it; 1 if the model normalizes its input."""
    layout: Layout = "NCHW"
    dtype: Literal["float32", "float16", "uint8"] = "float32"
    output: str = ""
    """Name of the output that is the embedding, if outputs have names."""
    embedding_size: int
    flip: bool = False
    """Whether operating points are for f(image) + f(mirrored image)."""
    digest: str
    """SHA-256 of the weights of the exported run, so that a calibration of the run is valid for its
    exact exports; for a model of unknown origin, or prepared in another way than its file states,
    `identity`."""
    compatible_with: str = ""
    """`digest` of the teacher with which its embeddings are compatible; empty for none."""

    def to_json(self) -> str:
        """Returns one line of JSON."""
        return json.dumps(dataclasses.asdict(self))


def identity(file: str, *, own: ModelInput, used: ModelInput) -> str:
    """Returns a SHA-256 of a file and of how its input is prepared.

    Args:
      file: SHA-256 of the file; returned if `used` prepares the input as `own` does.
      own: the description that the file states or implies.
      used: the description in use, with the caller's overrides.
    """
    values = {name: getattr(used, name) for name in _PREPARATION}
    if values == {name: getattr(own, name) for name in _PREPARATION}:
        return file
    values |= {"mean": float(used.mean), "scale": float(used.scale)}  # 0 and 0.0 are one mean
    return hashlib.sha256(json.dumps([file, values]).encode()).hexdigest()


_ADAPTER = pydantic.TypeAdapter(ModelInput)


def from_json(text: str, *, source: str) -> ModelInput:
    """Reads what `ModelInput.to_json` wrote.

    Args:
      text: the JSON.
      source: its origin, for the error message.

    Raises:
      DataError: the text is not such a description.
    """
    try:
        return _ADAPTER.validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the text"
        raise DataError(
            f"{source}: the description of the model's input is damaged at {place}: "
            f"{first['msg']}; export the model again"
        ) from error
