"""SHA-256 of an ONNX model, with the weights that lie in files beside it."""

import hashlib
import mmap
import os
from pathlib import Path

from arcface_jax.convert.onnx_bounds import fields
from arcface_jax.runtime import foreign, sealed

# Messages of onnx.proto that lead to tensors, by field number.
_INSIDE = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {
        **{5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
        **{22: "sparse tensor", 23: "sparse tensor"},
    },
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external data"},
}
_KEY, _VALUE = 1, 2


def of_file(path: Path) -> str:
    """Returns the file's SHA-256; of a file whose weights lie in others, a SHA-256 of them all.

    Args:
      path: a file that `onnx_bounds.check` accepts.

    Raises:
      OSError: a file cannot be read.
    """
    own = sealed.file_digest(path)
    beside = _files_beside(path)
    if not beside:
        return own
    total = hashlib.sha256(own.encode())
    for name in beside:
        total.update(os.fsencode(name) + b"\0" + sealed.file_digest(path.parent / name).encode())
    return total.hexdigest()


def _files_beside(path: Path) -> list[str]:
    """Returns the existing files that hold tensors, relative to the model's folder, sorted."""
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    names: set[str] = set()
    waiting = [("model", memoryview(data))]
    while waiting:
        message, content = waiting.pop()
        for field in fields(content):
            kind = _INSIDE[message].get(field.number)
            if kind == "external data":
                entry = {each.number: bytes(each.content) for each in fields(field.content)}
                if entry.get(_KEY) == b"location":
                    names.add(os.fsdecode(entry.get(_VALUE, b"")))
            elif kind is not None:
                waiting.append((kind, field.content))
    return sorted(name for name in names if foreign.is_file(path.parent / name))
