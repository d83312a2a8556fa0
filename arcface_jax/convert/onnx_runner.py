"""Runs an ONNX face-recognition model on images, whoever exported it.

How its input is to be normalized is told, in this order, by
- the metadata that this project's exports carry: `mean`, `scale` and `color_order`, all three as
  the caller has to apply them outside the graph (0, 1 and RGB where the graph does everything);
- the names of its first eight nodes, as insightface's Python package reads them: one that begins
  with Sub or _minus and one that begins with Mul or _mul normalize inside the graph, which then
  takes raw 0 .. 255;
- otherwise (x - 127.5) / 127.5, RGB.
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.errors import UserError, install
from arcface_jax.evaluation.model_input import ColorOrder, ModelInput
from arcface_jax.models import preprocess

METADATA_KEYS = ("mean", "scale", "color_order")
_INSTALL = install("onnx")
_NAMED_NODES = 8
_NUMBERS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_LARGEST_BATCH = 64


class OnnxModel:
    """An open model; calling it gives the embeddings. Made by `onnx_embedder`."""

    def __init__(self, path: Path, *, batch_size: int):
        self._path = path
        self._session = _session(path)
        self._entry = self._session.get_inputs()[0]
        metadata = self._session.get_modelmeta().custom_metadata_map
        self._mean, self._scale, order = read_normalization(path, metadata)
        self._order: ColorOrder = order
        first = self._entry.shape[0]
        self._fixed = isinstance(first, int)
        self._batch_size: int = first if self._fixed else batch_size

    def __call__(self, images: np.ndarray, /) -> np.ndarray:
        """(n, 112, 112, 3) uint8 RGB to (n, D) float32, not normalized."""
        size = self._batch_size
        return np.concatenate(
            [self._run(images[start : start + size]) for start in range(0, len(images), size)]
        )

    @cached_property
    def input(self) -> ModelInput:
        """What the caller would have to do without this class."""
        output = self._session.get_outputs()[0]
        width = output.shape[1]
        black = np.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        return ModelInput(
            color_order=self._order,
            mean=self._mean,
            scale=self._scale,
            dtype=cast("Literal['float32', 'float16']", np.dtype(_NUMBERS[self._entry.type]).name),
            output=output.name,
            embedding_size=width if isinstance(width, int) else self(black).shape[1],
            digest=self.digest(),
        )

    def digest(self) -> str:
        """A SHA-256 of the file."""
        with self._path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _run(self, part: np.ndarray) -> np.ndarray:
        missing = self._batch_size - len(part) if self._fixed else 0
        x = np.pad(part, [(0, missing), (0, 0), (0, 0), (0, 0)])
        if self._order == "BGR":
            x = x[..., ::-1]
        x = (x.astype(np.float32) - self._mean) / self._scale
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2), _NUMBERS[self._entry.type])
        out = self._session.run(None, {self._entry.name: x})[0]
        return out[: len(part)].astype(np.float32)


def onnx_embedder(path: str | Path, *, batch_size: int = _LARGEST_BATCH) -> OnnxModel:
    """Opens a model for ONNX Runtime, on a GPU where the installed runtime has one.

    Args:
      path: the .onnx file: one float input (N, 3, 112, 112), one output (N, D).
      batch_size: images per call; a model whose batch is fixed gets that size.

    Returns:
      A function from (n, 112, 112, 3) uint8 RGB to (n, D) float32, not normalized.

    Raises:
      UserError: ONNX Runtime is not installed, there is no such file, or it is not such a model.
    """
    return OnnxModel(Path(path), batch_size=batch_size)


def read_normalization(path: Path, metadata: Mapping[str, str]) -> tuple[float, float, ColorOrder]:
    """Mean, scale and color order of a model's input, by the rules of this module.

    Args:
      path: the .onnx file, opened only where the metadata does not say it.
      metadata: the model's own.

    Raises:
      UserError: the metadata is not as this project writes it, or `onnx` is not installed.
    """
    if all(key in metadata for key in METADATA_KEYS):
        mean, scale, order = (metadata[key] for key in METADATA_KEYS)
        try:
            numbers = float(mean), float(scale)
        except ValueError:
            numbers = 0.0, 0.0
        if order not in ("RGB", "BGR") or not numbers[1] > 0:
            raise UserError(
                f"{path}: the metadata has mean {mean!r}, scale {scale!r}, color_order {order!r}; "
                "expected two numbers, the second above 0, and RGB or BGR: export the model anew"
            )
        return *numbers, cast("ColorOrder", order)
    names = _first_names(path)
    inside = [
        any(n.startswith(begin) for n in names) for begin in (("Sub", "_minus"), ("Mul", "_mul"))
    ]
    if all(inside):
        return 0.0, 1.0, "RGB"
    return preprocess.MEAN, preprocess.SCALE, "RGB"


def _first_names(path: Path) -> list[str]:
    try:
        import onnx
    except ImportError as error:
        raise UserError(
            f"{path} carries no metadata on its input, and reading the names of its nodes needs "
            f"the package onnx: {_INSTALL}"
        ) from error
    graph = onnx.load(str(path), load_external_data=False).graph
    return [node.name for node in graph.node[:_NAMED_NODES]]


def _session(path: Path) -> Any:
    """An onnxruntime.InferenceSession on a model of the expected form."""
    if not path.is_file():
        raise UserError(f"no model at {path}: name an existing .onnx file with --onnx")
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"running {path} needs ONNX Runtime: {_INSTALL}") from error
    known = onnxruntime.get_available_providers()
    wanted = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in known]
    try:
        session = onnxruntime.InferenceSession(str(path), providers=wanted)
    except Exception as error:
        # The runtime's exceptions have no base class of their own.
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a model that ONNX Runtime opens: {reason}") from error
    entries, outputs = session.get_inputs(), session.get_outputs()
    expected = [3, IMAGE_SIZE, IMAGE_SIZE]
    if (
        (len(entries), len(outputs)) != (1, 1)
        or entries[0].shape[1:] != expected
        or entries[0].type not in _NUMBERS
        or len(outputs[0].shape) != 2
    ):
        shapes = [[(x.name, x.type, x.shape) for x in kind] for kind in (entries, outputs)]
        raise UserError(
            f"{path} takes {shapes[0]} and gives {shapes[1]}; expected one float input of "
            f"(N, {', '.join(map(str, expected))}) and one output (N, D): name a model that embeds "
            "aligned faces"
        )
    return session
