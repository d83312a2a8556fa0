"""Check an ONNX file before a runtime opens it: no loops, and no giant arrays.

A graph is a program: a loop in it may not terminate, and one small node can make an array of any
size. Face networks have neither. Operators are found without the package onnx; sizes of arrays, if
it is installed, by its shape inference for one image.
"""

import importlib.util
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.errors import UserError
from arcface_jax.runtime import foreign

LARGEST_FIXED_BATCH = 1024
"""Largest fixed batch of a graph; incomplete batches are padded to it."""

_LOOPS = frozenset((b"Loop", b"Scan", b"SequenceMap"))
# Largest arrays, in numbers, in total and per image; the widest layers have 2^20 per image.
_LARGEST, _LARGEST_OF_IMAGE = 1 << 27, 1 << 21
_SMALL = 1 << 12  # bytes of a weight from which shapes may be computed
_DEEPEST = 16
# Field numbers of onnx.proto that lead to nodes and graphs.
_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE, _FUNCTION_NODE = 1, 7
_NODE_KIND, _NODE_ATTRIBUTE = 4, 5
_ATTRIBUTE_GRAPHS = (6, 11)


def check(path: Path) -> None:
    """Refuses a file whose graph loops, or makes arrays far beyond a network's.

    Raises:
      UserError: it does, or is not an ONNX file.
    """
    try:
        foreign.require_regular(path)
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        found = _operators(memoryview(data))
    except OSError as error:
        raise UserError(f"no model at {path} ({error.strerror}): name an .onnx file") from error
    except (IndexError, ValueError) as error:
        raise UserError(
            f"{path} is not an ONNX file that can be read, so not a model that ONNX Runtime opens "
            f"({error}): fetch or export it again"
        ) from error
    if loops := sorted(found & _LOOPS):
        raise UserError(
            f"{path} has a {loops[0].decode()}, which need not end and no network for faces has: "
            "export the model without it"
        )
    if importlib.util.find_spec("onnx") is not None:
        _check_sizes(path)


class _Field(NamedTuple):
    """A length-delimited field of a protobuf message."""

    number: int
    content: memoryview


def _operators(data: memoryview) -> set[bytes]:
    """Returns the operators of a model, of its functions and of the graphs in attributes."""
    found: set[bytes] = set()
    waiting: list[tuple[memoryview, int]] = []
    for field in fields(data):
        if field.number == _MODEL_GRAPH:
            waiting += [(node, 0) for node in _all(field.content, _GRAPH_NODE)]
        elif field.number == _MODEL_FUNCTIONS:
            waiting += [(node, 0) for node in _all(field.content, _FUNCTION_NODE)]
    while waiting:
        node, depth = waiting.pop()
        for field in fields(node):
            if field.number == _NODE_KIND:
                found.add(bytes(field.content[:64]))
            elif field.number == _NODE_ATTRIBUTE:
                graphs = [x.content for x in fields(field.content) if x.number in _ATTRIBUTE_GRAPHS]
                if graphs and depth >= _DEEPEST:
                    raise ValueError(f"graphs in graphs, more than {_DEEPEST} deep")
                waiting += [(n, depth + 1) for graph in graphs for n in _all(graph, _GRAPH_NODE)]
    return found


def _all(message: memoryview, number: int) -> list[memoryview]:
    return [field.content for field in fields(message) if field.number == number]


def fields(message: memoryview) -> Iterator[_Field]:
    """Yields the fields of a message that are messages, text or bytes; skips numbers."""
    at, size = 0, len(message)
    while at < size:
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            length, at = _varint(message, at)
            if at + length > size:
                raise ValueError("cut short")
            yield _Field(tag >> 3, message[at : at + length])
            at += length
        else:
            raise ValueError("no protobuf message")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("cut short")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError("no protobuf message")


def _check_sizes(path: Path) -> None:
    """Checks sizes by shape inference for one image; sizes computed at run time stay unknown.

    Raises:
      UserError: an array is too large.
    """
    import onnx
    import onnx.shape_inference

    try:
        model = onnx.load(str(path), load_external_data=False)
        _empty_weights(model.graph)
        batch = _set_input(model.graph)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # many types; the runtime reports the actual problem
        return
    if batch > LARGEST_FIXED_BATCH:
        raise UserError(
            f"{path} takes batches of {batch:,} images only; at most {LARGEST_FIXED_BATCH:,} are "
            "filled up: export it with a free batch axis"
        )
    most, graph = max(_LARGEST, _LARGEST_OF_IMAGE * batch), inferred.graph
    for value in (*graph.value_info, *graph.output):
        count = 1
        for dim in value.type.tensor_type.shape.dim:
            count *= dim.dim_value if dim.dim_value > 0 else 1
        if count > most:
            raise UserError(
                f"{path} makes an array of {count:,} numbers ({value.name[:60]}) for a batch of "
                f"{batch}, and at most {most:,} are allowed: it is not a face network"
            )


def _empty_weights(graph: Any) -> None:
    """Drops the values of large weights, because their shapes are enough."""
    for tensor in graph.initializer:
        if len(tensor.raw_data) > _SMALL:
            tensor.ClearField("raw_data")


def _set_input(graph: Any) -> int:
    """Sets free axes of the input to the size of one face; returns the batch size."""
    batch = 1
    weights = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        if value.name in weights:
            continue
        for place, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_value <= 0:
                dim.dim_value = 1 if place == 0 else IMAGE_SIZE
            batch = dim.dim_value if place == 0 else batch
    return batch
