"""The GPU's program of five runs, compiled for an H100 and kept: docs/gpu.json and docs/gpu.md.

`python -m benchmarks gpu-program` compiles them without a GPU and writes the record, the page's
table and its picture; `make gpu-program` compares the programs with the record.
"""

import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from arcface_jax.config import Config, Network
from arcface_jax.machine import gpu, hlo, roofline
from arcface_jax.machine.gpu import Program
from benchmarks import pages
from benchmarks.step import Case, make_config

DOCS = Path(__file__).parents[1] / "docs"
RECORD, PAGE = DOCS / "gpu.json", DOCS / "gpu.md"
_BEGIN, _END = "<!-- begin: python -m benchmarks gpu-program -->", "<!-- end program -->"
GPU = "h100"


class Figures(NamedTuple):
    """Figures of one program, on each device."""

    temporary_bytes: int
    hbm_bytes: int
    """HBM traffic per step."""
    kernels: int
    """Kernels per step."""


class Subject(NamedTuple):
    """A program that is compared with a bar."""

    network: Network
    classes: int
    each: int
    """Images per device."""
    devices: int
    part: gpu.Part
    before: Figures
    """Figures at commit eac8286."""
    bar: Figures

    def config(self) -> Config:
        """The run; its block size and forms are the automatic ones."""
        return make_config(self.case)

    @property
    def case(self) -> Case:
        """The case for the measuring modules."""
        batch = self.each * self.devices
        return Case(self.network, batch, self.classes, self.devices, "bfloat16")


MB, GB, MIB = 10**6, 10**9, 2**20
SUBJECTS = {
    "r50, 1 M ids, 1 GPU, batch 128": Subject(
        "r50", 1_000_000, 128, 1, "step",
        Figures(3_681_147_224, 91_047 * MB, 11_398), Figures(3_750 * MB, 64 * GB, 3_500),
    ),
    "r50, 1 M ids, 8 GPUs, 128 each": Subject(
        "r50", 1_000_000, 128, 8, "step",
        Figures(3_684_780_376, 46_260 * MB, 4_031), Figures(3_800 * MB, 39 * GB, 1_550),
    ),
    "r100, 2 M ids, 8 GPUs, 128 each": Subject(
        "r100", 2_000_000, 128, 8, "step",
        Figures(14_304_017_240, 123_270 * MB, 8_078), Figures(6_200 * MB, 64 * GB, 3_050),
    ),
    "head, 10 M ids, 8 GPUs, batch 1,024": Subject(
        "r50", 10_000_000, 128, 8, "head",
        Figures(21 * MIB, 95_530 * MB, 11_631), Figures(60 * MIB, 67 * GB, 3_300),
    ),
    "vit_b, 1 M ids, 1 GPU, batch 384": Subject(
        "vit_b", 1_000_000, 384, 1, "step",
        Figures(5_194_872_096, 434_089 * MB, 11_332), Figures(4_800 * MB, 300 * GB, 5_000),
    ),
}  # fmt: skip


def compile_one(subject: Subject) -> Program:
    """Compiles the program for an H100 with XLA.

    Raises:
      UserError: no CUDA plugin is installed.
    """
    return gpu.compile_step(
        subject.config(),
        num_classes=subject.classes,
        gpu=GPU,
        devices=subject.devices,
        part=subject.part,
    )


def figures(program: Program) -> Figures:
    """Returns the figures that are compared with the bars."""
    total = program.module.total
    return Figures(program.temporary_bytes, total.bytes, total.kernels)


def record(program: Program, subject: Subject) -> dict[str, Any]:
    """Returns the entry of a program in docs/gpu.json."""
    module = program.module
    times = roofline.estimate(
        module, roofline.assume(GPU, devices=subject.devices), devices=subject.devices
    )
    return {
        **figures(program)._asdict(),
        "state_bytes": sum(program.state.values()),
        "parts": {name: part._asdict() for name, part in times.parts.items()},
        "modelled_seconds": times.seconds,
        "exposed_collective_seconds": times.exposed,
        "collectives": hlo.count_collectives(module.collectives),
        "first_gradient_sum": first_gradient_sum(module),
        "compile_seconds": round(program.seconds, 1),
    }


def first_gradient_sum(module: hlo.Module) -> float | None:
    """Returns the share of the step's kernels scheduled before the first large all-reduce
    starts.
    """
    large = [c.position for c in module.collectives if c.kind == "all-reduce" and c.bytes > MIB]
    return min(large, default=None)


def measure(names: Sequence[str] = ()) -> dict[str, Any]:
    """Compiles the named subjects, by default all, and writes record, table and picture.

    Raises:
      UserError: no CUDA plugin is installed.
    """
    kept: dict[str, Any] = {"programs": {}}
    if RECORD.exists():
        kept = json.loads(RECORD.read_text())
    for name, subject in SUBJECTS.items():
        if names and not any(part in name for part in names):
            continue
        kept["programs"][name] = record(compile_one(subject), subject)
        kept["compiler"] = gpu.check_plugin()
        kept["jaxlib"] = metadata.version("jaxlib")
        print(f"{name}: {_cell(Figures(*(kept['programs'][name][f] for f in Figures._fields)))}")
    RECORD.write_text(json.dumps(kept, indent=1) + "\n")
    pages.replace(PAGE, table(kept), begin=_BEGIN, end=_END)
    draw(kept, DOCS / "images" / "gpu_traffic.png")
    return kept


def table(kept: dict[str, Any]) -> str:
    """Returns a Markdown table with before, now and bar."""
    lines = [
        "| program | before | now | bar | modeled ms |",
        "|---|---|---|---|---|",
    ]
    for name, subject in SUBJECTS.items():
        found = kept["programs"].get(name)
        if found:
            now = Figures(*(found[field] for field in Figures._fields))
            cells = [_cell(figures) for figures in (subject.before, now, subject.bar)]
            lines.append(
                f"| {' | '.join([name, *cells])} | {1e3 * found['modelled_seconds']:.1f} |"
            )
    return "\n".join(lines)


def _cell(figures: Figures) -> str:
    if figures.temporary_bytes < GB:
        memory = f"{figures.temporary_bytes / MIB:.0f} MiB"
    else:
        memory = f"{figures.temporary_bytes / GB:.2f} GB"
    return f"{memory} / {figures.hbm_bytes / GB:.1f} GB / {figures.kernels:,} kernels"


_PARTS = {
    "convolutions": "convolutions, linear layers",
    "batch_norm_elementwise": "BatchNorm, elementwise",
    "head": "head",
    "optimizer": "optimizer",
    "other": "other",
}


def draw(kept: dict[str, Any], path: Path) -> None:
    """Plots traffic and modeled time of each program, by part."""
    names = [name for name in SUBJECTS if name in kept["programs"]]
    figure = Figure(figsize=(10, 0.62 * len(names) + 1.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, (field, unit, title) in zip(
        panels, (("bytes", 1e9, "HBM traffic a step, GB"), ("seconds", 1e-3, "modeled ms a step")),
        strict=True,
    ):  # fmt: skip
        left = [0.0] * len(names)
        for number, (part, label) in enumerate(_PARTS.items()):
            values = [kept["programs"][name]["parts"][part][field] / unit for name in names]
            axis.barh(names, values, left=left, label=label, color=f"C{number}")
            left = [a + b for a, b in zip(left, values, strict=True)]
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=9)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)
