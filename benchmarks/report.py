"""The head's measurements as tables, a JSON file and a plot."""

import json
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from arcface_jax.runtime import tables as console_tables
from benchmarks.head import Measurement

MIB = 2**20


def tables(rows: list[Measurement]) -> list[Table]:
    """Returns a table for each case, with a line per method."""
    return [_table(case, [row for row in rows if _case(row) == case]) for case in _cases(rows)]


def _table(case: tuple[int, int, int], rows: list[Measurement]) -> Table:
    classes, batch, devices = case
    title = f"{classes:,} classes, batch {batch}, {devices} device(s)"
    heads = ["ms", "x dense", "GFLOP/s", "temp MiB", "x dense", "args MiB"]
    out = console_tables.new(title, heads, names=["method"])
    for row in rows:
        out.add_row(
            row.method,
            "no room" if row.seconds is None else f"{1000 * row.seconds:.1f}",
            _ratio(row.time_ratio),
            "" if row.flops_per_second is None else f"{row.flops_per_second / 1e9:.0f}",
            f"{row.temporary_bytes / MIB:.1f}",
            _ratio(row.memory_ratio),
            f"{row.argument_bytes / MIB:.0f}",
        )
    return out


def write(
    folder: Path, rows: list[Measurement], *, product_flops: float, machine: dict
) -> list[Path]:
    """Writes head.json and head.png, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {
        "machine": machine,
        "matrix_product_flops_per_second": product_flops,
        "measurements": [row._asdict() for row in rows],
    }
    data = folder / "head.json"
    data.write_text(json.dumps(numbers, indent=2) + "\n")
    return [data, _plot(folder / "head.png", rows, machine)]


def _plot(path: Path, rows: list[Measurement], machine: dict) -> Path:
    """Plots time and temporary memory of a step, a group of bars per case."""
    cases = _cases(rows)
    methods = list(dict.fromkeys(row.method for row in rows))
    width = 0.8 / len(methods)
    figure = Figure(figsize=(4 + 2.2 * len(cases), 6.5), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    values = {
        "time of a step, ms": lambda row: row.seconds and 1000 * row.seconds,
        "temporary memory per device, MiB": lambda row: row.temporary_bytes / MIB,
    }
    for axis, (title, value) in zip(panels, values.items(), strict=True):
        for number, method in enumerate(methods):
            found = {_case(row): value(row) for row in rows if row.method == method}
            drawn = {cases.index(case): v for case, v in found.items() if v}
            places = [place + (number - (len(methods) - 1) / 2) * width for place in drawn]
            bars = axis.bar(places, list(drawn.values()), width, label=method, color=f"C{number}")
            axis.bar_label(bars, fmt="{:,.0f}", fontsize=7, padding=1)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        axis.margins(y=0.15)
    panels[1].set_xticks(
        range(len(cases)), [f"{c:,} classes\nbatch {b}, {n} device(s)" for c, b, n in cases]
    )
    panels[0].legend(fontsize=8, ncols=3, loc="upper left")
    figure.suptitle(
        f"the class-center head on {machine['device']}, JAX {machine['jax']}", fontsize=9
    )
    figure.savefig(path, dpi=110)
    return path


def _case(row: Measurement) -> tuple[int, int, int]:
    return row.classes, row.batch, row.devices


def _cases(rows: list[Measurement]) -> list[tuple[int, int, int]]:
    return list(dict.fromkeys(map(_case, rows)))


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
