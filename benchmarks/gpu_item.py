"""Measure one item of `python -m benchmarks gpu`: JSON on standard input, the result printed.

The argument is a folder: profiled programs leave their text and their trace there.
"""

import gzip
import json
import re
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from arcface_jax.machine import gpu, hlo, roofline, timing
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import optim, step
from benchmarks import head
from benchmarks.gpu import Item, file_name
from benchmarks.step import Case, draw_batch, make_config

# Timed steps, dispatched together as in training.
_STEPS, _TRACED = 20, 3
# Kernels listed by name, those with the most time.
_LISTED = 40
# Blocks and forms of the head that are compared.
_FORMS = (
    *(("scaled", size) for size in (2048, 8192, 16384, 32768)),
    *(("powers", size) for size in (8192, 16384)),
    ("unit", 8192),
)

# The first match in the name of a CUDA kernel or XLA operation determines the kind.
_KINDS = {
    "collectives": r"nccl|all[-_]?(reduce|gather)|reduce[-_]?scatter",
    "attention": r"fmha|flash|sdpa|attention",
    "convolutions": r"conv(?!ert)|cudnn|wgrad|dgrad|fprop|xmma_implicit",
    "matrix products": r"gemm|cutlass|nvjet|cublas|\bdot|ynn",
    "copies": r"memcpy|memset|copy|transpose|nhwc|nchw",
    "reductions": r"reduce",
    "elementwise": r"fusion|loop|wrapped|add|multiply|select|broadcast|slice|convert",
}


def measure(item: Item, folder: Path) -> dict[str, Any]:
    """Measures a step's time and memory and, if requested, the share of time by kind of kernel."""
    meshes.ask_for_cpu_devices(item.devices)
    if item.kind == "forms":
        return {"forms": dict(_forms(item)), **timing.machine()}
    run, compiled, seconds_to_compile = (_head if item.kind == "head" else _step)(item)
    memory = compiled.memory_analysis()
    seconds = _seconds(run)
    stats = jax.devices()[0].memory_stats() or {}
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes
    found = {
        "seconds": seconds,
        "compile_seconds": seconds_to_compile,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compiled_bytes": sizes - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "limit_bytes": stats.get("bytes_limit"),
        **timing.machine(),
    }
    if item.trace:
        try:
            found |= _profile(run, compiled.as_text(), item, folder)
        except Exception as error:  # whatever goes wrong, the times above are kept
            found["profile_failed"] = f"{type(error).__name__}: {error}"
    return found


def _seconds(run: Callable[[], Any]) -> float:
    """Measures the mean of steps dispatched together, after two others."""
    run()
    jax.block_until_ready(run())
    begin = time.perf_counter()
    jax.block_until_ready([run() for _ in range(_STEPS)])
    return (time.perf_counter() - begin) / _STEPS


def _forms(item: Item) -> Iterator[tuple[str, float | str]]:
    """Yields names and seconds of the head's forms, or why one has none."""
    for form, block_size in _FORMS:
        name = f"{form} {block_size:,}"
        try:
            run, _, _ = _head(item, block_form=form, block_size=block_size)
            yield name, _seconds(run)
        except jax.errors.JaxRuntimeError as error:  # out of memory, for instance
            yield name, str(error).splitlines()[0]
        run = None  # the centers of one form at a time


def _step(item: Item) -> tuple[Callable[[], Any], Any, float]:
    """Makes the train step in bfloat16, which passes its state on."""
    case: Any = Case(item.network, item.batch, item.classes, item.devices, "bfloat16")  # pyright: ignore[reportArgumentType]  # names come from items()
    config = make_config(case)
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


def _head(item: Item, **form: Any) -> tuple[Callable[[], Any], Any, float]:
    """Makes the head's step on random embeddings, in the automatic form or a given one."""
    case = head.Case(item.classes, item.batch, item.devices, dtype="bfloat16", **form)
    begin = time.perf_counter()
    method = head.compile_method("blocked", case)
    seconds = time.perf_counter() - begin
    return head.stepper("blocked", method, case), method.run, seconds


def _profile(run: Callable[[], Any], text: str, item: Item, folder: Path) -> dict[str, Any]:
    """Profiles a step: its kernels, the busy share of time, each kind's share of it, and the
    longest kernels; and models its time.

    `folder` gets `NAME.txt.gz`, the scheduled program, and `NAME.xplane.pb`, the profile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / f"{file_name(item)}.txt.gz", "wt") as file:
        file.write(text)
    with tempfile.TemporaryDirectory() as temporary:
        with jax.profiler.trace(temporary):
            jax.block_until_ready([run() for _ in range(_TRACED)])
        (path,) = Path(temporary).rglob("*.xplane.pb")
        kernels = _kernels(jax.profiler.ProfileData.from_file(str(path)))
        shutil.copy(path, folder / f"{file_name(item)}.xplane.pb")
    module = hlo.parse(text) if jax.default_backend() == "gpu" else None
    return {
        **summary(kernels, _parts(module) if module else {}),
        **(_modeled(module, item.devices) if module else {}),
    }


def summary(kernels: Sequence["Ran"], parts: Mapping[str, str]) -> dict[str, Any]:
    """Returns a step's number of kernels, the share of time in which one runs, shares of time by
    kind, seconds by part, and the longest kernels.

    Args:
      kernels: those of `_TRACED` steps.
      parts: the part of the step that each instruction belongs to, by its kernel's name.
    """
    kinds, by_part, by_name = defaultdict(float), defaultdict(float), defaultdict(list)
    for kernel in kernels:
        part = _part(kernel, parts)
        kinds[kind(kernel.name)] += kernel.nanoseconds
        by_part[part] += kernel.nanoseconds
        by_name[kernel.name, part].append(kernel.nanoseconds)
    total = sum(kinds.values())
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    return {
        "kernels": len(kernels) / _TRACED,
        "busy": _busy(kernels),
        "share_of_time": {name: value / total for name, value in kinds.items()} if total else {},
        "seconds_by_part": {name: 1e-9 * ns / _TRACED for name, ns in by_part.items()},
        "longest_kernels": [
            {
                "name": name,
                "part": part,
                "runs": len(runs) / _TRACED,
                "seconds": 1e-9 * sum(runs) / _TRACED,
            }
            for (name, part), runs in longest[:_LISTED]
        ],
    }


def _busy(kernels: Sequence["Ran"]) -> float:
    """Returns the share of the time from the first kernel to the last in which one runs."""
    covered, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        end = kernel.start + kernel.nanoseconds
        covered += max(0.0, end - max(kernel.start, until))
        until = max(until, end)
    first = min((kernel.start for kernel in kernels), default=0.0)
    return covered / (until - first) if covered else 0.0


def _parts(module: hlo.Module) -> dict[str, str]:
    """Returns the part of the step of each instruction, by the name of its kernel."""
    return {_kernel_name(kernel.name): kernel.part for kernel in module.kernels}


def _kernel_name(instruction: str) -> str:
    return re.sub(r"\W", "_", instruction)


def _part(kernel: "Ran", parts: Mapping[str, str]) -> str:
    """Returns the part that a kernel belongs to.

    Its instruction tells, which in CUDA graphs is the graph's; there XLA's own kernels are known by
    name and those of cuDNN and cuBLAS are not.
    """
    names = (_kernel_name(name) for name in (kernel.instruction, kernel.name))
    return next((parts[name] for name in names if name in parts), "unknown")


def _modeled(module: hlo.Module, devices: int) -> dict[str, float]:
    """Returns the program's traffic and, for the GPUs that are known, its modeled time."""
    found: dict[str, float] = {"hbm_bytes": module.total.bytes}
    name = gpu.name_of(jax.devices()[0].device_kind)
    if name is not None:
        assumed = roofline.assume(name, devices=devices)
        found["modeled_seconds"] = roofline.estimate(module, assumed, devices=devices).seconds
    return found


class Ran(NamedTuple):
    """One run of a kernel in a profile."""

    name: str
    """Name of the CUDA kernel; on a CPU, of the XLA operation."""
    instruction: str
    """Name of the XLA instruction that launched it, or of its CUDA graph."""
    start: float
    """Nanoseconds since some event."""
    nanoseconds: float


def _kernels(profile: Any) -> list[Ran]:
    """Returns the kernels on the first device; on a CPU, XLA's operations."""
    planes = [plane for plane in profile.planes if plane.name.startswith("/device:GPU:0")]
    found = []
    for plane in planes or [plane for plane in profile.planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            if planes and not line.name.startswith("Stream"):
                continue  # XLA's own lines repeat the same time by module and operation
            for event in line.events:
                launched_by = next((str(x) for name, x in event.stats if name == "hlo_op"), "")
                if planes or launched_by:
                    times = (event.start_ns, event.duration_ns)
                    found.append(Ran(event.name, launched_by, *times))
    return found


def kind(name: str) -> str:
    """Returns the kind of kernel that a name belongs to."""
    for label, pattern in _KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return label
    return "other"


if __name__ == "__main__":
    print(json.dumps(measure(Item(**json.load(sys.stdin)), Path(sys.argv[1]))))
