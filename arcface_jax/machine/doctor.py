"""Check whether a machine can run a recipe, and find its bottleneck, by measurement.

The parts of a step are measured separately: reading and decoding images, the products of backbone
and head at the speed of one large product, and what the devices send to each other. The longest of
them is the bottleneck; a real step takes at least as long.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from arcface_jax import config as configs
from arcface_jax import plugins
from arcface_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DistributedConfig,
    HeadConfig,
    ModelConfig,
)
from arcface_jax.data import opening, pipeline
from arcface_jax.data.pairs import bins, lists
from arcface_jax.data.source import Source
from arcface_jax.errors import UserError, install
from arcface_jax.machine import collectives, gpu, plan, roofline, timing
from arcface_jax.machine import input as data_benchmark
from arcface_jax.runtime import devices as meshes
from arcface_jax.runtime import memory
from arcface_jax.training import manifest, optim, saved_runs, step, teacher, validation

_SAMPLE = 64 * 2**20  # bytes to write to the workdir's disk
_ONE_PROCESS = (
    "the options --distributed.* are not applied: this examines the devices of this host as one "
    "process; run it on each host with --devices set to the devices there"
)
_PRODUCT = {"cpu": 1024}  # size of the multiplied matrices; 4096 elsewhere


class Check(NamedTuple):
    """One line of the report."""

    name: str
    verdict: Literal["ok", "warning", "fails"]
    """`fails` marks what would make a run fail."""
    words: str
    values: Mapping[str, float] = {}
    """Values for RESULT."""


def examine(config: Config, *, num_classes: int | None, seconds: float) -> Iterator[Check]:
    """Yields the checks as they complete.

    Args:
      config: the run; its data and workdir are checked if they are set.
      num_classes: C, if there is no data.
      seconds: time for measuring the input pipeline.
    """
    yield check_versions(manifest.versions())
    yield check_driver()
    try:
        mesh = meshes.make(config.devices)
        named = {"workdir": config.workdir or "-", "data__path": config.data.path or "-"}
        validation.validate(configs.replace(config, **named), num_devices=mesh.size)
    except UserError as error:
        yield Check("devices", "fails", str(error))
        return
    first = mesh.devices.flat[0]
    words = f"{mesh.size} x {first.device_kind} ({first.platform}): OK for this recipe"
    yield Check("devices", "ok", words, {"devices": mesh.size})
    if config.distributed != DistributedConfig():
        yield Check("processes", "warning", _ONE_PROCESS)
    milliseconds: dict[str, float] = {}
    if config.data.path:
        try:
            source = opening.open_source(config.data, seed=config.seed)
            validation.validate_data(source, config.data.path, head=config.distill.head)
            data = check_data(config.data, source, seconds=seconds)
        except UserError as error:
            yield Check("data", "fails", str(error))
            return
        yield data
        milliseconds["reading and decoding images"] = data.values["data_ms"]
        num_classes = num_classes or source.num_classes
    yield check_files(config)
    if not num_classes:
        yield Check("step", "warning", "not looked at: name --data.path or --num-classes")
        return
    state = manifest.state_bytes(step.abstract_state(config, num_classes=num_classes, mesh=mesh))
    yield check_memory(state, mesh)
    if config.workdir:
        yield check_disk(Path(config.workdir), config.checkpoint, state, mesh)
    if config.workdir and config.data.path and config.distill.teacher:
        yield check_teacher(config)
    compute = check_compute(
        config.model,
        config.head,
        batch=config.data.global_batch_size,
        num_classes=num_classes,
        mesh=mesh,
    )
    traffic = check_traffic(config, mesh)
    yield from (compute, traffic)
    if not _is_cpu(mesh):
        yield check_step(config, num_classes=num_classes, mesh=mesh)
    milliseconds["the products of backbone and head"] = compute.values["compute_ms"]
    milliseconds["the head's all-gather and reduce-scatter"] = traffic.values["head_ms"]
    milliseconds["the all-reduce of the backbone's gradient"] = traffic.values["all_reduce_ms"]
    yield bottleneck(milliseconds, config.data.global_batch_size)


def check_versions(found: Mapping[str, str]) -> Check:
    """Checks that JAX, its library and its CUDA plugin are of one release."""
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    release = gpu.release(found["jax"])
    apart = [n for n, v in found.items() if n.startswith("jax") and gpu.release(v) != release]
    if not apart:
        return Check("versions", "ok", listed)
    # jaxlib itself rejects versions that JAX does not support; a mismatched plugin would hide GPUs.
    verdict = "fails" if any("plugin" in name for name in apart) else "warning"
    wanted = " ".join(f"{name}=={found['jax']}" for name in apart)
    return Check("versions", verdict, f"{listed}: versions do not match: pip install {wanted}")


def check_driver() -> Check:
    """Reports nvidia-smi's output, if installed, and whether JAX sees the same GPUs."""
    if shutil.which("nvidia-smi") is None:
        return Check("driver", "ok", "no nvidia-smi: no NVIDIA GPU is expected")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("driver", "fails", f"nvidia-smi failed: {error}")
    lines = (done.stdout + done.stderr).strip().splitlines() or ["no GPU"]
    if done.returncode:
        return Check("driver", "fails", f"nvidia-smi fails: {' '.join(lines)[:200]}")
    if done.stdout.strip() and jax.devices()[0].platform == "cpu":
        words = f"{lines[0]}, but JAX sees only the CPU: {install('cuda12')}"
        return Check("driver", "fails", words)
    return Check("driver", "ok", f"{len(lines)} x {lines[0]}")


def check_files(config: Config) -> Check:
    """Checks that the models and verification sets that the recipe names exist, unopened."""
    places = {"distill.teacher": config.distill.teacher}
    if not (config.workdir and saved_runs.is_begun(Path(config.workdir))):  # not to resume
        places["init_from"] = config.init_from
    places = {name: place for name, place in places.items() if place}
    problems = [
        f"{name} {place} does not exist, or has no checkpoint: name another model"
        for name, place in places.items()
        if not _exists(place)
    ]
    # Without a training set, where relative ones may lie is not known.
    targets = config.evaluation.targets if config.data.path else ()
    for target in targets:
        try:
            _find_target(target, config.data)
        except UserError as error:
            problems.append(str(error))
    if problems:
        return Check("files", "fails", "; ".join(problems))
    return Check("files", "ok", ", ".join((*places.values(), *targets)) or "none are named")


def _exists(place: str) -> bool:
    path = Path(place)
    return saved_runs.is_begun(path) if (path / "checkpoints").is_dir() else path.exists()


def _find_target(target: str, data: DataConfig) -> None:
    """Finds one of `evaluation.targets` as an evaluation does.

    Raises:
      UserError: it does not exist.
    """
    reference = plugins.parse(target)
    if reference is not None:
        plugins.load(reference.name, field="evaluation.targets")
        return
    if target == opening.SYNTHETIC:
        return
    base = opening.folder_with(data.path, target.partition(":")[0])
    listed = lists.split(target, base=base)
    if listed is not None:
        lists.listed(*listed)
    elif not Path(target).is_file() and not (base / target).is_file():
        bins.read_bin(base / target)  # raises an error that names similar files


def check_data(data: DataConfig, source: Source, *, seconds: float) -> Check:
    """Measures the real input pipeline with the recipe's workers, threads and augmentations.

    Raises:
      DataError: the training set is too small for the recipe.
    """
    rate = data_benchmark.pipeline_rate(source, data, data.workers, device=None, seconds=seconds)
    one = data_benchmark.one_thread(source.read, len(source), seconds)
    words = (
        f"{len(source):,} images of {source.num_classes:,} identities; {rate:,.0f} images/s with "
        f"{data.workers} workers, {pipeline.num_threads(data)} threads; "
        f"one thread reads {one:,.0f}/s undecoded"
    )
    needed = data.global_batch_size / jax.process_count()
    values = {"images_per_second": rate, "read_per_second": one, "data_ms": 1e3 * needed / rate}
    return Check("data", "ok", words, values)


def check_memory(state: Mapping[str, int], mesh: Mesh) -> Check:
    """Compares the state with the free memory; CPU devices share the machine's."""
    free = timing.free_memory() / (1 if _is_cpu(mesh) else len(jax.local_devices()))
    needed = sum(state.values()) * (len(mesh.local_devices) if _is_cpu(mesh) else 1)
    host = memory.free_on_host()
    words = (
        f"the state takes {_gib(needed)} of {_gib(free)} free"
        f"{'' if _is_cpu(mesh) else ' on each device'}, without activations (`arcface-jax plan` "
        f"counts them); {_gib(host)} of the host's memory are free"
    )
    values = {"state_bytes": needed, "free_bytes": free, "host_free_bytes": host}
    if needed > free:
        return Check("memory", "fails", words + ": more devices, or fewer classes", values)
    return Check("memory", "ok", words, values)


def check_disk(
    workdir: Path, checkpoint: CheckpointConfig, state: Mapping[str, int], mesh: Mesh
) -> Check:
    """Measures the workdir's disk, and compares its free space with the checkpoints to store,
    minus those that exist already.
    """
    backbone = sum(size for name, size in state.items() if not name.startswith("centers"))
    one = backbone + mesh.size * (sum(state.values()) - backbone)
    copies = checkpoint.keep + 1  # the new one is written before the oldest is removed
    copies += checkpoint.keep_best if checkpoint.best_metric else 0
    try:
        folder = next(p for p in (workdir, *workdir.absolute().parents) if p.is_dir())
        write, read = _disk_speed(folder)
        free = shutil.disk_usage(folder).free
        stored = (workdir / "checkpoints").rglob("*")
        there = sum(path.stat().st_size for path in stored if path.is_file())
    except OSError as error:
        return Check("disk", "fails", f"cannot write to {workdir}: {error.strerror}")
    seconds = one / write
    words = (
        f"writes {write / 2**20:,.0f} MiB/s, reads {read / 2**20:,.0f}; a checkpoint of "
        f"{_gib(one)} takes {seconds:.1f} s; {copies} of them fit into {_gib(free)} free"
        f"{f' and {_gib(there)} of checkpoints that exist' if there else ''}"
    )
    values = {"disk_write": write, "disk_read": read, "checkpoint_bytes": one, "disk_free": free}
    # The next one is written before an old one is removed, even if too many are there.
    if max(one, copies * one - there) > free:
        fix = "free some, or keep fewer with --checkpoint.keep"
        words = words.replace(" fit into", " do not fit into") + f": {fix}"
        return Check("disk", "fails", words, values)
    return Check("disk", "ok", words, values)


def check_teacher(config: Config) -> Check:
    """Checks the disk space for the teacher's cache, minus what exists already."""
    needed, words = plan.teacher_disk(config)
    if not needed:
        return Check("teacher", "ok", "runs at every step: no cache")
    folder = teacher.folder_of(config.distill, Path(config.workdir))
    there = sum(path.stat().st_size for path in folder.glob("teacher-*.npy"))
    free = shutil.disk_usage(next(p for p in folder.absolute().parents if p.is_dir())).free
    words = f"{words}; {_gib(there)} are there, {_gib(free)} free"
    values = {"teacher_bytes": needed, "teacher_disk_free": free}
    if needed - there > free:
        return Check("teacher", "fails", f"{words}: name another --distill.cache", values)
    return Check("teacher", "ok", words, values)


def _disk_speed(folder: Path) -> tuple[float, float]:
    """Measures bytes per second written and synced, and read without the page cache."""
    path = folder / f".doctor_{os.getpid()}"
    data = np.random.default_rng(0).bytes(_SAMPLE)
    try:
        with path.open("wb") as file:
            begin = time.perf_counter()
            file.write(data)
            os.fsync(file.fileno())
            write = time.perf_counter() - begin
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        path.read_bytes()
        return _SAMPLE / write, _SAMPLE / (time.perf_counter() - begin)
    finally:
        path.unlink(missing_ok=True)


def check_compute(
    model: ModelConfig, head: HeadConfig, *, batch: int, num_classes: int, mesh: Mesh
) -> Check:
    """Estimates the step's floating-point operations at the speed of one large product per
    device.
    """
    platform = mesh.devices.flat[0].platform
    rates = {
        dtype: timing.matmul_flops_per_second(dtype, size=_PRODUCT.get(platform, 4096))
        for dtype in {model.dtype, head.dtype}
    }
    # CPU devices are parts of one processor, and a product uses all of it.
    together = 1 if _is_cpu(mesh) else mesh.size
    backbone = plan.backbone_flops_per_image(model) * batch
    products = plan.head_flops(
        head,
        model,
        rate=head.sample_rate,
        batch=batch,
        num_classes=num_classes,
        num_devices=mesh.size,
    )
    body_ms = 1e3 * backbone / rates[model.dtype] / together
    head_ms = 1e3 * products / rates[head.dtype] / together
    words = (
        f"{rates[model.dtype] / 1e12:.3g} TFLOP/s in {model.dtype}: the backbone takes "
        f"{body_ms:.3g} ms a step at least, the head {head_ms:.3g} ({backbone / 1e12:.3g} and "
        f"{products / 1e12:.3g} TFLOP)"
    )
    values = {"flops_per_second": rates[model.dtype], "compute_ms": body_ms + head_ms}
    return Check("compute", "ok", words, values)


def check_traffic(config: Config, mesh: Mesh) -> Check:
    """Measures collectives over the devices, at the sizes of this recipe's step."""
    if mesh.size == 1:
        nothing = {"head_ms": 0.0, "all_reduce_ms": 0.0}
        return Check("traffic", "ok", "one device: nothing to send", nothing)
    shapes = step.backbone(config).shapes[0]
    found = collectives.measure(
        mesh,
        batch=config.data.global_batch_size,
        size=config.model.embedding_size,
        parameters=sum(int(np.prod(x.shape)) for x in shapes.values()),
        head_dtype=config.head.dtype,
        head_reduce_dtype=config.head.reduce_dtype,
        reduce_dtype=config.optimizer.reduce_dtype,
    )
    gather, scatter, reduce = found.values()
    words = (
        f"a device sends {gather.bytes / 2**20:.2f} MiB a step in the head's all-gather "
        f"({gather.rate / 1e9:.2f} GB/s), {scatter.bytes / 2**20:.2f} in its reduce-scatter "
        f"({scatter.rate / 1e9:.2f} GB/s), {reduce.bytes / 2**20:.1f} in the gradient's all-reduce "
        f"({reduce.rate / 1e9:.2f} GB/s)"
    )
    values = {f"{name}_bytes": t.bytes for name, t in found.items()}
    values |= {f"{name}_bytes_per_second": t.rate for name, t in found.items()}
    values["head_ms"] = 1e3 * (gather.seconds + scatter.seconds)
    values["all_reduce_ms"] = 1e3 * reduce.seconds
    return Check("traffic", "ok", words, values)


class Step(NamedTuple):
    """Measurements of a train step."""

    seconds: float
    """Median time."""
    peak_bytes: int | None
    """Peak bytes of a device since JAX started; None if it does not count."""


def check_step(config: Config, *, num_classes: int, mesh: Mesh) -> Check:
    """Measures the real train step, and compares it with the program compiled for this GPU."""
    try:
        found = measure_step(config, num_classes=num_classes, mesh=mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        words = "out of memory: `arcface-jax plan` finds the batch and the classes that fit"
        return Check("step", "fails", words)
    values = {"step_ms": 1e3 * found.seconds}
    words = f"measured {1e3 * found.seconds:.2f} ms"
    if found.peak_bytes is not None:
        values["peak_bytes"] = found.peak_bytes
        words += f", peak memory {_gib(found.peak_bytes)}"
    kind = mesh.devices.flat[0].device_kind
    name = gpu.name_of(kind)
    if name is None:
        known = ", ".join(gpu.target(name).device_kind for name in gpu.NAMES)
        return Check("step", "ok", f"{words}; no model of {kind} (there are {known})", values)
    try:
        program = gpu.compile_step(config, num_classes=num_classes, gpu=name, devices=mesh.size)
    except UserError as error:
        return Check(
            "step", "ok", f"{words}; not compared with the compiled program: {error}", values
        )
    assumed = roofline.assume(name, devices=mesh.size)
    modeled = roofline.estimate(program.module, assumed, devices=mesh.size).seconds
    values |= {"compiled_bytes": program.peak_bytes, "modelled_ms": 1e3 * modeled}
    words += (
        f"; compiled for {kind}: {_gib(program.peak_bytes)}, without cuDNN's workspace, and "
        f"modeled {1e3 * modeled:.2f} ms (measured / modeled {found.seconds / modeled:.2f})"
    )
    return Check("step", "ok", words, values)


def measure_step(config: Config, *, num_classes: int, mesh: Mesh, repeats: int = 5) -> Step:
    """Measures the train step on black images of identity 0, after two warm-up steps."""
    packing = step.make_packing(config, mesh)
    # Without a name for the unpacked state, which would duplicate its arrays.
    state = packing.pack(step.init_state(config, num_classes=num_classes, mesh=mesh))
    schedule = optim.make_schedule(config.schedule, base_rate=0.1, steps_per_epoch=10**6)
    run = step.make_train_step(config, num_classes=num_classes, schedule=schedule, mesh=mesh)
    batch = {
        name: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
        for name, x in plan.batch_of(config, mesh).items()
    }
    seconds = []
    for _ in range(2 + repeats):
        begin = time.perf_counter()
        state, metrics = run(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begin)
    stats = mesh.local_devices[0].memory_stats() or {}
    return Step(float(np.median(seconds[2:])), stats.get("peak_bytes_in_use"))


def bottleneck(milliseconds: Mapping[str, float], batch: int) -> Check:
    """Returns the slowest of the measured parts of a step."""
    slowest = max(milliseconds, key=lambda name: milliseconds[name])
    longest = milliseconds[slowest]
    parts = ", ".join(f"{name} {ms:.3g} ms" for name, ms in milliseconds.items())
    words = (
        f"{slowest} will be the bottleneck: no more than {1e3 * batch / longest:,.0f} images/s. "
        f"For one step: {parts}"
    )
    return Check("bottleneck", "ok", words, {"most_images_per_second": 1e3 * batch / longest})


def _is_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
