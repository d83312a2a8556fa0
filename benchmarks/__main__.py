"""Measure parts of the system: tables, a JSON file, sometimes a plot.

python -m benchmarks head [--classes 131072] [--batches 128 256 1024] [--devices 1 2]
python -m benchmarks blocks [--batch 8] [--dtype bfloat16]
python -m benchmarks evaluation [--pairs 6000] [--scores 15000000]
python -m benchmarks bulk [--networks mbf r50] [--images 512]
python -m benchmarks gallery [--rows 1000000] [--queries 1 16]
python -m benchmarks neighbors [--size 100000] [--projections 0 128]
python -m benchmarks cleaning MODEL --data LFW --pairs LFW/lfw_dev.bin
python -m benchmarks retraining MODEL --data LFW [--seeds 3]
python -m benchmarks distillation --teacher MODEL --data LFW [--write]
python -m benchmarks step [--network r50] [--batch 128] [--against torch] [--table]
python -m benchmarks gpu-program [--only r50 head]
python -m benchmarks gpu-scale
python -m benchmarks gpu-table [--gpus h100 b200] [--most 10]
python -m benchmarks gpu [--minutes 9] [--reference DIR] [--sizes toy]
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console

from arcface_jax import errors
from arcface_jax.config import DataConfig, Dtype
from arcface_jax.data.opening import open_source
from arcface_jax.data.pairs.opening import open_file
from arcface_jax.inference.open_model import open_path
from arcface_jax.machine import timing
from arcface_jax.machine.gpu import GpuName
from arcface_jax.runtime import devices as meshes
from arcface_jax.runtime import tables
from benchmarks import (
    blocks,
    cleaning,
    distillation,
    evaluation,
    galleries,
    gpu,
    head,
    neighbors,
    plan_table,
    program,
    report,
    retraining,
    scale,
    step_command,
)
from benchmarks.head import Case, Measurement


@dataclass(frozen=True)
class Head:
    """One step of the class-center head: dense, blocked, and sampled (docs/head.md)."""

    classes: tuple[int, ...] = (131_072,)
    """Identities."""
    batches: tuple[int, ...] = (128, 256, 1024)
    """Global batch sizes."""
    devices: tuple[int, ...] = (1,)
    """Numbers of devices; on a CPU, any number is simulated."""
    size: int = 512
    """Length of the embedding."""
    dtype: Dtype = "float32"
    """Type of the matrix products' operands."""
    block_size: int = 0
    """Classes that a device processes together; 0 is automatic."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    methods: tuple[str, ...] = head.METHODS
    """Methods to measure; the first two are dense."""
    repeats: int = 7
    """Timed steps of each method; the median is reported."""
    reference: Path | None = None
    """A checkout of arcface_torch, whose PartialFC_V2 is timed in the same run."""
    output: Path = Path("runs/benchmark_head")
    """Folder for head.json and head.png."""


def reference(arguments: Head, case: Case) -> list[Measurement]:
    """Measures arcface_torch's head on the same case, over all classes and over a tenth of them."""
    if arguments.reference is None:
        return []
    from benchmarks import reference_head

    options = {"directory": arguments.reference, "repeats": arguments.repeats}
    return [reference_head.measure(case, sample_rate=rate, **options) for rate in (1.0, 0.1)]


def measure(arguments: Head) -> list[Measurement]:
    """Measures all cases with all methods."""
    rows: list[Measurement] = []
    for classes in arguments.classes:
        for batch in arguments.batches:
            for devices in arguments.devices:
                case = Case(
                    classes,
                    batch,
                    devices,
                    arguments.size,
                    dtype=arguments.dtype,
                    block_size=arguments.block_size,
                    optimizer=arguments.optimizer,
                )
                ours = head.measure(case, methods=arguments.methods, repeats=arguments.repeats)
                rows += head.beside_dense([*ours, *reference(arguments, case)])
                print(f"measured {classes:,} classes, batch {batch}, {devices} devices", flush=True)
    return rows


app = tyro.extras.SubcommandApp()


@app.command(name="head")
def run_head(arguments: tyro.conf.OmitArgPrefixes[Head]) -> None:
    """Measures one step of the class-center head: dense, blocked, and sampled (docs/head.md)."""
    begin = time.perf_counter()
    with errors.reported():
        head.check(arguments.methods, arguments.batches, arguments.devices)
        meshes.ask_for_cpu_devices(max(arguments.devices))
        machine = timing.machine()
        product = timing.matmul_flops_per_second(arguments.dtype)
        rows = measure(arguments)
        drawing = head.measure_drawing(
            classes=1_250_000, drawn=125_000, batch=1024, repeats=arguments.repeats
        )
        files = report.write(arguments.output, rows, product_flops=product, machine=machine)
    for table in report.tables(rows):
        Console().print(table)
    print(
        f"GFLOP/s are those of a dense step's three products; one large {arguments.dtype} product "
        f"here reaches {product / 1e9:.0f}"
    )
    print(
        "drawing 125,000 of 1,250,000 classes: "
        + ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in drawing.items())
    )
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    result = {
        "matrix_product_gflops": round(product / 1e9, 1),
        "drawing_seconds": drawing,
        "measurements": [row._asdict() for row in rows],
        "seconds": round(time.perf_counter() - begin, 1),
        "files": [str(file) for file in files],
    }
    print("RESULT " + json.dumps(result))


@app.command(name="blocks")
def run_blocks(batch: int = 8, count: int = 8, dtype: Dtype = "float32", repeats: int = 7) -> None:
    """Measures blocks of a large IResNet, with and without a scan (docs/backbones.md).

    Args:
      batch: Images.
      count: Number of consecutive blocks.
      dtype: Compute type.
      repeats: Timed runs of each method; the median is reported.
    """
    begin = time.perf_counter()
    rows = blocks.measure(batch=batch, blocks=count, dtype=dtype, repeats=repeats)
    for row in rows:
        print(f"{row.method:15} {1000 * row.seconds:8.1f} ms per block  {row.ratio:.2f}")
    print(", ".join(f"{name} {value}" for name, value in timing.machine().items()))
    result = {row.method: row._asdict() for row in rows}
    seconds = round(time.perf_counter() - begin, 1)
    print("RESULT " + json.dumps({**result, "seconds": seconds, "files": []}))


@app.command(name="evaluation")
def run_evaluation(
    pairs: int = 6000,
    embedding_size: int = 512,
    scores: int = 15_000_000,
    repeats: int = 5,
    output: Path = Path("runs/benchmark_evaluation"),
) -> None:
    """Measures ten folds, normalization, and ROC curves (docs/evaluation.md).

    Args:
      pairs: Pairs in a verification set.
      embedding_size: Length of the embedding.
      scores: Scores in the long ROC curve.
      repeats: Timed rounds; the median is reported.
      output: Folder for evaluation.json.
    """
    begin = time.perf_counter()
    with errors.reported():
        sizes = {"pairs": pairs, "embedding_size": embedding_size, "scores": scores}
        rows = evaluation.measure(**sizes, repeats=repeats)
        machine = timing.machine()
        file = evaluation.write(output, rows, machine=machine)
    table = tables.new(None, ["ms"], names=["what"])
    for row in rows:
        table.add_row(row.what, f"{1000 * row.seconds:.2f}")
    Console().print(table)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    seconds = round(time.perf_counter() - begin, 1)
    measured = {row.what: row.seconds for row in rows}
    print("RESULT " + json.dumps({"measured": measured, "seconds": seconds, "files": [str(file)]}))


@app.command(name="bulk")
def run_bulk(
    networks: tuple[str, ...] = ("mbf", "r18"),
    images: int = 256,
    batch_size: int = 64,
    repeats: int = 3,
) -> None:
    """Measures embedding a folder of JPEG files with JAX and with ONNX Runtime (docs/inference.md).

    Args:
      networks: Networks to measure, with fresh weights.
      images: Number of 112 x 112 files.
      batch_size: Images per forward pass.
      repeats: Timed runs of each; the fastest is reported.
    """
    from benchmarks import bulk  # needs torch, which GPU machines may lack

    begin = time.perf_counter()
    with errors.reported():
        sizes = {"images": images, "batch_size": batch_size}
        rows = [bulk.measure(name, **sizes, repeats=repeats) for name in networks]
    table = tables.new(
        None, ["JAX, images/s", "ONNX Runtime, images/s", "difference"], names=["network"]
    )
    for row in rows:
        speeds = (f"{row.jax_per_second:.1f}", f"{row.onnx_per_second:.1f}")
        table.add_row(row.network, *speeds, f"{row.error:.1e}")
    Console().print(table)
    print(", ".join(f"{name} {value}" for name, value in timing.machine().items()))
    seconds = round(time.perf_counter() - begin, 1)
    measured = [row._asdict() for row in rows]
    print("RESULT " + json.dumps({"measured": measured, "seconds": seconds, "files": []}))


@app.command(name="gallery")
def run_gallery(
    rows: int = 1_000_000,
    size: int = 512,
    k: int = 5,
    repeats: int = 7,
    queries: tuple[int, ...] = (1, 16),
) -> None:
    """Measures exact search in a gallery of random directions (docs/inference.md).

    Needs 2.6 GB of disk and 2.6 GB of free memory for a million rows.

    Args:
      rows: Rows in the gallery.
      size: Length of the embedding.
      k: Number of rows to find.
      repeats: Timed searches of each form; the fastest is reported.
      queries: Numbers of queries searched together.
    """
    begin = time.perf_counter()
    with errors.reported():
        found = galleries.measure(rows=rows, size=size, k=k, repeats=repeats, queries=queries)
    table = tables.new(None, ["queries", "s", "CPU s"], names=["form"])
    for row in found:
        table.add_row(row.form, str(row.queries), f"{row.seconds:.3f}", f"{row.cpu_seconds:.3f}")
    Console().print(table)
    print(", ".join(f"{name} {value}" for name, value in timing.machine().items()))
    seconds = round(time.perf_counter() - begin, 1)
    measured = [row._asdict() for row in found]
    print("RESULT " + json.dumps({"measured": measured, "seconds": seconds, "files": []}))


@app.command(name="neighbors")
def run_neighbors(
    size: int = 100_000, dimensions: int = 512, projections: tuple[int, ...] = (0, 128)
) -> None:
    """Measures the search for near pairs of unit vectors (docs/cleaning.md).

    Args:
      size: Number of vectors.
      dimensions: Length of each.
      projections: Random dimensions to compare first; 0 for all.
    """
    begin = time.perf_counter()
    with errors.reported():
        found = neighbors.measure(rows=size, size=dimensions, projections=projections)
    heads = ["s", "CPU s", "pairs", "recall", "peak GiB", "1 M x 1 M, idle cores (extrapolated)"]
    table = tables.new(None, heads, names=["compared in"])
    for row in found:
        table.add_row(
            f"{row.projected or dimensions} dimensions",
            f"{row.seconds:.1f}",
            f"{row.cpu_seconds:.1f}",
            f"{row.pairs:,}",
            f"{row.recall:.4f}",
            f"{row.gib:.1f}",
            f"{row.minutes_per_million:.0f} min",
        )
    Console(width=100).print(table)
    print(", ".join(f"{name} {value}" for name, value in timing.machine().items()))
    seconds = round(time.perf_counter() - begin, 1)
    measured = [
        {**row._asdict(), "minutes_per_million_extrapolated": row.minutes_per_million}
        for row in found
    ]
    print("RESULT " + json.dumps({"measured": measured, "seconds": seconds, "files": []}))


@app.command(name="cleaning")
def run_cleaning(
    model: tyro.conf.Positional[Path],
    data: str,
    pairs: str,
    seeds: int = 5,
    output: Path = Path("runs/benchmark_cleaning"),
) -> None:
    """Plants label errors, detects them without ground truth, and scores (docs/cleaning.md).

    Args:
      model: A run's workdir, a hub folder, PyTorch weights or an ONNX file.
      data: A training set with about 4,000 people, such as LFW's.
      pairs: A verification set of other people.
      seeds: Number of random plantings.
      output: Folder for the embeddings; rerun the same command to reuse them.
    """
    begin = time.perf_counter()
    with errors.reported():
        source = open_source(DataConfig(path=data), seed=0)
        opened = open_path(model)
        scores, found = cleaning.measure(opened, source, open_file(pairs), output, seeds=seeds)
    table = tables.new(
        None,
        ["seed", "found", "recall", "precision", "expected", "AUROC"],
        names=["error"],
    )
    for one in sorted(scores, key=lambda score: score.kind):
        expected = f"{one.expected_recall:.2f}, {tables.share(one.expected_precision)[:4]}"
        numbers = (str(one.seed), str(one.found), f"{one.recall:.3f}", f"{one.precision:.3f}")
        table.add_row(one.kind, *numbers, expected, tables.share(one.auroc))
    Console(width=100).print(table)
    print(f"without planting: images {found.image.tolist()} of {pairs} show people of {data}")
    seconds = round(time.perf_counter() - begin, 1)
    result = {
        "scores": [one._asdict() for one in scores],
        "overlap": np.stack([found.image, found.label], axis=1).tolist(),
    }
    print("RESULT " + json.dumps({**result, "seconds": seconds, "files": []}))


@app.command(name="retraining")
def run_retraining(
    model: tyro.conf.Positional[Path],
    data: Path,
    seeds: int = 3,
    output: Path = Path("runs/benchmark_retraining"),
    write: bool = False,
) -> None:
    """Trains on a set with planted label errors and on the cleaned set (docs/cleaning.md).

    Args:
      model: The model for cleaning: a run's workdir, a hub folder, PyTorch weights or an ONNX file.
      data: The folder of LFW's train.rec and lfw_dev.bin.
      seeds: Number of random plantings, each with its own training seed.
      output: Folder of sets and runs; rerun the same command to resume.
      write: Replace the table of docs/cleaning.md.
    """
    begin = time.perf_counter()
    with errors.reported():
        runs = retraining.measure(open_path(model), data, output, seeds=seeds, write=write)
    seconds = round(time.perf_counter() - begin, 1)
    result = {"runs": [run._asdict() for run in runs]}
    print("RESULT " + json.dumps({**result, "seconds": seconds, "files": []}))


@app.command(name="distillation")
def run_distillation(
    teacher: Path,
    data: Path,
    output: Path = Path("runs/benchmark_distillation"),
    seeds: int = 3,
    write: bool = False,
) -> None:
    """Trains lfw_tiny with and without a teacher (docs/distillation.md); hours on CPU cores.

    Args:
      teacher: A run's workdir, a hub folder, PyTorch weights or an ONNX file.
      data: The folder of LFW's train.rec and lfw_dev.bin.
      output: Folder for the runs; rerun the same command to resume.
      seeds: Number of runs of each kind.
      write: Write table and picture of docs/distillation.md.
    """
    begin = time.perf_counter()
    with errors.reported():
        gains = distillation.measure(
            data=data, teacher=teacher, output=output, seeds=seeds, write=write
        )
    seconds = round(time.perf_counter() - begin, 1)
    print("RESULT " + json.dumps({**gains, "seconds": seconds, "files": []}))


@app.command(name="step")
def run_step(arguments: tyro.conf.OmitArgPrefixes[step_command.Step]) -> None:
    """Measures forward, forward and backward, and the whole train step (docs/benchmarks.md)."""
    begin = time.perf_counter()

    def others() -> step_command.Others:
        from benchmarks import reference_step, step_twin

        options = {"directory": arguments.reference, "repeats": arguments.repeats}
        return step_command.Others(
            torch=partial(step_twin.make, forms=arguments.torch_forms),
            torch_precision=step_twin.precision,
            reference=partial(reference_step.measure, **options),
        )

    with errors.reported():
        outcome = step_command.run(arguments, others)
    seconds = round(time.perf_counter() - begin, 1)
    print("RESULT " + json.dumps({**outcome, "seconds": seconds}))


@app.command(name="gpu")
def run_gpu(arguments: tyro.conf.OmitArgPrefixes[gpu.Gpu]) -> None:
    """Runs all measurements for a GPU machine, in calls of a few minutes (docs/gpu.md)."""
    gpu.main(arguments)


@app.command(name="gpu-program")
def run_gpu_program(only: tuple[str, ...] = ()) -> None:
    """Reports memory, traffic and kernels of five programs compiled for an H100 (docs/gpu.md).

    Needs a CUDA plugin and no GPU. Writes docs/gpu.json, and docs/gpu.md's table and picture.

    Args:
      only: Only programs whose names contain one of these; by default all.
    """
    begin = time.perf_counter()
    with errors.reported():
        kept = program.measure(only)
    print(program.table(kept))
    seconds = round(time.perf_counter() - begin, 1)
    files = ["docs/gpu.json", "docs/gpu.md", "docs/images/gpu_traffic.png"]
    print("RESULT " + json.dumps({**kept, "seconds": seconds, "files": files}))


@app.command(name="gpu-scale")
def run_gpu_scale() -> None:
    """Reports collectives and modeled scaling of r50 on up to 1,024 H100s (docs/gpu.md).

    Needs a CUDA plugin and no GPU. Writes docs/gpu_scale.json and docs/gpu.md's tables.
    """
    begin = time.perf_counter()
    with errors.reported():
        rows = scale.measure()
    print(scale.tables(rows))
    seconds = round(time.perf_counter() - begin, 1)
    files = ["docs/gpu_scale.json", "docs/gpu.md"]
    result = {"images_per_second": {row.devices: row.images_per_second for row in rows}}
    print("RESULT " + json.dumps({**result, "seconds": seconds, "files": files}))


@app.command(name="gpu-table")
def run_gpu_table(
    gpus: tuple[GpuName, ...] = plan_table.GPUS,
    only: tuple[str, ...] = (),
    most: int | None = None,
    output: Path = Path("runs/gpu_table"),
) -> None:
    """Reports memory, traffic and modeled speed on absent GPUs (docs/benchmarks_appendix.md).

    Needs a CUDA plugin and no GPU. The same command resumes.

    Args:
      gpus: GPUs to compile for.
      only: Only rows whose names contain one of these, such as speed or r50_8000000; by default
          all.
      most: Largest number of rows, for a part of the table.
      output: Folder for the rows, table.json and table.md.
    """
    begin = time.perf_counter()
    with errors.reported():
        wanted = [job for job in plan_table.jobs(gpus) if any(x in job.name for x in only or ("",))]
        if not wanted or (most is not None and most < 1):
            raise errors.UserError(f"--only {' '.join(only)} --most {most} leave no row")
        rows = plan_table.measure(
            wanted[:most], output / "rows", say=lambda words: print(words, flush=True)
        )
    text = plan_table.markdown(rows)
    files = [output / "table.md", output / "table.json"]
    files[0].write_text(text)
    files[1].write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    print(text)
    seconds = round(time.perf_counter() - begin, 1)
    result = {"rows": len(rows), "seconds": seconds, "files": [str(file) for file in files]}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    app.cli(prog="python -m benchmarks", description=__doc__)
