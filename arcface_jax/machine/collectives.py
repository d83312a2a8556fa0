"""Measure what the devices of a mesh exchange in a step, and how long that takes."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from arcface_jax.machine import timing
from arcface_jax.runtime import devices as meshes
from arcface_jax.runtime.devices import AXIS


class Traffic(NamedTuple):
    """One collective of a step."""

    bytes: float
    """Bytes that a device sends per step if the devices form a ring."""
    seconds: float
    """Median time."""

    @property
    def rate(self) -> float:
        """Bytes per second sent by one device."""
        return self.bytes / self.seconds


def measure(
    mesh: Mesh,
    *,
    batch: int,
    size: int,
    parameters: int,
    head_dtype: str,
    head_reduce_dtype: str,
    reduce_dtype: str,
) -> dict[str, Traffic]:
    """Times the three large collectives of a train step, at its sizes.

    A ring of n sends (n - 1) / n of the array in an all-gather or reduce-scatter, and twice that
    in an all-reduce (Patarasuk and Yuan, JPDC 2009).

    Args:
      mesh: at least two devices.
      batch: B over all devices.
      size: D of an embedding.
      parameters: parameters of the backbone, whose gradient is summed.
      head_dtype: type in which the head gathers embeddings.
      head_reduce_dtype: type in which their gradient is summed.
      reduce_dtype: type in which the backbone's gradient is summed.
    """
    apart = partial(jax.shard_map, mesh=mesh, check_vma=False)
    scatter = partial(lax.psum_scatter, axis_name=AXIS, scatter_dimension=0, tiled=True)
    runs = {
        "all_gather": apart(
            lambda x: lax.all_gather(x, AXIS, tiled=True), in_specs=P(AXIS), out_specs=P()
        ),
        "reduce_scatter": apart(scatter, in_specs=P(), out_specs=P(AXIS)),
        "all_reduce": apart(lambda x: lax.psum(x, AXIS), in_specs=P(), out_specs=P()),
    }
    split, whole = meshes.split(mesh), meshes.replicated(mesh)
    arrays = {
        "all_gather": jnp.ones((batch, size), head_dtype, device=split),
        "reduce_scatter": jnp.ones((batch, size), head_reduce_dtype, device=whole),
        "all_reduce": jnp.ones((parameters,), reduce_dtype, device=whole),
    }
    compiled = {name: partial(jax.jit(run), arrays[name]) for name, run in runs.items()}
    seconds = timing.in_turn(compiled, repeats=5)
    share = (mesh.size - 1) / mesh.size
    sent = {name: share * array.nbytes for name, array in arrays.items()}
    sent["all_reduce"] *= 2
    return {name: Traffic(sent[name], seconds[name]) for name in runs}
