"""Write a backbone as an ONNX file, checked with ONNX Runtime before it gets its final name."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax import config
from arcface_jax.config.choices import Precision
from arcface_jax.convert import onnx_graph, onnx_precision, parity
from arcface_jax.convert.onnx_graph import Form
from arcface_jax.convert.onnx_layer_errors import LayerError
from arcface_jax.convert.onnx_runner import onnx_embedder
from arcface_jax.data import opening
from arcface_jax.data.pairs.opening import open_targets
from arcface_jax.errors import UserError
from arcface_jax.evaluation import verification
from arcface_jax.evaluation.verification import Verification
from arcface_jax.runtime.files import atomic_files, require_place, write_atomic
from arcface_jax.training.network import Network

# Largest relative difference that counts as rounding; above it the export is refused.
_BOUNDS: dict[Precision, float] = {"float32": parity.TOLERANCE, "float16": 2e-2, "int8": 0.3}
# Largest difference for which a run's threshold remains valid: cosines change by less than twice as
# much, far less than the interval of any FAR.
_SAME_MODEL = 1e-3
_CALIBRATION_IMAGES = 128


class Exported(NamedTuple):
    """Result of an export."""

    error: float
    """Largest relative difference of the embeddings."""
    layers: list[LayerError]
    """Errors of int8 layers, from the input to the output; empty for other precisions."""


def export(
    model: Network,
    output: Path,
    *,
    form: Form | None = None,
    precision: Precision = "float32",
    calibration: np.ndarray | None = None,
) -> Exported:
    """Writes the file after checking ONNX Runtime's embeddings against JAX's at batch 1 and 3.

    Args:
      model: the network to export.
      output: the file.
      form: form of the graph.
      precision: precision of the weights and of most arithmetic.
      calibration: (n, 112, 112, 3) uint8 RGB, for int8.

    Raises:
      UserError: packages are missing, the embeddings differ, or the file cannot be written.
    """
    require_place(output)
    form = form or Form()
    form.check()
    if (precision == "int8") != (calibration is not None):
        raise UserError("--precision int8 and --calibration FOLDER go together")
    parity.require_finite(model)
    try:
        with atomic_files(output) as path:  # the graph refers to external data by the file's name
            return _write(path, model, form, precision=precision, calibration=calibration)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error


def _write(
    path: Path, model: Network, form: Form, *, precision: Precision, calibration: np.ndarray | None
) -> Exported:
    """Writes the graph and checks it."""
    layers = []
    onnx_graph.write(path, model, form)
    if precision == "float16":
        onnx_precision.to_float16(path)
    elif calibration is not None:
        layers = onnx_precision.to_int8(path, calibration)
    faces = parity.drawn_faces() if calibration is None else calibration[:16]
    error = check(path, model, faces, bound=_BOUNDS[precision])
    if precision == "int8" or error > _SAME_MODEL:
        onnx_graph.disown(path)
    return Exported(error, layers)


def write_layers(layers: Sequence[LayerError], output: Path) -> Path:
    """Writes the errors of int8 layers as JSON to OUTPUT.layers.json, and returns its path.

    Raises:
      UserError: the file cannot be written.
    """
    path = output.with_name(f"{output.name}.layers.json")
    try:
        write_atomic(path, json.dumps([layer._asdict() for layer in layers], indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def check(path: Path, model: Network, faces: np.ndarray, *, bound: float) -> float:
    """Returns the largest relative difference from JAX's embeddings, at batch 1, 3 and all.

    Raises:
      UserError: the difference exceeds the bound.
    """
    reference = model(faces)
    return max(
        parity.require_equal(
            onnx_embedder(path, batch_size=batch)(faces[:batch]),
            reference[:batch],
            what="ONNX file",
            bound=bound,
        )
        for batch in (1, 3, len(faces))
    )


def calibration_images(path: str) -> np.ndarray:
    """Reads (n, 112, 112, 3) uint8 RGB: images from all parts of a training set."""
    source = opening.open_source(config.DataConfig(path=path), seed=0)
    numbers = np.unique(np.linspace(0, len(source) - 1, _CALIBRATION_IMAGES).astype(int))
    return np.stack([source[int(number)][0] for number in numbers])


def compare(model: Network, path: Path, targets: tuple[str, ...]) -> list[Verification]:
    """Verifies the JAX network and the ONNX file on each set, as `NAME jax` and `NAME onnx`.

    Args:
      model: the JAX network.
      path: the ONNX file.
      targets: the sets, as `evaluation.targets` names them.
    """
    results = []
    for pair_set in open_targets(targets, config.DataConfig(), seed=0):
        for name, embed in (("jax", model), ("onnx", onnx_embedder(path))):
            renamed = pair_set._replace(name=f"{pair_set.name} {name}")
            results.append(verification.verify(embed, renamed))
    return results
