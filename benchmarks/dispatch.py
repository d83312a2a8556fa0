"""Measure the host's overhead per step: the train step's call without the devices' work.

The call's cost depends on the number of arrays, their names and placements, not on their sizes. A
stand-in for the step therefore maps the same tree, with the same donation and placement, but with
every array reduced to one number per device, to which it adds one. Its result is waited for, so its
time is an upper bound on the host's.
"""

import time
from statistics import median
from typing import NamedTuple

import jax
import jax.numpy as jnp

from arcface_jax.runtime import devices as meshes
from arcface_jax.training import step
from benchmarks.step import Case, draw_batch, make_config


class Overhead(NamedTuple):
    """Overhead of the host per step."""

    arrays: int
    """Number of arrays in the state."""
    call_seconds: float
    """Median time of the call, with one addition per array."""
    batch_seconds: float
    """Median time to transfer a batch of the real size to the devices."""


def measure(case: Case, *, repeats: int = 200) -> Overhead:
    """Times the call on a state of one-number arrays, and the transfer of real batches."""
    config, mesh = make_config(case), meshes.make(case.devices)
    full = step.abstract_state(config, num_classes=case.classes, mesh=mesh)

    def shrink(array: jax.ShapeDtypeStruct) -> jax.Array:
        across = array.sharding == meshes.split(mesh)
        return jax.device_put(jnp.zeros((mesh.size if across else 1,), array.dtype), array.sharding)

    state = jax.tree.map(shrink, full)
    images = draw_batch(case)
    names = _metric_names(case)
    placed = (step.shardings(mesh), meshes.replicated(mesh))

    def add(state, batch):
        metrics = dict.fromkeys(names, batch["label"][0].astype(jnp.float32))
        return jax.tree.map(lambda a: a + jnp.ones((), a.dtype), state), metrics

    call = jax.jit(add, donate_argnums=0, out_shardings=placed)
    calls, batches = [], []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        batch = jax.block_until_ready(meshes.to_devices(images, mesh))
        batches.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        state, metrics = call(state, batch)
        jax.block_until_ready((state, metrics))
        calls.append(time.perf_counter() - begin)
    return Overhead(len(jax.tree.leaves(state)), median(calls[1:]), median(batches[1:]))


def _metric_names(case: Case) -> list[str]:
    """Returns the names of the real step's metrics, from its shapes."""
    config, mesh = make_config(case), meshes.make(case.devices)
    train_step = step.make_train_step(
        config, num_classes=case.classes, schedule=lambda _: jnp.float32(0.1), mesh=mesh
    )
    state = step.abstract_state(config, num_classes=case.classes, mesh=mesh)
    batch = {name: jax.typeof(jnp.asarray(array)) for name, array in draw_batch(case).items()}
    return list(jax.eval_shape(train_step, state, batch)[1])
