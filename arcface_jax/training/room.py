"""Refuse a state that does not fit into memory, before anything is allocated."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from arcface_jax.errors import CheckpointError, ConfigError
from arcface_jax.runtime import memory
from arcface_jax.training import manifest
from arcface_jax.training.step import TrainState

_GIB = 2**30
_FIX = "`arcface-jax plan RECIPE --devices N` shows what each device needs, activations included"


def require(state: TrainState, program: jax.stages.Compiled, *, mesh: Mesh) -> None:
    """Checks that a state fits into the memory of every process's devices while it is made.

    A collective operation: all processes raise, or none.

    Args:
      state: abstract state, placed on the mesh.
      program: the program that makes it, from `step.compile_init`.
      mesh: the devices.

    Raises:
      ConfigError: with the memory needed, the memory free, and what to change.
    """
    held = manifest.state_bytes(state)
    own = mesh.local_devices
    on_cpu = own[0].platform == "cpu"
    copies = len(own) if on_cpu else 1  # CPU devices share one memory
    needed = copies * (sum(held.values()) + _temporary(program))
    free = memory.free_on_host() if on_cpu else min(map(memory.free_on_device, own))
    lacking = _most_lacking(needed, free)
    if lacking is None:
        return
    process, needed, free = lacking
    parts = {
        "class centers": held["centers"],
        "their optimizer": held["centers_optimizer"],
        "backbone": sum(held.values()) - held["centers"] - held["centers_optimizer"],
        "while it is initialized": _temporary(program),
    }
    shown = ", ".join(f"{name} {copies * size / _GIB:.1f}" for name, size in parts.items())
    place = "the host" if on_cpu else "each device"
    where = "" if jax.process_count() == 1 else f" in process {process}"
    change = "a host with more memory" if on_cpu else "more devices"
    raise ConfigError(
        f"the training state needs {needed / _GIB:.1f} GiB on {place} ({shown}), and "
        f"{free / _GIB:.1f} GiB are free{where}. Use fewer classes or {change}: {_FIX}"
    )


def _temporary(program: jax.stages.Compiled) -> int:
    """Returns the bytes on each device that a program uses in addition to its result."""
    sizes: Any = program.memory_analysis()
    return 0 if sizes is None else sizes.temp_size_in_bytes


def _most_lacking(needed: int, free: int) -> tuple[int, int, int] | None:
    """Returns (process, bytes needed, bytes free) with the largest shortage; None if all fit."""
    if jax.process_count() == 1:
        return (0, needed, free) if needed > free else None
    mib = np.array([needed, free]) // 2**20  # int32 is limited to 2 GiB in bytes
    everywhere = multihost_utils.process_allgather(mib.astype(np.int32))
    lacks = everywhere[:, 0] - everywhere[:, 1]
    worst = int(np.argmax(lacks))
    if lacks[worst] <= 0:
        return None
    return worst, int(everywhere[worst, 0]) * 2**20, int(everywhere[worst, 1]) * 2**20


def require_to_read(arrays: Any, workdir: Path, device: Any = None) -> None:
    """Checks that stored arrays fit into this process's memory before they are read.

    Args:
      arrays: objects with shapes and types.
      workdir: workdir of the run that stored them.
      device: JAX device to read them to; None is the host.

    Raises:
      CheckpointError: they do not fit.
    """
    needed = sum(
        int(np.prod(x.shape, dtype=np.int64)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(arrays)
    )
    free = memory.free_on_host() if device is None else memory.free_on_device(device)
    if needed > free:
        raise CheckpointError(
            f"reading {workdir} needs {needed / _GIB:.1f} GiB, and {free / _GIB:.1f} GiB are free: "
            "use a machine with more memory, or end other programs"
        )


@contextlib.contextmanager
def reporting_exhaustion() -> Iterator[None]:
    """Turns JAX's report of a failed allocation into one line.

    Raises:
      ConfigError: memory ran out in the block.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "ut of memory" in text:
            first = (text.splitlines() or ["MemoryError"])[0]
            raise ConfigError(
                f"out of memory while the state was made ({first}). "
                f"Use fewer classes or more devices: {_FIX}"
            ) from error
        raise
