"""The device mesh: one axis, "data", over which both the batch and the class centers are split."""

import contextlib
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from arcface_jax.errors import ConfigError

AXIS = "data"
GPU_PLATFORMS = ("gpu", "cuda", "rocm")
"""Platforms of GPUs: devices and compile-only topologies use different names."""
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def make(num_devices: int | Literal["own"] | None = None) -> Mesh:
    """Makes a mesh of the first `num_devices` devices, of all, or of this process's own.

    Raises:
      ConfigError: there are fewer devices.
    """
    devices = jax.local_devices() if num_devices == "own" else jax.devices()
    wanted = num_devices if isinstance(num_devices, int) else len(devices)
    if not 1 <= wanted <= len(devices):
        raise ConfigError(
            f"devices {wanted}: this machine has {len(devices)} ({devices[0].platform}); "
            f"use 1 to {len(devices)}, or leave the option out to use all"
        )
    if wanted < len(devices) and jax.process_count() > 1:
        raise ConfigError(
            f"devices {wanted}: the {jax.process_count()} processes of this run have "
            f"{len(devices)} together, and all take part; leave the option out, or start fewer "
            "processes"
        )
    # Auto: the partitioner splits the backbone's step; JAX's default would require sharding in
    # types.
    return jax.make_mesh((wanted,), (AXIS,), (AxisType.Auto,), devices=devices[:wanted])


def is_gpu(mesh: Mesh) -> bool:
    """Returns whether a mesh consists of GPUs, present or only compiled for."""
    return mesh.devices.flat[0].platform in GPU_PLATFORMS


def ask_for_cpu_devices(count: int) -> None:
    """Makes the CPU count as at least `count` devices, if JAX has not initialized it yet."""
    now: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]  # set
    if count > now:
        with contextlib.suppress(RuntimeError):  # already initialized
            jax.config.update("jax_num_cpu_devices", count)


def compute_capability(mesh: Mesh) -> float:
    """Returns the compute capability of a mesh's NVIDIA GPUs, such as 9.0; 0 for other devices.

    The GPUs need not be in this machine: a program may be compiled for others.
    """
    device = mesh.devices.flat[0]
    found = re.fullmatch(r"\d+\.\d", str(getattr(device, "compute_capability", "")))
    return float(found[0]) if found and is_gpu(mesh) else 0.0


def split(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the first axis over the devices: batches, embeddings, class
    centers.
    """
    return NamedSharding(mesh, P(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a whole array on every device: the backbone."""
    return NamedSharding(mesh, P())


def own_part(array: jax.Array) -> np.ndarray:
    """Returns this host's part of an array that is split along its first axis."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places this host's part of a batch, (b, ...), as part of the global arrays (B, ...)."""
    sharding = split(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def ahead(items: Iterator[_In], send: Callable[[_In], _Out], *, count: int) -> Generator[_Out]:
    """Applies `send` to each item in a thread, while earlier results are in use.

    Args:
      items: for example batches; only read by the thread.
      send: for example `to_devices`.
      count: number of results to keep ready.

    Returns:
      A generator; an error of `items` or `send` is raised in place of its item.
    """

    def fetch() -> tuple[_Out] | None:
        for item in items:
            return (send(item),)
        return None

    with ThreadPoolExecutor(1, thread_name_prefix="to-devices") as thread:
        ready = deque(thread.submit(fetch) for _ in range(count))
        try:
            while (item := ready.popleft().result()) is not None:
                ready.append(thread.submit(fetch))
                yield item[0]
        finally:
            thread.shutdown(wait=True, cancel_futures=True)
