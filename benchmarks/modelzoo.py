"""Measure each network's cost and the error of its exports, and write them into a page.

python -m benchmarks.modelzoo r50 [--faces lfw_dev.bin]    measures one network and prints JSON
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro

from arcface_jax import errors
from arcface_jax.convert import parity, to_onnx, twins, weights
from arcface_jax.convert.onnx_runner import onnx_embedder
from arcface_jax.data.pairs import bins
from arcface_jax.errors import UserError
from arcface_jax.machine import cost
from arcface_jax.models import preprocess, registry
from arcface_jax.training.network import Network

_FACES = 16
BEGIN = "<!-- begin: scripts/modelzoo.py -->"


@dataclass(frozen=True)
class Arguments:
    """Command line of a measuring process."""

    network: Annotated[str, tyro.conf.Positional]
    """Network to measure."""
    faces: Path | None = None
    """A verification set whose first images are used; by default synthetic faces."""


def measure(network: str, faces: np.ndarray) -> dict[str, Any]:
    """Measures a network with fresh weights and the statistics of a training pass.

    Args:
      network: a name in `arcface_jax.models.registry.NETWORKS`.
      faces: (n, 112, 112, 3) uint8 RGB.

    Returns:
      parameters, macs; torch_difference, onnx_difference: the largest relative difference over the
      faces; onnx_bytes; compile_seconds: of the gradient of a training pass over the faces, traced,
      lowered and compiled, in float32.
    """
    seconds = _compile_seconds(network, faces)
    params, batch_stats = parity.settled(network, faces)
    embedder = Network(network, params, batch_stats, batch_size=len(faces), devices=1)
    embeddings = embedder(faces)
    twin = twins.load(network, weights.to_state_dict(params, batch_stats))
    difference = parity.largest_error(parity.torch_embeddings(twin, faces), embeddings)
    del twin, params, batch_stats
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        to_onnx.export(embedder, path)  # this compares synthetic faces
        theirs = onnx_embedder(path, batch_size=len(faces))(faces)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {
        "network": network,
        **cost.measure(network)._asdict(),
        "torch_difference": difference,
        "onnx_difference": parity.largest_error(theirs, embeddings),
        "onnx_bytes": size,
        "compile_seconds": seconds,
    }


def _compile_seconds(network: str, faces: np.ndarray) -> float:
    backbone = registry.build(network)

    def loss(params, batch_stats, images):
        x = preprocess.normalize(images)
        keys = jax.random.split(jax.random.key(0), len(images))
        embeddings, moved = backbone.apply(params, batch_stats, x, train=True, keys=keys)
        return jnp.mean(jnp.square(embeddings)), moved

    begin = time.perf_counter()
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    images = jax.ShapeDtypeStruct(faces.shape, faces.dtype)
    gradient.lower(*backbone.shapes, images).compile()
    return time.perf_counter() - begin


def measure_apart(
    network: str, faces: Path | None, *, module: str = "benchmarks.modelzoo"
) -> dict[str, Any]:
    """Runs the `measure` of a module in a separate process, to free its memory afterwards.

    Raises:
      UserError: it failed.
    """
    command = [sys.executable, "-m", module, network]
    command += [] if faces is None else ["--faces", str(faces)]
    # A program from a cache would not be compiled.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{network} could not be measured: {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


def merge(data: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merges rows into the JSON file with those of other networks; returns all of them in order."""
    known = json.loads(data.read_text()) if data.is_file() else []
    by_name = {row["network"]: row for row in (*known, *rows)}
    merged = [by_name[name] for name in registry.NETWORKS if name in by_name]
    data.write_text(json.dumps(merged, indent=2) + "\n")
    return merged


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as Markdown."""
    lines = [
        "| network | M parameters | GMAC | JAX-torch | JAX-ONNX | ONNX, MB | compile, s | faces |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    lines += [
        f"| `{row['network']}` | {row['parameters'] / 1e6:.2f} | {row['macs'] / 1e9:.2f} "
        f"| {row['torch_difference']:.1e} | {row['onnx_difference']:.1e} "
        f"| {row['onnx_bytes'] / 1e6:.0f} | {row['compile_seconds']:.1f} | {row['faces']} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(
    argv: list[str],
    measure: Callable[[str, np.ndarray], dict[str, Any]] = measure,
    *,
    prog: str = "python -m benchmarks.modelzoo",
) -> None:
    """Runs the command that measures one network."""
    arguments = tyro.cli(Arguments, args=argv, prog=prog)
    with errors.reported():
        if arguments.faces is None:
            faces, name = parity.drawn_faces(_FACES), "drawn"
        else:
            faces, name = bins.read_bin(arguments.faces).images[:_FACES], arguments.faces.stem
        found = measure(arguments.network, faces) | {
            "faces": name,
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "torch": torch.__version__,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
