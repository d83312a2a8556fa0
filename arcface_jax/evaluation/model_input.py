"""What a model wants of an aligned face and what it gives: one description, kept with every export.

Evaluation, calibration, embedding, distillation and cleaning read it from the open model
(`Model.input`), whatever runs it. A run needs no file for it: its networks take what
`arcface_jax.models.preprocess` makes, and the weights give the digest.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import pydantic

from arcface_jax.config.choices import ColorOrder
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.errors import DataError
from arcface_jax.models import preprocess

METADATA_KEY = "model_input"
"""Under which ONNX and safetensors files hold the JSON."""
Layout = Literal["NCHW", "NHWC"]


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """How a caller prepares aligned uint8 faces: (x - mean) / scale, in this order and layout."""

    height: int = IMAGE_SIZE
    width: int = IMAGE_SIZE
    color_order: ColorOrder = "RGB"
    """Order of the channels that the model takes; images are RGB until then."""
    mean: float = preprocess.MEAN
    """Subtracted by the caller; 0 where the model normalizes inside."""
    scale: float = preprocess.SCALE
    """Then divided by; 1 where the model normalizes inside."""
    layout: Layout = "NCHW"
    dtype: Literal["float32", "float16", "uint8"] = "float32"
    output: str = ""
    """Name of the output that is the embedding, of a model with names for them."""
    embedding_size: int
    flip: bool = False
    """Whether its operating points are for f(image) + f(mirrored image)."""
    digest: str
    """SHA-256 of the weights of the run that it was exported from, so that a calibration of the
    run holds for its exact exports; of the file for a model of unknown origin."""
    compatible_with: str = ""
    """`digest` of the teacher whose embeddings its own can be compared with; empty for none."""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))


_ADAPTER = pydantic.TypeAdapter(ModelInput)


def from_json(text: str, *, source: str) -> ModelInput:
    """Reads what `ModelInput.to_json` wrote.

    Args:
      text: the JSON.
      source: where it comes from, for the error message.

    Raises:
      DataError: it is not such a description.
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
