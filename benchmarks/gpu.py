"""Measurements for a machine with a GPU: `python -m benchmarks gpu` (docs/gpu.md).

Each item is measured in a separate process, so that `peak_bytes_in_use` belongs to one program and
running out of memory affects no other item. Each result is a file; a call works through the items
without one until its minutes are used up, and the next call continues. Nothing is downloaded: the
machine's JAX, CUDA plugin and PyTorch are used.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from arcface_jax import errors
from arcface_jax.errors import UserError
from arcface_jax.runtime import tables
from arcface_jax.runtime.files import write_atomic

Kind = Literal["tests", "step", "head", "forms", "reference"]
GB = 1e9
_CUBLAS = "--xla_gpu_enable_triton_gemm=false"
# How far a process may overrun before it is killed and its item counts as failed.
_LIMITS = {"tests": 420, "step": 300, "head": 150, "forms": 240, "reference": 300}
# Kernels of each program in the table; gpu.json has more.
_SHOWN = 8
# Tests compile more than they compute: up to this many processes share a GPU, each with as much of
# its memory as the largest test needs.
_TEST_PROCESSES, _TEST_BYTES = 4, 10 * GB


@dataclass(frozen=True)
class Gpu:
    """Measurements for a machine with a GPU (docs/gpu.md), in calls of a few minutes."""

    minutes: float = 9.0
    """Items that may not finish within these minutes are not started; call again for the rest."""
    reference: Path | None = None
    """recognition/arcface_torch of a checkout of insightface, to be timed for comparison."""
    sizes: Literal["real", "toy"] = "real"
    """Toy sizes run to the end on a CPU, to check that the command works; they measure nothing."""
    again: tuple[str, ...] = ()
    """Names of items to measure again; `failed` stands for all failed ones."""
    output: Path = Path("runs/benchmark_gpu")
    """Folder for the results, gpu.json and gpu.md."""


class Item(NamedTuple):
    """One measurement."""

    name: str
    kind: Kind
    network: str = "r50"
    classes: int = 0
    batch: int = 128
    """Batch size over all devices."""
    devices: int = 1
    xla_flags: str = ""
    """Flags appended to XLA_FLAGS."""
    trace: bool = False
    """Whether to profile some steps."""


_REAL = (
    Item("tests", "tests"),
    Item("r50, 1 M ids", "step", "r50", 1_000_000, 128, trace=True),
    Item("vit_b", "step", "vit_b", 1_000_000, 384, trace=True),
    Item("r50, 1 M ids, 8 GPUs", "step", "r50", 1_000_000, 1024, 8, trace=True),
    Item("r100, 2 M ids, 8 GPUs", "step", "r100", 2_000_000, 1024, 8, trace=True),
    Item("head, 10 M ids, 8 GPUs", "head", "", 10_000_000, 1024, 8, trace=True),
    # The share of the last two on one of eight GPUs, for machines with a single GPU.
    Item("r100, 250 k ids", "step", "r100", 250_000, 128, trace=True),
    Item("head, 1.25 M ids", "head", "", 1_250_000, 1024, trace=True),
    *(
        Item(f"head, {ids} ids, batch {batch}, {product}", "forms", "", classes, batch, 1, flags)
        for ids, classes, batch in (
            *(("1 M", 1_000_000, batch) for batch in (128, 256, 512)),
            ("1.25 M", 1_250_000, 1024),
        )
        for product, flags in (("Triton or cuBLAS", ""), ("cuBLAS", _CUBLAS))
    ),
    Item("arcface_torch, r50, 1 M ids", "reference", "r50", 1_000_000, 128),
    Item("r50, 10 M ids", "step", "r50", 10_000_000, 128),
)


def items(sizes: Literal["real", "toy"]) -> list[Item]:
    """Returns the items in order; as toys, the first of each kind, as small as possible."""
    if sizes == "real":
        return list(_REAL)
    first = {item.kind: item for item in reversed(_REAL) if item.devices == 1}
    return [
        item._replace(network="r_tiny", classes=100, batch=8, xla_flags="")
        for item in _REAL
        if item is first[item.kind]
    ]


def run(arguments: Gpu) -> dict[str, Any]:
    """Measures what there is time for, and writes all results so far.

    Returns:
      The contents of RESULT: the results, and the names of the remaining items.

    Raises:
      UserError: there is no GPU for real sizes.
    """
    begin = time.monotonic()
    machine = _machine()
    if arguments.sizes == "real" and machine["platform"] != "gpu":
        raise UserError(
            f"JAX runs on {machine['platform']} here: install a CUDA plugin (pip install "
            "'arcface-jax[cuda12]'), or try the command with --sizes toy"
        )
    asked = items(arguments.sizes)
    folder = arguments.output / "items"
    folder.mkdir(parents=True, exist_ok=True)
    answers = {
        item.name: _read(folder / f"{file_name(item)}.json", item, arguments.again)
        for item in asked
    }
    left = []
    for item in asked:
        if answers[item.name]:
            continue
        if reason := _reason_to_leave_out(item, arguments, machine):
            answers[item.name] = {"left_out": reason}
            print(f"{item.name}: left out: {reason}", flush=True)
            continue
        remaining = 60 * arguments.minutes - (time.monotonic() - begin)
        if remaining < _LIMITS[item.kind] and remaining < 60 * arguments.minutes - 30:
            left.append(item.name)
            continue
        limit = min(_LIMITS[item.kind], max(remaining, 60))
        answer = _ask(item, arguments, limit=limit, memory=machine["bytes_limit"])
        answers[item.name] = answer
        write_atomic(folder / f"{file_name(item)}.json", json.dumps(answer, indent=2) + "\n")
        print(f"{item.name}: {_summary(answer)}", flush=True)
    report = {"machine": machine, "answers": {k: v for k, v in answers.items() if v}, "left": left}
    write_atomic(arguments.output / "gpu.json", json.dumps(report, indent=2) + "\n")
    shown = _tables(asked, report)
    console = Console(width=max(132, Console().width))
    for table in shown:
        console.print(table)
    write_atomic(arguments.output / "gpu.md", _page(machine, shown))
    if left:
        print(f"{len(left)} of {len(asked)} items are left: run the same command again")
    files = [str(arguments.output / name) for name in ("gpu.json", "gpu.md")]
    return {**report, "files": files}


def _machine() -> dict[str, Any]:
    """Returns device, memory, count and versions, from a process that does not keep the GPU."""
    code = (
        "import json; import jax; from arcface_jax.machine import timing; "
        "limit = (jax.devices()[0].memory_stats() or {}).get('bytes_limit'); "
        "facts = {'platform': jax.default_backend(), 'bytes_limit': limit, **timing.machine()}; "
        "print(json.dumps(facts))"
    )
    done = _process(["-c", code], limit=120)
    if isinstance(done, str):
        raise UserError(f"JAX does not start: {done}")
    return done


def _reason_to_leave_out(item: Item, arguments: Gpu, machine: dict[str, Any]) -> str | None:
    if item.kind == "reference" and arguments.reference is None:
        return "no checkout of arcface_torch: name one with --reference DIR"
    if item.kind == "reference" and machine["platform"] != "gpu":
        return "arcface_torch needs CUDA"
    if item.devices > machine["devices"] and machine["platform"] == "gpu":
        return f"needs {item.devices} GPUs, here are {machine['devices']}"
    return None


def _ask(
    item: Item, arguments: Gpu, *, limit: float, memory: float | None = None
) -> dict[str, Any]:
    """Measures one item on GPUs of so many bytes; returns the result or {"failed": reason}."""
    if item.kind == "tests":
        words = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
        processes = int(max(1, min(_TEST_PROCESSES, (memory or 0) // _TEST_BYTES)))
        shares = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.8 / processes:.2f}"}
        done = _process(
            [*words, "tests/gpu", "-n", str(processes), "--dist", "load"],
            limit=limit,
            last_line=_pytest_line,
            environment={
                "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),  # else tests/conftest.py chooses
                **(shares if processes > 1 else {}),
            },
        )
    elif item.kind == "reference":
        words = ["-m", "benchmarks.reference_step", str(arguments.reference)]
        sizes = {"network": item.network, "batch": item.batch, "classes": item.classes}
        words += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        done = _process(words, limit=limit)
    else:
        done = _process(
            ["-m", "benchmarks.gpu_item", str(arguments.output.absolute() / "programs")],
            limit=limit,
            given=json.dumps(item._asdict()),
            environment={
                "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {item.xla_flags}".strip()
            },
        )
    return {"failed": done} if isinstance(done, str) else done


def _pytest_line(line: str) -> dict[str, Any]:
    return {"outcome": line.strip("= ")}


def _process(
    words: list[str],
    *,
    limit: float,
    given: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
    last_line: Callable[[str], dict[str, Any]] = json.loads,
) -> dict[str, Any] | str:
    """Runs Python; returns the content of its last line, or a line with the reason for failure."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=root,
            env={**os.environ, "PYTHONPATH": path, **environment},
            input=given,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {limit:.0f} s"
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return f"exit code {done.returncode}: " + " | ".join(lines[-3:])[-600:]
    return last_line(done.stdout.strip().splitlines()[-1])


def file_name(item: Item) -> str:
    """Returns the item's name as the name of a file, without a suffix."""
    return item.name.replace(",", "").replace(" ", "_")


def _read(path: Path, item: Item, again: tuple[str, ...]) -> dict[str, Any]:
    """Reads a stored result; empty if there is none, or if it is to be measured again."""
    if not path.is_file():
        return {}
    answer = json.loads(path.read_text())
    repeat = item.name in again or ("failed" in again and "failed" in answer)
    return {} if repeat else answer


def _summary(answer: dict[str, Any]) -> str:
    for key in ("failed", "outcome"):
        if key in answer:
            return f"{key}: {answer[key]}"
    if "forms" in answer:
        return ", ".join(
            f"{name} {s if isinstance(s, str) else f'{1000 * s:.1f} ms'}"
            for name, s in answer["forms"].items()
        )
    return f"{1000 * answer['seconds']:.1f} ms"


def _tables(asked: list[Item], report: dict[str, Any]) -> list[Table]:
    """Makes the tables that have rows."""
    answers: dict[str, dict[str, Any]] = report["answers"]
    heads = ["ms", "modeled ms", "images/s", "peak GB", "compiled GB", "temporary GB"]
    heads += ["traffic GB", "kernels", "busy"]
    times = tables.new("time and memory of a step", heads, names=["program"])
    for item in asked:
        found = answers.get(item.name, {})
        if "seconds" in found:
            times.add_row(item.name, *_cells(found, item))
    others = tables.new("other answers", [], names=["item", "answer"])
    for name, answer in answers.items():
        for key in ("outcome", "failed", "left_out", "profile_failed"):
            if key in answer:
                others.add_row(name, answer[key])
        for form, reason in answer.get("forms", {}).items():
            if isinstance(reason, str):
                others.add_row(f"{name}, {form}", reason)
    made = [times, *_profiles(answers), _forms(answers), others]
    return [table for table in made if table.row_count]


def _profiles(answers: dict[str, dict[str, Any]]) -> list[Table]:
    """Makes tables of time by kind of kernel and by part, and of the longest kernels."""
    profiled = {name: answer for name, answer in answers.items() if "share_of_time" in answer}
    shares = [answer["share_of_time"] for answer in profiled.values()]
    kinds = sorted({kind for share in shares for kind in share}, key=lambda k: -_most(shares, k))
    parts = {part: 0 for answer in profiled.values() for part in answer["seconds_by_part"]}
    by_kind = tables.new("share of the time by kind of kernel", kinds, names=["program"])
    by_part = tables.new("ms of a step by part", list(parts), names=["program"])
    longest = tables.new("longest kernels", ["runs", "ms"], names=["program", "kernel", "part"])
    for name, answer in profiled.items():
        share, seconds = answer["share_of_time"], answer["seconds_by_part"]
        by_kind.add_row(name, *(f"{share.get(kind, 0):.1%}" for kind in kinds))
        by_part.add_row(name, *(f"{1000 * seconds.get(part, 0):.2f}" for part in parts))
        for kernel in answer["longest_kernels"][:_SHOWN]:
            row = (kernel["name"][:60], kernel["part"], f"{kernel['runs']:.0f}")
            longest.add_row(name, *row, f"{1000 * kernel['seconds']:.2f}")
    return [by_kind, by_part, longest]


def _forms(answers: dict[str, dict[str, Any]]) -> Table:
    """Makes a table of the head's time by form and block size; a form that failed has no cell."""
    compared = {name: answer["forms"] for name, answer in answers.items() if "forms" in answer}
    columns = list(dict.fromkeys(form for found in compared.values() for form in found))
    table = tables.new("ms of the head by form and block size", columns, names=["program"])
    for name, found in compared.items():
        seconds = {form: s for form, s in found.items() if not isinstance(s, str)}
        cells = (f"{1000 * seconds[form]:.2f}" if form in seconds else "" for form in columns)
        table.add_row(name, *cells)
    return table


def _most(shares: list[dict[str, float]], kind: str) -> float:
    return max(share.get(kind, 0.0) for share in shares)


def _cells(found: dict[str, Any], item: Item) -> list[str]:
    def gigabytes(name: str) -> str:
        return "" if found.get(name) is None else f"{found[name] / GB:.2f}"

    images = "" if item.kind == "head" else f"{item.batch / found['seconds']:.0f}"
    kernels = "" if found.get("kernels") is None else f"{found['kernels']:.0f}"
    busy = "" if found.get("busy") is None else f"{found['busy']:.0%}"
    memory = [gigabytes(f"{name}_bytes") for name in ("peak", "compiled", "temporary", "hbm")]
    modeled = f"{1000 * found['modeled_seconds']:.2f}" if "modeled_seconds" in found else ""
    return [f"{1000 * found['seconds']:.2f}", modeled, images, *memory, kernels, busy]


def _page(machine: dict[str, Any], shown: list[Table]) -> str:
    """Returns the tables in Markdown, with the card's name above them."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    for table in shown:
        heads = [str(column.header) for column in table.columns]
        columns = [list(map(str, column.cells)) for column in table.columns]
        lines += [f"{table.title}:", "", "| " + " | ".join(heads) + " |"]
        lines += ["|" + "---|" * len(heads)]
        rows = zip(*columns, strict=True)
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def main(arguments: Gpu) -> None:
    """Runs the items, and prints RESULT."""
    begin = time.perf_counter()
    with errors.reported():
        outcome = run(arguments)
    seconds = round(time.perf_counter() - begin, 1)
    print("RESULT " + json.dumps({**outcome, "seconds": seconds}))
