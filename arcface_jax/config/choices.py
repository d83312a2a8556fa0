"""Choices that command lines offer and library functions take.

They live apart from the code that acts on them, so that a command line is parsed, and a mistake
answered, before JAX, OpenCV or PyTorch is imported.
"""

from dataclasses import dataclass
from typing import Literal

Which = int | Literal["latest", "best"]
"""Which checkpoint of a run: a step, the newest, or the best by `checkpoint.best_metric`."""

Bad = Literal["stop", "skip"]
"""What becomes of an image that is unreadable or not 112 x 112: an error, or it is left out."""

FaceChoice = Literal["auto", "largest", "center", "score"]
"""Which face of a photograph is taken: auto is the one nearest to the center where the photograph
lies in a folder of its identity, and the largest elsewhere."""


@dataclass(frozen=True)
class AlignOptions:
    """How a command aligns images that are not 112 x 112 and come without points."""

    detector: str | None = None
    """Finds the five points of images that are not 112 x 112: an ONNX file of the SCRFD or YuNet
    kind, or module:function."""
    detector_size: int = 0
    """The detector sees images with their longer side scaled to this, a multiple of 32; 0 is 1280
    for YuNet, which enlarges none, and 640 for SCRFD."""
    choose: FaceChoice = "auto"
    """Which face of several; auto takes the one nearest to the center where the image lies in a
    folder of its identity, and the largest elsewhere."""


IjbProtocol = Literal["ijbb", "ijbc"]
RankProtocol = Literal["retrieval", "groups", "all-to-all"]

ColorOrder = Literal["RGB", "BGR"]
"""Order of the channels that a network takes; images are RGB until then."""


@dataclass(frozen=True)
class OnnxOptions:
    """What an ONNX file does not tell of itself; what is not given is found in the file."""

    color_order: ColorOrder | None = None
    """Channels that --onnx takes: RGB or BGR."""
    mean: float | None = None
    """--onnx takes (x - mean) / scale of 0 .. 255; 0 where it normalizes inside."""
    scale: float | None = None
    """The divisor after --mean is subtracted; 1 where it normalizes inside."""
    output_name: str | None = None
    """The output of --onnx that is the embedding; by default the widest (N, D)."""


Normalization = Literal["outside", "inside"]
"""Whether (x - 127.5) / 127.5 is done by the caller of an ONNX graph, or by the graph."""

GraphInput = Literal["float", "uint8-nhwc"]
"""What an exported ONNX graph takes: (batch, 3, 112, 112) float32, or images as they are decoded,
(batch, 112, 112, 3) uint8 RGB, with all of the preprocessing in the graph."""

Precision = Literal["float32", "float16", "int8"]
"""Of an ONNX file's weights and most of its arithmetic."""

CenterLayout = Literal["2021", "2022", "head"]
"""The generation of arcface_torch's files of class centers."""
