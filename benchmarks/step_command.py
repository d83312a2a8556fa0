"""`scripts/benchmark.py step`: its options, its tables, its JSON file."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from arcface_jax.config import Dtype, Network
from arcface_jax.errors import ConfigError
from arcface_jax.machine import plan, timing
from arcface_jax.runtime import devices as meshes
from arcface_jax.runtime import tables
from benchmarks import dispatch, step, step_table
from benchmarks.step import Case, Measurement

MIB, GIB = 2**20, 2**30
TorchForm = Literal["plain", "channels_last", "channels_last+compile"]


@dataclass(frozen=True)
class Step:
    """Forward, forward and backward, and the whole train step (docs/benchmarks.md)."""

    network: Network = "r50"
    batch: int = 128
    """Batch size over all devices."""
    classes: int = 100_000
    """Identities."""
    devices: int = 1
    """Number of devices; on a CPU, any number is simulated."""
    dtype: Dtype = "float32"
    """Compute type of the convolutions and of the head's products."""
    sample_rate: float = 1.0
    """Partial FC: the share of the classes in a step."""
    repeats: int = 5
    """Timed runs of each part; the median is reported."""
    against: Literal["none", "torch"] = "none"
    """Also time the torch twin, in turn, in its fastest form."""
    torch_forms: tuple[TorchForm, ...] = ("plain", "channels_last", "channels_last+compile")
    """The forms to try; torch.compile needs a C++ compiler, and minutes for a large network."""
    reference: Path | None = None
    """A checkout of arcface_torch, whose own step is timed on the same GPU first."""
    host_overhead: bool = False
    """Time the call of the step without the devices' work."""
    table: bool = False
    """The published speed table with the memory that this project's step needs; runs nothing."""
    output: Path = Path("runs/benchmark_step")
    """Folder for step.json, step_table.json or host_overhead.json."""


class Others(NamedTuple):
    """Implementations outside this package, as functions of a case."""

    torch: Callable[[Case], Any]
    """Makes a `benchmarks.step_twin.Twin`."""
    torch_precision: Callable[[], str]
    reference: Callable[[Case], tuple[float, step.Program]]


def run(arguments: Step, others: Callable[[], Others]) -> dict[str, Any]:
    """Measures what the options select, prints it and writes it.

    Args:
      arguments: the options.
      others: only called if selected.

    Returns:
      The contents of RESULT.

    Raises:
      UserError: the options are inconsistent.
    """
    if arguments.repeats < 1:
        raise ConfigError(f"--repeats {arguments.repeats} must be 1 or more")
    if min(arguments.classes, arguments.devices) < 1:
        raise ConfigError("--classes and --devices must be 1 or more")
    if arguments.table:
        return _table(arguments)
    if arguments.devices != 1 and (arguments.reference or arguments.against == "torch"):
        raise ConfigError(
            f"--against and --reference compare on one device, not {arguments.devices}: "
            "say --devices 1"
        )
    if arguments.sample_rate != 1 and arguments.against == "torch":
        raise ConfigError(
            f"--against torch has a head of all classes, not of --sample-rate "
            f"{arguments.sample_rate:g}: leave that out, or compare with --reference"
        )
    case = Case(
        arguments.network,
        arguments.batch,
        arguments.classes,
        arguments.devices,
        arguments.dtype,
        arguments.sample_rate,
    )
    step.make_config(case)  # fail before the others have run
    if arguments.host_overhead:
        return _host_overhead(arguments, case)
    return _measure(arguments, case, others)


def _measure(arguments: Step, case: Case, others: Callable[[], Others]) -> dict[str, Any]:
    words = []
    reference = others().reference(case) if arguments.reference else None
    if arguments.against == "torch":
        # Otherwise JAX reserves most of a GPU's memory at start.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    meshes.ask_for_cpu_devices(case.devices)
    machine = timing.machine()
    product = timing.matmul_flops_per_second(case.dtype)
    programs = {step.OURS: step.compile_parts(case)}
    trials = None
    if arguments.against == "torch":
        twin = others().torch(case)
        programs["torch"], trials = twin.programs, twin.trials
        words.append(f"torch: {twin.form}, the fastest of {_tried(trials)}")
        words.append(f"torch: {others().torch_precision()}")
    rows = step.measure(case, programs, product_flops=product, repeats=arguments.repeats)
    if reference:
        seconds, program = reference
        options = {"seconds": seconds, "product_flops": product}
        rows.append(step.row(case, "arcface_torch", "step", program, **options))
    rows = step.beside_ours(rows)
    _show(_parts_table(case, rows))
    words += [
        f"GFLOP/s are the model's; one large {case.dtype} product here reaches "
        f"{product / 1e9:.0f} on each device, of which `of product` is the share",
        f"precision of float32 products: {_precision()}",
    ]
    measured = {"case": case._asdict(), "matrix_product_gflops": round(product / 1e9, 1)}
    measured |= {"measurements": [row._asdict() for row in rows], "torch_forms": trials}
    return _finish(arguments.output / "step.json", measured, machine, words)


def _tried(trials: dict[str, float | str]) -> str:
    """Describes each form's time, or why it failed."""
    return "; ".join(
        f"{form} {1000 * found:.0f} ms" if isinstance(found, float) else f"{form} ({found})"
        for form, found in trials.items()
    )


def _precision() -> str:
    asked = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]  # set by JAX
    return (
        f"head float32 (HIGHEST); backbone {asked or 'JAX default, TF32 on recent GPUs'}; "
        "the large product HIGHEST"
    )


def _parts_table(case: Case, rows: list[Measurement]) -> Table:
    title = (
        f"{case.network}, {case.dtype}, batch {case.batch}, {case.classes:,} classes, "
        f"{case.devices} device(s)"
    )
    heads = ["ms", "images/s", "x ours", "GFLOP/s", "MFU", "of product"]
    heads += ["compile s", "temp MiB", "args MiB"]
    out = tables.new(title, heads, names=["", "part"])
    for row in rows:
        out.add_row(
            row.implementation,
            row.part,
            f"{1000 * row.seconds:.1f}",
            f"{row.images_per_second:.1f}",
            _text(row.ratio, "{:.2f}"),
            f"{row.flops_per_second / 1e9:.0f}",
            _text(row.peak_share, "{:.1%}"),
            f"{row.product_share:.2f}",
            _text(row.compile_seconds, "{:.1f}"),
            _text(row.temporary_bytes, "{:.0f}", unit=MIB),
            _text(row.argument_bytes, "{:.0f}", unit=MIB),
        )
    return out


def _host_overhead(arguments: Step, case: Case) -> dict[str, Any]:
    meshes.ask_for_cpu_devices(case.devices)
    found = dispatch.measure(case)
    words = [
        f"{case.network}, {case.devices} device(s): the call of the step, {found.arrays} arrays, "
        f"takes {1000 * found.call_seconds:.2f} ms",
        f"a batch of {case.batch} images goes to the devices in "
        f"{1000 * found.batch_seconds:.2f} ms",
    ]
    measured = {"case": case._asdict(), "host_overhead": found._asdict()}
    return _finish(arguments.output / "host_overhead.json", measured, timing.machine(), words)


def _table(arguments: Step) -> dict[str, Any]:
    plan.use_cpu_devices(step_table.DEVICES)
    rows = step_table.measure(say=lambda words: print(words, flush=True))
    for network, classes, batch in step_table.CASES:
        title = f"{network}, {classes:,} classes, batch {batch}, 8 devices"
        heads = ["state GiB", "temp GiB", "total GiB", "V100 GB", "V100 images/s"]
        out = tables.new(title, heads, names=["method", "GiB or GB from"])
        for row in rows:
            if (row.network, row.classes, row.batch) == (network, classes, batch):
                sizes = (row.state_bytes, row.temporary_bytes, row.total_bytes)
                out.add_row(
                    row.method,
                    row.source,
                    *(_text(size, "{:.1f}", unit=GIB) for size in sizes),
                    _text(row.published_gb, "{:.1f}"),
                    _text(row.published_images_per_second, "{}"),
                )
        _show(out)
    words = [
        "published: arcface_torch on 8 x V100-32GB (GB); compiled: this project's step; sum: its "
        "backbone and a dense head, compiled apart, at most",
        "temporaries are those of XLA's CPU backend; what 16 bits save on a GPU they do not tell",
    ]
    measured = {"rows": [row._asdict() for row in rows]}
    return _finish(arguments.output / "step_table.json", measured, timing.machine(), words)


def _show(table: Table) -> None:
    """Prints a table wide enough for its numbers, also if redirected to a file."""
    Console(width=max(112, Console().width)).print(table)


def _text(value: float | None, form: str, *, unit: int = 1) -> str:
    return "" if value is None else form.format(value if unit == 1 else value / unit)


def _finish(
    path: Path, measured: dict[str, Any], machine: dict[str, str | int], words: list[str]
) -> dict[str, Any]:
    """Prints what the table does not show, and writes everything."""
    print(*words, sep="\n")
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, **measured}, indent=2) + "\n")
    return {**measured, "files": [str(path)]}
