"""Choices that command lines offer and library functions take.

They are separate from the code that uses them, so that a command line is parsed, and mistakes are
reported, before JAX, OpenCV or PyTorch is imported.
"""

from dataclasses import dataclass
from typing import Literal

Which = int | Literal["latest", "best"]
"""Which checkpoint of a run: a step, the newest, or the best by `checkpoint.best_metric`."""

Bad = Literal["stop", "skip"]
"""What to do with an image that is unreadable or not 112 x 112: stop with an error, or skip it."""

FaceChoice = Literal["auto", "largest", "center", "score"]
"""Which face of a photograph to take: auto is the one nearest to the
center if the photograph is in a folder of its identity, and the largest
otherwise."""


@dataclass(frozen=True)
class AlignOptions:
    """How a command aligns images that are not 112 x 112 and have no points."""

    detector: str | None = None
    """Detector of the five points of images that are not 112 x 112: an SCRFD
    or YuNet ONNX file, or module:function."""
    detector_size: int = 0
    """The detector sees images with their longer side scaled to this, a multiple of 32; 0 is 1280
    for YuNet, which enlarges none, and 640 for SCRFD."""
    choose: FaceChoice = "auto"
    """Which face to take if there are several; auto takes the one nearest to
    the center if the image is in a folder of its identity, and the largest
    otherwise."""


IjbProtocol = Literal["ijbb", "ijbc"]
RankProtocol = Literal["retrieval", "groups", "all-to-all"]

ColorOrder = Literal["RGB", "BGR"]
"""Channel order of a network's input; images are RGB before."""


@dataclass(frozen=True)
class OnnxOptions:
    """Properties that a file does not state; those not given are detected."""

    color_order: ColorOrder | None = None
    """Channel order that an ONNX file, or weights, expect: RGB or BGR."""
    mean: float | None = None
    """--onnx takes (x - mean) / scale of 0 .. 255; 0 if it normalizes its input."""
    scale: float | None = None
    """Divisor after --mean is subtracted; 1 if it normalizes its input."""
    output_name: str | None = None
    """The output of --onnx that is the embedding; by default the widest (N, D)."""


Normalization = Literal["outside", "inside"]
"""Whether the caller of an ONNX graph computes (x - 127.5) / 127.5, or the graph."""

GraphInput = Literal["float", "uint8-nhwc"]
"""Input of an exported ONNX graph: (batch, 3, 112, 112) float32, or
decoded images, (batch, 112, 112, 3) uint8 RGB, with all preprocessing in
the graph."""

Precision = Literal["float32", "float16", "int8"]
"""Type of an ONNX file's weights and of most of its arithmetic."""

CenterLayout = Literal["2021", "2022", "head"]
"""Generation of arcface_torch's files of class centers."""
