"""Compile runs for absent GPUs: the tables of docs/benchmarks_appendix.md.

Each row is the real train step compiled for one kind of GPU, a JSON file of its own: an interrupted
table resumes where it stopped, and rows of another version of the program are recomputed.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import arcface_jax
from arcface_jax.config import Network
from arcface_jax.machine import gpu, gpu_plan, hlo, plan, roofline
from arcface_jax.machine.gpu import Compiler, GpuName
from benchmarks.step import Case, make_config

GIB = 2**30
GPUS: tuple[GpuName, ...] = ("a100", "h100", "h200", "b200")
NETWORKS: tuple[Network, ...] = (
    "r18",
    "r34",
    "r50",
    "r100",
    "r200",
    "mbf",
    "vit_t",
    "vit_s",
    "vit_b",
    "vit_l_dp005_mask_005",
)
# Network, classes, global batch; samples/s over all GPUs and GB on each of 8 x V100-32GB, float16,
# with Partial FC 0.1 and with model parallelism: insightface's arcface_torch README of 2021.
SPEED_TABLE = {
    ("r100", 2_000_000, 1024): {0.1: (3247, 11.9), 1.0: (2006, 20.3)},
    ("r50", 4_000_000, 1024): {0.1: (4385, 10.8), 1.0: (2165, 26.6)},
    ("r50", 8_000_000, 512): {0.1: (3001, 11.1), 1.0: (767, 32.1)},
}
# r50: classes, devices, batch per device.
LARGE = ((10_000_000, 1, 128), (10_000_000, 8, 128), (30_000_000, 1, 128), (130_000_000, 8, 128))
# Sources that affect a step's program, and how it is counted.
_SOURCES = ("config/*.py", "heads/*.py", "models/*.py", "training/*.py")
_SOURCES += ("machine/hlo.py", "machine/roofline.py", "machine/gpu_targets/*")


class Row(NamedTuple):
    """One run on one kind of GPU; bytes and kernels are per device."""

    table: str
    """`speed`, `networks` or `large`."""
    gpu: str
    network: str
    classes: int
    batch: int
    """Batch size over all devices."""
    devices: int
    sample_rate: float
    state_bytes: int
    temporary_bytes: int
    total_bytes: int
    """Total bytes, including the batch and the allowance for cuDNN's workspace."""
    fits: dict[str, bool]
    """Whether it fits, by the share of the memory that JAX takes."""
    kernels: int
    hbm_bytes: int
    flops: int
    modelled_ms: float
    images_per_second: float
    """Modelled images per second over all devices."""


class Job(NamedTuple):
    """A row to compute."""

    table: str
    gpu: GpuName
    case: Case

    @property
    def name(self) -> str:
        """Name of its file."""
        case = self.case
        return (
            f"{self.table}_{case.network}_{case.classes}_b{case.batch}x{case.devices}_"
            f"{case.sample_rate:g}_{self.gpu}"
        )


def jobs(gpus: Sequence[GpuName] = GPUS) -> list[Job]:
    """Returns all rows, grouped by kind and number of GPUs."""
    found = []
    for name in gpus:
        for (network, classes, batch), published in SPEED_TABLE.items():
            for rate in published:
                found.append(Job("speed", name, _case(network, batch, classes, 8, rate)))
        for network in NETWORKS:
            found.append(Job("networks", name, _case(network, 1024, 1_000_000, 8)))
        for classes, devices, each in LARGE:
            found.append(Job("large", name, _case("r50", devices * each, classes, devices)))
    return sorted(found, key=_process)


def _case(network: Network, batch: int, classes: int, devices: int, rate: float = 1.0) -> Case:
    return Case(network, batch, classes, devices, "bfloat16", rate)


def _process(job: Job) -> tuple[str, int]:
    """Returns what one compiler process can compile."""
    return job.gpu, job.case.devices


def measure(wanted: Iterable[Job], folder: Path, *, say: Callable[[str], None]) -> list[Row]:
    """Reads all rows from their files, or compiles and writes them.

    Args:
      wanted: the rows, in the order of `jobs`.
      folder: folder of the files.
      say: called with each finished row.

    Raises:
      UserError: nothing can compile them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest, rows = program_digest(), []
    for (name, devices), group in groupby(wanted, key=_process):
        group = list(group)
        missing = [job for job in group if _read(folder, job, digest) is None]
        if missing:
            with gpu.compiler(name, devices=devices) as process:
                for job in missing:
                    row = _compile(process, job)
                    written = {"program": digest, **row._asdict()}
                    (folder / f"{job.name}.json").write_text(json.dumps(written, indent=1) + "\n")
                    say(f"{job.name}: {row.total_bytes / GIB:.2f} GiB, {row.modelled_ms:.1f} ms")
        rows += [row for job in group if (row := _read(folder, job, digest))]
    return rows


def _read(folder: Path, job: Job, digest: str) -> Row | None:
    """Reads a row that was computed by this version of the program."""
    path = folder / f"{job.name}.json"
    if not path.exists():
        return None
    stored: dict[str, Any] = json.loads(path.read_text())
    return Row(**stored) if stored.pop("program") == digest else None


def program_digest() -> str:
    """Returns a digest of the sources that a step is traced from, and of the compiler."""
    package = Path(arcface_jax.__file__).parent
    found = hashlib.sha256(metadata.version("jaxlib").encode())
    for pattern in _SOURCES:
        for path in sorted(package.glob(pattern)):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _compile(process: Compiler, job: Job) -> Row:
    case = job.case
    program = process.compile(make_config(case), num_classes=case.classes)
    module = program.module
    assumed = roofline.assume(job.gpu, devices=case.devices)
    seconds = roofline.estimate(module, assumed, devices=case.devices).seconds
    total = sum(program.state.values()) + program.temporary_bytes + gpu_plan.CUDNN_WORKSPACE
    beside = gpu_plan.CUDA_CONTEXT + (gpu_plan.NCCL if case.devices > 1 else 0)
    memory = assumed.gpu.memory
    fits = {
        f"{share:g}": total <= share * memory <= memory - beside
        for share in (plan.DEFAULT_SHARE, plan.LARGE_SHARE)
    }
    sums: hlo.Totals = module.total
    return Row(
        table=job.table,
        gpu=job.gpu,
        network=case.network,
        classes=case.classes,
        batch=case.batch,
        devices=case.devices,
        sample_rate=case.sample_rate,
        state_bytes=sum(size for name, size in program.state.items() if name != "batch"),
        temporary_bytes=program.temporary_bytes,
        total_bytes=total,
        fits=fits,
        kernels=sums.kernels,
        hbm_bytes=sums.bytes,
        flops=sums.flops,
        modelled_ms=1e3 * seconds,
        images_per_second=case.batch / seconds,
    )


def markdown(rows: Sequence[Row]) -> str:
    """Returns the tables for docs/benchmarks_appendix.md."""
    blocks = []
    for table, title in _TITLES.items():
        chosen = [row for row in rows if row.table == table]
        if chosen:
            lines = [_HEADS[table], "|" + "---|" * (_HEADS[table].count("|") - 1)]
            blocks.append("\n".join([title, "", *lines, *(_line(row) for row in chosen)]))
    return "\n\n".join(blocks) + "\n"


_TITLES = {
    "speed": "arcface_torch's speed table: bfloat16, 8 GPUs, compiled, beside what it published",
    "networks": "Networks at 1,000,000 identities, full softmax, 128 images on each of 8 GPUs",
    "large": "r50 and many identities, full softmax, 128 images a GPU",
}
_COMMON = "state GiB | temporary GiB | total GiB | HBM GB a step | kernels | modeled images/s |"
_HEADS = {
    "speed": f"| GPU | run | sample rate | {_COMMON} V100 GB | V100 images/s |",
    "networks": f"| GPU | network | {_COMMON}",
    "large": f"| GPU | identities, GPUs | {_COMMON} fits at JAX's 75 % | at .95 |",
}


def _line(row: Row) -> str:
    match row.table:
        case "speed":
            speed, memory = SPEED_TABLE[row.network, row.classes, row.batch][row.sample_rate]
            first = f"{row.network}, {row.classes:,}, {row.batch:,} | {row.sample_rate:g}"
            last = f" {memory:.1f} | {speed:,} |"
        case "networks":
            first, last = row.network, ""
        case _:
            first = f"{row.classes:,}, {row.devices}"
            last = "".join(f" {'yes' if fits else 'no'} |" for fits in row.fits.values())
    sizes = (row.state_bytes, row.temporary_bytes, row.total_bytes)
    middle = " | ".join(f"{size / GIB:.2f}" for size in sizes)
    return (
        f"| {row.gpu.upper()} | {first} | {middle} | {row.hbm_bytes / 1e9:.1f} | {row.kernels:,} | "
        f"{row.images_per_second:,.0f} |{last}"
    )
