"""Timing that is robust against a noisy machine, and the machine's own speed."""

import os
import platform
import time
from collections.abc import Callable
from statistics import median

import jax
import jax.numpy as jnp
from jax import lax

from arcface_jax.runtime import memory


def in_turn(runs: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Measures median seconds of each run, in turn, so that all see the same machine load.

    Args:
      runs: functions by name; each returns arrays to wait for.
      repeats: counted rounds, after a warm-up round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def matmul_flops_per_second(dtype: str, *, size: int = 4096, repeats: int = 5) -> float:
    """Measures the FLOP/s of one large matrix product on one device."""
    a = jnp.ones((size, size), dtype)

    @jax.jit
    def product(a):
        return lax.dot(a, a, precision=precision(dtype), preferred_element_type=jnp.float32)

    return 2 * size**3 / in_turn({"product": lambda: product(a)}, repeats=repeats)["product"]


def precision(dtype: str) -> lax.Precision | None:
    """Returns full precision for float32, because recent GPUs would round the operands to TF32."""
    return lax.Precision.HIGHEST if dtype == "float32" else None


def machine() -> dict[str, str | int]:
    """Returns the facts that every table of measurements has to state."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "devices": len(jax.devices()),
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def free_memory() -> int:
    """Returns the bytes that the devices can use together; on CPUs they share the machine's
    memory.
    """
    devices = jax.devices()
    shared = devices[0].platform == "cpu"
    return memory.free_on_device(devices[0]) * (1 if shared else len(devices))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or "CPU"
