"""Measure one item of `python -m benchmarks gpu`: JSON on standard input, the result printed."""

import json
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from arcface_jax import config as configs
from arcface_jax.machine import timing
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import optim, step
from benchmarks import head
from benchmarks.gpu import Item
from benchmarks.step import Case, draw_batch, make_config

# Timed steps, dispatched together as in training.
_STEPS, _TRACED = 20, 3

# The first match in the name of a CUDA kernel or XLA operation determines the kind.
_KINDS = {
    "collectives": r"nccl|all[-_]?(reduce|gather)|reduce[-_]?scatter",
    "attention": r"fmha|flash|attention",
    "convolutions": r"conv|cudnn|wgrad|dgrad|fprop|xmma_implicit",
    "matrix products": r"gemm|cutlass|nvjet|cublas|\bdot|ynn",
    "copies": r"memcpy|memset|copy|transpose",
    "reductions": r"reduce",
    "elementwise": r"fusion|loop|wrapped|add|multiply|select|broadcast|slice|convert",
}


def measure(item: Item) -> dict[str, Any]:
    """Measures a step's time and memory and, if requested, the share of time by kind of kernel."""
    meshes.ask_for_cpu_devices(item.devices)
    run, compiled, seconds_to_compile = (_head if item.kind == "head" else _step)(item)
    memory = compiled.memory_analysis()
    out = jax.block_until_ready(run())
    begin = time.perf_counter()
    for _ in range(_STEPS):
        out = run()
    jax.block_until_ready(out)
    stats = jax.devices()[0].memory_stats() or {}
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "seconds": (time.perf_counter() - begin) / _STEPS,
        "compile_seconds": seconds_to_compile,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compiled_bytes": sizes - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "limit_bytes": stats.get("bytes_limit"),
        **timing.machine(),
        **(_trace(run) if item.trace else {}),
    }


def _step(item: Item) -> tuple[Callable[[], Any], Any, float]:
    """Makes the train step in bfloat16, which passes its state on."""
    case: Any = Case(item.network, item.batch, item.classes, item.devices, "bfloat16")  # pyright: ignore[reportArgumentType]  # names come from items()
    config = make_config(case)
    if item.block_size:
        config = configs.replace(config, head__block_size=item.block_size)
    mesh = meshes.make(item.devices)
    batch = meshes.to_devices(draw_batch(case), mesh)
    state = step.init_state(config, num_classes=case.classes, mesh=mesh)
    held = [step.make_packing(config, mesh).pack(state)]
    del state  # a packed state would duplicate its arrays
    schedule = optim.make_schedule(config.schedule, base_rate=0.1, steps_per_epoch=10**6)
    function: Any = step.make_train_step(
        config, num_classes=case.classes, schedule=schedule, mesh=mesh
    )
    begin = time.perf_counter()
    compiled = function.lower(held[0], batch).compile()
    seconds = time.perf_counter() - begin

    def run() -> Any:
        held[0], metrics = compiled(held[0], batch)
        return metrics

    return run, compiled, seconds


def _head(item: Item) -> tuple[Callable[[], Any], Any, float]:
    """Makes the head's step on random embeddings."""
    case = head.Case(item.classes, item.batch, item.devices, dtype="bfloat16")
    if item.block_size:
        case = case._replace(block_size=item.block_size)
    begin = time.perf_counter()
    method = head.compile_method("blocked", case)
    seconds = time.perf_counter() - begin
    return head.stepper("blocked", method, case), method.run, seconds


def _trace(run: Callable[[], Any]) -> dict[str, Any]:
    """Profiles a step: its kernels, the busy share of time, and each kind's share of it."""
    with tempfile.TemporaryDirectory() as folder:
        out, begin = None, time.perf_counter()
        with jax.profiler.trace(folder):
            for _ in range(_TRACED):
                out = run()
            jax.block_until_ready(out)
            seconds = time.perf_counter() - begin
        (path,) = Path(folder).rglob("*.xplane.pb")
        kernels = _kernels(jax.profiler.ProfileData.from_file(str(path)))
    total = defaultdict(float)
    for name, nanoseconds in kernels:
        total[kind(name)] += nanoseconds
    busy = sum(total.values())
    return {
        "kernels": len(kernels) / _TRACED,
        "busy": 1e-9 * busy / seconds,
        "share_of_time": {name: value / busy for name, value in total.items()} if busy else {},
    }


def _kernels(profile: Any) -> list[tuple[str, float]]:
    """Returns names and nanoseconds of the kernels on the first device; on a CPU, of XLA
    operations.
    """
    planes = [plane for plane in profile.planes if plane.name.startswith("/device:GPU:0")]
    found = []
    for plane in planes or [plane for plane in profile.planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            if planes and not line.name.startswith("Stream"):
                continue  # XLA's own lines repeat the same time by module and operation
            for event in line.events:
                if planes or any(name == "hlo_op" for name, _ in event.stats):
                    found.append((event.name, event.duration_ns))
    return found


def kind(name: str) -> str:
    """Returns the kind of kernel that a name belongs to."""
    for label, pattern in _KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return label
    return "other"


if __name__ == "__main__":
    print(json.dumps(measure(Item(**json.load(sys.stdin)))))
