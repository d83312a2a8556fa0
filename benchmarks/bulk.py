"""Embedding in bulk: a folder of JPEG files with JAX and with ONNX Runtime, compared."""

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.convert import parity, to_onnx
from arcface_jax.convert.onnx_runner import onnx_embedder
from arcface_jax.data.images import encode_jpeg
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.evaluation.embed import Model
from arcface_jax.inference import bulk
from arcface_jax.inference.embedder import Embedder
from arcface_jax.training.network import Network


class Row(NamedTuple):
    """Result of one network."""

    network: str
    images: int
    batch_size: int
    jax_per_second: float
    """Best images per second with `Embedder.embed_folder`, including decoding and shards."""
    onnx_per_second: float
    error: float
    """Largest relative difference of the embeddings."""


def measure(network: str, *, images: int, batch_size: int, repeats: int) -> Row:
    """Times both runtimes in turn on the same files.

    Args:
      network: a name in `arcface_jax.models.registry.NETWORKS`; its weights are fresh.
      images: JPEG files of 112 x 112.
      batch_size: images per forward pass.
      repeats: timed runs of each, after a warm-up; the fastest is reported.
    """
    params, batch_stats = parity.settled(network, parity.drawn_faces())
    model = Network(network, params, batch_stats, batch_size=batch_size, devices=1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "faces").mkdir()
        for i in range(images):
            face = encode_jpeg(draw_face(seed=2, identity=i % 64, index=i // 64), quality=95)
            (folder / "faces" / f"{i:06}.jpg").write_bytes(face)
        to_onnx.export(model, folder / "m.onnx")
        models: dict[str, Model] = {
            "jax": model,
            "onnx": onnx_embedder(folder / "m.onnx", batch_size=batch_size),
        }
        seconds: dict[str, list[float]] = {name: [] for name in models}
        found: dict[str, np.ndarray] = {}
        for number in range(repeats + 1):
            for name, each in models.items():
                output = folder / f"{name}{number}"
                begin = time.perf_counter()
                Embedder(each, batch_size=batch_size).embed_folder(
                    folder / "faces", output, normalized=False
                )
                seconds[name].append(time.perf_counter() - begin)
                found[name] = bulk.read(output)[1]
    jax_best, onnx_best = (min(seconds[name][1:]) for name in models)
    error = parity.largest_error(found["onnx"], found["jax"])
    return Row(network, images, batch_size, images / jax_best, images / onnx_best, error)
