"""Make the batch axis of other projects' ONNX files dynamic."""

from pathlib import Path
from typing import Any

import numpy as np

from arcface_jax.config.choices import OnnxOptions
from arcface_jax.convert import onnx_input, parity
from arcface_jax.convert.onnx_runner import onnx_embedder
from arcface_jax.convert.packages import require
from arcface_jax.errors import UserError
from arcface_jax.runtime.files import atomic_files, require_place

BATCH = "batch"
_BATCHES = (1, 3, 64)


def free(source: Path, output: Path, *, options: OnnxOptions) -> float:
    """Writes a file with a free batch axis after checking its embeddings against the original's.

    Both are run on 64 faces: the original one by one, the other at batch 1, 3 and 64.

    Args:
      source: an .onnx file, from any exporter.
      output: the file to write.
      options: known properties of its input.

    Returns:
      Largest relative difference of the embeddings.

    Raises:
      UserError: `source` is not a face model, its graph fixes the batch in a way that cannot be
        rewritten, or the file cannot be written.
    """
    require_place(output)
    onnx = require("onnx")
    original = onnx_embedder(source, batch_size=1, options=options)
    faces = parity.drawn_faces(max(_BATCHES))
    expected = np.concatenate([original(face[None]) for face in faces])
    model = onnx.load(str(source))
    _rewrite(model.graph)
    large = model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF
    try:
        with atomic_files(output) as part:
            onnx.save(model, part, save_as_external_data=large)
            return max(_check(part, faces[:size], expected[:size], options) for size in _BATCHES)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error


def _check(path: Path, faces: np.ndarray, expected: np.ndarray, options: OnnxOptions) -> float:
    """Returns the largest relative difference at one batch size."""
    opened = onnx_embedder(path, batch_size=len(faces), options=options)
    if len(faces) > 1 and opened.batch_size == 1:
        raise UserError(
            "its graph holds the batch in more than the sizes of Reshape: nothing was written. "
            "Export it again with a dynamic batch axis"
        )
    return parity.require_equal(
        opened(faces), expected, what="file with a free batch", bound=parity.TOLERANCE
    )


def _rewrite(graph: Any) -> None:
    """Frees the first axis of input and outputs, and in every Reshape that depends on them."""
    name = onnx_input.graph_input(graph)
    (given,) = (value for value in graph.input if value.name == name)
    size = given.type.tensor_type.shape.dim[0].dim_value or 1
    for value in (given, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims:
            dims[0].dim_param = BATCH
    del graph.value_info[:]
    shapes = _Shapes(graph)
    depends = {name}
    for node in graph.node:
        if not depends.intersection(node.input):
            continue
        depends.update(node.output)
        if node.op_type == "Reshape":
            shapes.free(node, size)


class _Shapes:
    """The constant shapes of a graph; each Reshape gets a separate one."""

    def __init__(self, graph: Any):
        self._graph = graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            for attribute in node.attribute if node.op_type == "Constant" else ():
                if attribute.name == "value":
                    self._tensors[node.output[0]] = attribute.t

    def free(self, node: Any, size: int) -> None:
        """Replaces the batch size in the shape of a Reshape."""
        numpy_helper = require("onnx").numpy_helper
        tensor = self._tensors.get(node.input[1])
        if tensor is None:
            return  # a computed shape follows the batch
        shape = numpy_helper.to_array(tensor).copy()
        if not len(shape) or shape[0] <= 0 or (-1 in shape and shape[0] != size):
            return
        # -1 is the batch, or the batch merged with another axis; 0 keeps the axis as it is.
        shape[0] = 0 if -1 in shape else -1
        name = f"{node.output[0]}/shape"
        self._graph.initializer.append(numpy_helper.from_array(shape, name))
        node.input[1] = name
        for attribute in node.attribute:
            if attribute.name == "allowzero":
                attribute.i = 0  # or 0 would be a length
