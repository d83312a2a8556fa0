"""Ten steps of the head, in this process or, as a program, in one of two that share eight devices.

python several_steps.py COORDINATOR PROCESS FOLDER
"""

import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from dense import compile_head
from jax.sharding import NamedSharding

from arcface_jax.config import HeadConfig, OptimizerConfig
from arcface_jax.heads import margin_softmax
from arcface_jax.runtime import devices as meshes

STEPS, B, D = 10, 48, 32


class Trace(NamedTuple):
    """What ten steps gave."""

    losses: np.ndarray
    """(STEPS,)."""
    d_embeddings: np.ndarray
    """(STEPS, B, D)."""
    centers_after_one: np.ndarray
    """(C, D)."""
    centers: np.ndarray
    """(C, D)."""


def run_steps(num_classes: int, *, devices: int, block_size: int, optimizer: str) -> Trace:
    """Embeddings near fixed prototypes of their classes, so that there is something to learn."""
    mesh = meshes.make(devices)
    head = HeadConfig(dtype="float32", gradient="exact", block_size=block_size)
    rule = OptimizerConfig(kind=optimizer)  # pyright: ignore[reportArgumentType]  # one of the two
    rate = 0.1 if optimizer == "sgd" else 1e-3  # as the recipes have them
    rng = np.random.default_rng(0)
    prototypes = rng.normal(size=(num_classes, D)).astype(np.float32)

    def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    @jax.jit
    def init():
        return margin_softmax.init_centers(
            jax.random.key(1),
            num_classes=num_classes,
            embedding_size=D,
            num_devices=devices,
            head=head,
            optimizer=rule,
        )

    apply = compile_head(num_classes, head, rule, devices, rate=rate)
    gather = jax.jit(lambda x: x, out_shardings=meshes.replicated(mesh))
    fresh = jax.tree.map(np.asarray, init())
    centers = fresh._replace(
        rows=place(fresh.rows, meshes.split(mesh)),
        moments={n: place(m, meshes.split(mesh)) for n, m in fresh.moments.items()},
    )
    losses, gradients, after_one = [], [], None
    for step in range(STEPS):
        labels = rng.integers(0, num_classes, B).astype(np.int32)
        embeddings = prototypes[labels] + 0.5 * rng.normal(size=(B, D)).astype(np.float32)
        batch = (place(a, meshes.split(mesh)) for a in (embeddings.astype(np.float32), labels))
        out = apply(*batch, centers, np.int32(step))
        centers = out.centers
        losses.append(float(out.loss))
        gradients.append(np.asarray(gather(out.d_embeddings)))
        if after_one is None:
            after_one = np.asarray(gather(centers.rows))[:num_classes]
    assert after_one is not None
    rows = np.asarray(gather(centers.rows))[:num_classes]
    return Trace(np.array(losses), np.array(gradients), after_one, rows)


if __name__ == "__main__":
    coordinator, process, folder = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=2, process_id=int(process))
    trace = run_steps(1001, devices=8, block_size=64, optimizer="sgd")
    np.savez(Path(folder) / f"{process}.npz", **trace._asdict())
