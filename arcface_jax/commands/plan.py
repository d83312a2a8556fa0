"""Report the memory that a run needs on each device, and where its time goes, before it starts.

    arcface-jax plan ms1mv3_r50 --devices 8 --num-classes 93431
    arcface-jax plan ms1mv3_r50 --devices 8 --num-classes 93431 --gpu h200 --output plans/r50
    arcface-jax plan my_recipe.py --devices 8 --memory 40 --data.global-batch-size 1024

Takes all options of `train`, and those below. Needs no GPU and runs nothing: it compiles the train
step for N GPUs if JAX's CUDA plugin is installed (the extra gpu-plan-cuda12 or gpu-plan-cuda13),
and for N CPU devices otherwise.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arcface_jax import errors
from arcface_jax.commands import Result, command, console
from arcface_jax.config import Config, command_line, loading
from arcface_jax.machine.gpu import GpuName
from arcface_jax.runtime.files import atomic_files, write_atomic

if TYPE_CHECKING:
    from rich.table import Table

    from arcface_jax.machine.plan import Plan
    from arcface_jax.machine.roofline import Roofline


@dataclass(frozen=True)
class Arguments:
    """Options that are not part of a recipe."""

    gpu: GpuName = "h100"
    """The GPU to plan for."""
    memory: float | None = None
    """Memory of one device in GiB; by default the GPU's, 79.1 for an H100 of 80 GB."""
    num_classes: int | None = None
    """Number of identities to plan for, 93431 in MS1MV3; by default taken from data.path."""
    output: Path | None = None
    """Folder for plan.json, and for plan.png if the program is a GPU's."""


_LABELS = {
    "parameters": "backbone's parameters (whole)",
    "batch_norm": "BatchNorm's statistics (whole)",
    "optimizer": "backbone's optimizer (whole)",
    "centers": "class centers (its part)",
    "centers_optimizer": "centers' optimizer (its part)",
    "running_mean": "running mean of the weights (whole)",
    "scalars": "counters, margin's state (whole)",
    "batch": "uint8 images, labels (its part)",
    "activations": "activations and temporaries",
    "head": "the head's temporaries",
    "cudnn_workspace": "cuDNN's workspace (allowed for)",
    "cuda_context": "CUDA context (allowed for)",
    "nccl": "NCCL's buffers (allowed for)",
}
_PARTS = {
    "convolutions": "convolutions and products",
    "batch_norm_elementwise": "BatchNorm and elementwise",
    "head": "head",
    "optimizer": "optimizer",
    "other": "other",
}


@command
def main(words: Sequence[str], *, prog: str = "arcface-jax plan") -> Result:
    """Prints bytes by name, and the largest run that fits."""
    arguments, others = command_line.parse_known(
        Arguments, words, prog=f"{prog} RECIPE", description=__doc__ or ""
    )
    config = loading.load(others, prog=prog)
    if arguments.memory is not None and not 0 < arguments.memory < math.inf:
        raise errors.UserError(
            f"--memory {arguments.memory:g} must be above 0: GiB of a device, 80 for an H100"
        )
    from arcface_jax.machine import plan

    plan.use_cpu_devices(config.devices)
    num_classes, origin = plan.count_classes(config.data, arguments.num_classes, seed=config.seed)
    cache, of_cache = _teacher_cache(config, needs_data=arguments.num_classes is None)
    planned, notes = _make(config, arguments, num_classes=num_classes)
    print(f"{config.model.network}, {num_classes:,} classes ({origin}), devices {config.devices}")
    console().print(_table(planned))
    if planned.program is not None:
        console().print(_parts_table(planned.program))
        if planned.collectives:
            console().print(_collectives_table(planned))
    lines = plan.in_words(planned, config.model, num_classes=num_classes)
    print(*lines, *of_cache, *notes, sep="\n")
    return Result(planned.results() | cache, files=_write(planned, arguments.output))


def _teacher_cache(config: Config, *, needs_data: bool) -> tuple[dict[str, int], list[str]]:
    """Returns the disk space of the teacher's cache for RESULT, and lines about it.

    Args:
      config: the run.
      needs_data: whether the plan depends on the training set; with --num-classes it does not.
    """
    from arcface_jax.machine import plan

    if not config.data.path:
        return {}, []
    try:
        size, line = plan.teacher_disk(config)
    except errors.UserError as error:
        if needs_data:
            raise
        return {}, [f"teacher's cache: its disk space is unknown without the data ({error})"]
    return ({"disk/teacher": size}, [line]) if size else ({}, [])


def _make(
    config: Config, arguments: Arguments, *, num_classes: int
) -> tuple["Plan", Sequence[str]]:
    """Makes the plan, and lines about its backend."""
    from arcface_jax.machine import gpu, gpu_plan, plan

    size = arguments.memory
    memory = None if size is None else int(size * plan.GIB)
    try:
        plugin = gpu.check_plugin()
    except errors.UserError as missing:
        note = f"these figures are for XLA's CPU backend, not for {arguments.gpu}: {missing}"
        memory = memory or gpu.target(arguments.gpu).memory
        return plan.make(config, num_classes=num_classes, memory=memory), [note]
    planned = gpu_plan.make(config, num_classes=num_classes, name=arguments.gpu, memory=memory)
    assert planned.program is not None  # a GPU's plan has a program
    found = planned.program
    modeled = (
        f"modeled step: {1e3 * found.seconds:.1f} ms, "
        f"{planned.measured[0] / found.seconds:,.0f} images/s on {config.devices} GPU(s); "
        f"collectives take {1e3 * found.collectives:.2f} ms, of which "
        f"{1e3 * found.exposed:.2f} are exposed"
    )
    assumed = found.assumptions.lines()
    return planned, [gpu_plan.ALLOWANCES, modeled, *assumed, f"compiled with {plugin}"]


def _table(planned: "Plan") -> "Table":
    """Makes the table of bytes on each device by name."""
    from arcface_jax.runtime import tables

    rows = tables.new(None, ["MiB"], names=[f"on each device ({planned.backend})"])
    for name, size in planned.needed.items():
        rows.add_row(_LABELS[name], f"{size / 2**20:,.1f}")
    rows.add_section()
    rows.add_row("total", f"{planned.total / 2**20:,.1f}")
    rows.add_row(f"JAX's share ({planned.share:.0%})", f"{planned.usable / 2**20:,.1f}")
    if planned.outside:
        rows.add_section()
        for name, size in planned.outside.items():
            rows.add_row(_LABELS[name], f"{size / 2**20:,.1f}")
        beside = planned.memory - planned.usable
        rows.add_row("beside JAX's share", f"{beside / 2**20:,.1f}")
    return rows


def _parts_table(found: "Roofline") -> "Table":
    """Makes the table of kernels, traffic, operations and modeled time by part of a step."""
    from arcface_jax.runtime import tables

    heads = ["kernels", "HBM GB", "GFLOP", "modeled ms"]
    rows = tables.new(None, heads, names=["a step, on each device"])
    for name, part in found.parts.items():
        rows.add_row(
            _PARTS[name],
            f"{part.kernels:,}",
            f"{part.bytes / 1e9:.2f}",
            f"{part.flops / 1e9:,.0f}",
            f"{1e3 * part.seconds:.2f}",
        )
    parts = found.parts.values()
    rows.add_section()
    rows.add_row(
        "total",
        f"{sum(part.kernels for part in parts):,}",
        f"{sum(part.bytes for part in parts) / 1e9:.2f}",
        f"{sum(part.flops for part in parts) / 1e9:,.0f}",
        f"{1e3 * sum(part.seconds for part in parts):.2f}",
    )
    return rows


def _collectives_table(planned: "Plan") -> "Table":
    """Makes the table of what the devices exchange in a step."""
    from arcface_jax.runtime import tables

    rows = tables.new(None, ["number", "MiB"], names=["collectives of a step"])
    for kind, (number, size) in planned.collectives.items():
        rows.add_row(kind, str(number), f"{size / 2**20:.3f}")
    return rows


def _write(planned: "Plan", folder: Path | None) -> list[Path]:
    """Writes plan.json and plan.png."""
    if folder is None:
        return []
    files = [folder / "plan.json"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(files[0], json.dumps(planned.results(), indent=2) + "\n")
        if planned.program is not None:
            files.append(_draw(planned, planned.program, folder / "plan.png"))
    except OSError as error:
        raise errors.UserError(f"cannot write to {folder}: {error.strerror}") from error
    return files


def _draw(planned: "Plan", found: "Roofline", path: Path) -> Path:
    """Draws two stacked bars: the memory of a device, and the time of a step."""
    from matplotlib.figure import Figure

    kept = ("parameters", "batch_norm", "optimizer", "running_mean", "scalars")
    needed = planned.needed
    memory = {
        "backbone's state": sum(needed[name] for name in kept),
        "class centers": needed["centers"],
        "centers' optimizer": needed["centers_optimizer"],
        "batch": needed["batch"],
        "activations": needed["activations"],
        "head's temporaries": needed["head"],
        "cuDNN's workspace (allowed)": needed["cudnn_workspace"],
    }
    time = {_PARTS[name]: 1e3 * part.seconds for name, part in found.parts.items()}
    time["exposed collectives"] = 1e3 * found.exposed
    figure = Figure(figsize=(9, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    _bar(upper, {name: size / 2**30 for name, size in memory.items()}, unit="GiB")
    limit = planned.usable / 2**30
    upper.axvline(limit, color="black", linestyle="--", linewidth=1)
    upper.set_xlim(0, 1.05 * max(limit, planned.total / 2**30))
    upper.set_title(f"memory of each device, GiB; dashed: the {planned.share:.0%} that JAX takes")
    _bar(lower, time, unit="ms")
    lower.set_title("modeled time of a step, ms")
    figure.suptitle(f"global batch {planned.measured[0]}, {planned.backend}", fontsize=11)
    with atomic_files(path) as part:
        figure.savefig(part, dpi=120)
    return path


def _bar(axis, values: dict[str, float], *, unit: str) -> None:
    """Draws one bar of stacked parts, without those below 0.2 %."""
    left, total = 0.0, sum(values.values())
    for number, (name, value) in enumerate(values.items()):
        if value >= 0.002 * total:
            axis.barh(0, value, left=left, color=f"C{number}", label=f"{name} {value:.2f} {unit}")
            left += value
    axis.set_yticks([])
    axis.set_ylim(-0.5, 0.5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=8, frameon=False)
