"""Compile r50 for 8 to 1,024 H100s: the traffic of its collectives, and the scaling it implies.

Each device has 128 images and a share of 100 M identities, so the head's work per device is the
same at every size. Times are modeled from the compiled program; nothing is timed.
"""

import json
from typing import Any, NamedTuple

from arcface_jax.machine import gpu, roofline
from arcface_jax.machine.hlo import Module
from benchmarks import pages, program
from benchmarks.step import Case, make_config

DEVICES = (8, 64, 256, 1024)
_CLASSES, _EACH = 100_000_000, 128
_RECORD = program.DOCS / "gpu_scale.json"
_BEGIN, _END = "<!-- begin: python -m benchmarks gpu-scale -->", "<!-- end scale -->"
_NVLINK, _NETWORK = 450e9, 50e9


class Exchange(NamedTuple):
    """The collectives of one kind and part of a step."""

    part: str
    kind: str
    number: int
    sent_bytes: float
    """Bytes sent by each device of a ring."""


class Row(NamedTuple):
    """One number of devices."""

    devices: int
    state_bytes: int
    temporary_bytes: int
    head_temporary_bytes: int
    """Temporary bytes of the head, compiled separately."""
    exchanges: list[Exchange]
    compute_seconds: float
    exposed_seconds: float
    """Seconds of collectives without a concurrent kernel."""

    @property
    def images_per_second(self) -> float:
        """Modelled images per second of each device."""
        return _EACH / (self.compute_seconds + self.exposed_seconds)


def measure() -> list[Row]:
    """Compiles every size, and writes docs/gpu_scale.json and the tables of docs/gpu.md.

    Raises:
      UserError: no CUDA plugin is installed.
    """
    rows = []
    for devices in DEVICES:
        rows.append(_row(devices))
        print(f"{devices} GPUs: {rows[-1].images_per_second:,.0f} images/s a GPU, modeled")
    _RECORD.write_text(json.dumps([_as_json(row) for row in rows], indent=1) + "\n")
    pages.replace(program.PAGE, tables(rows), begin=_BEGIN, end=_END)
    return rows


def _row(devices: int) -> Row:
    case = Case("r50", _EACH * devices, _CLASSES, devices, "bfloat16")
    config = make_config(case)
    with gpu.compiler(program.GPU, devices=devices) as compiler:
        step = compiler.compile(config, num_classes=_CLASSES)
        head = compiler.compile(config, num_classes=_CLASSES, part="head")
    times = roofline.estimate(
        step.module, roofline.assume(program.GPU, devices=devices), devices=devices
    )
    return Row(
        devices,
        sum(size for name, size in step.state.items() if name != "batch"),
        step.temporary_bytes,
        head.temporary_bytes,
        _exchanges(step.module, devices),
        sum(part.seconds for part in times.parts.values()),
        times.exposed,
    )


def _exchanges(module: Module, devices: int) -> list[Exchange]:
    found: dict[tuple[str, str], Exchange] = {}
    for collective in module.collectives:
        part = "head" if collective.part == "head" else "backbone"
        key = part, collective.kind
        before = found.get(key, Exchange(*key, 0, 0.0))
        sent = collective.runs * roofline.sent_bytes(collective, devices)
        found[key] = Exchange(*key, before.number + collective.runs, before.sent_bytes + sent)
    return sorted(found.values())


def tables(rows: list[Row]) -> str:
    """Returns Markdown tables with the bytes of each collective, and the implied scaling."""
    lines = [
        "| GPUs | part | collective | number | MB sent by a GPU | ms at NVLink's 450 GB/s | ms at 400 Gb/s |",  # noqa: E501  # a table's head
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for part, kind, number, sent in row.exchanges:
            speeds = (1e3 * sent / speed for speed in (_NVLINK, _NETWORK))
            cells = [f"{sent / 1e6:,.2f}", *(f"{ms:.3f}" for ms in speeds)]
            lines.append(f"| {row.devices:,} | {part} | {kind} | {number} | {' | '.join(cells)} |")
    lines += [
        "",
        "| GPUs | global batch | state GiB | temporary GiB | head's temporary MiB | compute ms | exposed collectives ms | images/s a GPU | efficiency |",  # noqa: E501
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row.devices * _EACH:,}",
            f"{row.state_bytes / 2**30:.1f}",
            f"{row.temporary_bytes / 2**30:.2f}",
            f"{row.head_temporary_bytes / 2**20:.0f}",
            f"{1e3 * row.compute_seconds:.1f}",
            f"{1e3 * row.exposed_seconds:.2f}",
            f"{row.images_per_second:,.0f}",
            f"{row.images_per_second / rows[0].images_per_second:.2f}",
        ]
        lines.append(f"| {row.devices:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _as_json(row: Row) -> dict[str, Any]:
    return {**row._asdict(), "exchanges": [exchange._asdict() for exchange in row.exchanges]}
