"""Embeds images on eight devices of two processes.

python embed_in_processes.py COORDINATOR PROCESS FOLDER
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from arcface_jax.evaluation import embed
from arcface_jax.runtime import devices as meshes


@jax.jit
def sums(images: jax.Array) -> jax.Array:
    """(B, 2): the first row of the image, and all of it."""
    x = images.astype(jnp.float32)
    return jnp.stack([x[:, 0].sum((1, 2)), x.sum((1, 2, 3))], axis=1)


if __name__ == "__main__":
    coordinator, process, folder = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=2, process_id=int(process))
    mine: list[int] = []

    def on_devices(batch: jax.Array) -> jax.Array:
        mine.extend(len(shard.data) for shard in batch.addressable_shards)
        return sums(batch)

    images = np.random.default_rng(0).integers(0, 256, (41, 12, 10, 3), np.uint8)
    out = embed.batched(on_devices, batch_size=16, mesh=meshes.make(8))(images)
    np.savez(Path(folder) / f"{process}.npz", out=out, mine=np.array(mine))
