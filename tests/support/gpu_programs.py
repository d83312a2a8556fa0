"""Compiles the small programs of tests/machine/programs again, where a CUDA plugin is installed.

    JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python tests/support/gpu_programs.py

The files are committed, so that the tests need no plugin. Names of source files are shortened.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from arcface_jax.machine import gpu

FOLDER = Path(__file__).parents[1] / "machine" / "programs"


def elementwise(x, y):
    """Two reads and one write."""
    return 2 * x + y


def row_sums(x):
    """One read, and a write that is small."""
    return jnp.sum(x.astype(jnp.float32), axis=1)


def blocks(x, centers):
    """Blocks of 256 rows: a product with each, and an update of each in place."""

    def body(i, carry):
        total, centers = carry
        block = lax.dynamic_slice_in_dim(centers, 256 * i, 256)
        product = lax.dot_general(
            x,
            block.astype(jnp.bfloat16),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        moved = lax.dynamic_update_slice_in_dim(centers, 0.9 * block, 256 * i, 0)
        return total + jnp.sum(product, axis=1), moved

    return lax.fori_loop(0, centers.shape[0] // 256, body, (jnp.zeros(len(x)), centers))


def convolution(x, kernel, d_out):
    """A 3x3 convolution and its two gradients."""

    def forward(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    out, pull = jax.vjp(forward, x, kernel)
    return out, pull(d_out)


def sums_over_devices(x):
    """An all-reduce."""
    return lax.psum(x, "data")


def main() -> None:
    """Writes a file for each function."""
    found = topologies.get_topology_desc(
        platform="cuda", topology="1x1x8", target_config=gpu.description("h100")
    )
    mesh = Mesh(np.array(found.devices), ("data",))
    one = NamedSharding(Mesh(np.array(found.devices[:1]), ("data",)), P())
    split = NamedSharding(mesh, P("data"))

    def array(shape, dtype, sharding=one):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    square = array((1024, 1024), jnp.float32)
    image = array((8, 28, 28, 64), jnp.bfloat16)
    programs = {
        elementwise: (square, square),
        row_sums: (array((4096, 512), jnp.bfloat16),),
        blocks: (array((128, 512), jnp.bfloat16), array((64 * 256, 512), jnp.float32)),
        convolution: (image, array((3, 3, 64, 64), jnp.bfloat16), image),
    }
    for function, arguments in programs.items():
        donated = {blocks: (1,)}.get(function, ())
        write(function.__name__, jax.jit(function, donate_argnums=donated).lower(*arguments))
    summed = jax.shard_map(sums_over_devices, mesh=mesh, in_specs=P("data"), out_specs=P())
    write("sums_over_devices", jax.jit(summed).lower(array((8 * 1024, 256), jnp.float32, split)))


def write(name: str, lowered) -> None:
    """The program's text, without this machine's folders."""
    text = re.sub(r'"/[^"]*/([^"/]+\.py)"', r'"\1"', lowered.compile().as_text())
    (FOLDER / f"{name}.hlo").write_text(text)


if __name__ == "__main__":
    main()
