"""Convert an ONNX graph to float16, or to int8 with ranges measured on images."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from arcface_jax.convert import onnx_graph, onnx_layer_errors
from arcface_jax.convert.onnx_graph import INPUT, NORMALIZERS
from arcface_jax.convert.onnx_layer_errors import LayerError
from arcface_jax.convert.onnx_runner import onnx_embedder
from arcface_jax.convert.packages import require
from arcface_jax.runtime.files import atomic_files

# Operators whose running variances may exceed float16's range.
_FLOAT32_NODES = ["BatchNormalization"]
_COMPARED_IMAGES = 8


def to_float16(path: Path) -> None:
    """Rewrites a float32 graph; input, output and BatchNorm stay float32."""
    onnx, float16 = require("onnx"), require("onnxruntime.transformers.float16")
    model = float16.convert_float_to_float16(
        onnx.load(path),
        keep_io_types=True,
        op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *_FLOAT32_NODES],
    )
    graphs = require("onnxruntime.transformers.onnx_model").OnnxModel
    graphs.graph_topological_sort(model.graph)  # the casts were appended at the end
    onnx.save(model, path)
    onnx_graph.finish(path, {"precision": "float16"})


def to_int8(path: Path, images: np.ndarray) -> list[LayerError]:
    """Rewrites a float32 graph: weights per channel, activations by their range on images.

    The first and the last layer stay in float: they process the pixels and the embedding.

    Args:
      path: the graph.
      images: (n, 112, 112, 3) uint8 RGB, aligned faces like those in use.

    Returns:
      Error of each layer's output against the float graph's.
    """
    onnx, quantization = require("onnx"), require("onnxruntime.quantization")
    layers = onnx_layer_errors.weighted(onnx.load(path, load_external_data=False).graph)
    kept = {layers[0].name, layers[-1].name}
    prepare = onnx_embedder(path).prepare

    class Reader(quantization.CalibrationDataReader):
        """Provides the images one by one."""

        def __init__(self):
            self._images = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self._images, None)
            return None if image is None else {INPUT: prepare(image[None])}

    logger = logging.getLogger()  # the package logs advice on every call
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with atomic_files(path) as part:
            quantization.quantize_static(
                path,
                part,
                Reader(),
                per_channel=True,
                # 7-bit weights: CPUs without VNNI add pairs of 8-bit products in 16 bits, which
                # saturates (relative error 0.88 instead of 0.12 on such a machine).
                reduce_range=True,
                nodes_to_exclude=[*NORMALIZERS, *sorted(kept)],
            )
            compared = onnx_layer_errors.errors(path, part, images[:_COMPARED_IMAGES], kept=kept)
    finally:
        logger.setLevel(level)
    onnx_graph.finish(path, {"precision": "int8", "calibration_images": str(len(images))})
    return compared
