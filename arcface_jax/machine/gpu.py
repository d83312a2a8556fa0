"""Compile a run's train step for an NVIDIA GPU that need not be present, and read the program.

XLA:GPU needs a description of the card, not the card or its driver. It runs in a separate process
(`gpu_worker`), the only one that loads the CUDA plugin; this module imports neither JAX nor the
plugin.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import IO, Literal, NamedTuple

from arcface_jax.config import Config, loading
from arcface_jax.errors import ConfigError, UserError
from arcface_jax.machine import hlo

GpuName = Literal["a100", "b200", "h100", "h200", "l40s"]
Part = Literal["step", "head"]
NAMES: tuple[GpuName, ...] = ("a100", "b200", "h100", "h200", "l40s")
GPUS_A_HOST = 8
MOST_DEVICES = 1024
_TARGETS = Path(__file__).parent / "gpu_targets"
_WORKER = "arcface_jax.machine.gpu_worker"


class Target(NamedTuple):
    """Facts about a GPU, from its file in `gpu_targets`."""

    name: str
    """One of `NAMES`."""
    device_kind: str
    """Name as CUDA spells it."""
    memory: int
    """Memory in bytes."""
    bandwidth: float
    """Memory bandwidth in bytes per second, from the data sheet."""
    l2: int
    """Size of the L2 cache in bytes."""


@dataclass(frozen=True)
class Program:
    """A compiled program: its memory on each device, and its text."""

    text: str
    """Text of the scheduled HLO module."""
    temporary_bytes: int
    """Temporary bytes besides arguments and results."""
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """Bytes of results that reuse an argument's memory."""
    state: dict[str, int]
    """Bytes of the train state on each device by part, and of the batch; empty for a head."""
    seconds: float
    """Seconds of tracing and compiling."""

    @property
    def peak_bytes(self) -> int:
        """Bytes of arguments, of results without an argument's memory, and of temporaries."""
        beside = self.output_bytes - self.alias_bytes
        return self.argument_bytes + beside + self.temporary_bytes

    @cached_property
    def module(self) -> hlo.Module:
        """The program's kernels, loops and collectives."""
        return hlo.parse(self.text)


class Compiler:
    """A process that compiles for one kind of GPU; `compiler` starts and ends it."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path, log: IO[str]):
        self._process = process
        self._folder = folder
        self._log = log
        self._count = 0

    def compile(self, config: Config, *, num_classes: int, part: Part = "step") -> Program:
        """Compiles a run's train step, or its head for given embeddings.

        Args:
          config: the run; workdir and data.path may be empty, `devices` is the compiler's.
          num_classes: C.
          part: what to compile.

        Raises:
          UserError: the configuration is invalid, or the compiler failed.
        """
        self._count += 1
        path = self._folder / f"{self._count}.hlo"
        asked = {
            "config": json.loads(loading.to_json(config)),
            "num_classes": num_classes,
            "part": part,
            "text": str(path),
        }
        answer = self._ask(asked)
        if "user_error" in answer:
            raise UserError(answer["user_error"])
        if "error" in answer:
            raise UserError(f"XLA cannot compile this run for the GPU: {answer['error']}")
        text = path.read_text()
        path.unlink()
        return Program(text=text, **answer)

    def _ask(self, question: dict[str, object]) -> dict:
        entrance, out = self._process.stdin, self._process.stdout
        assert entrance is not None and out is not None  # both are pipes
        try:
            entrance.write(json.dumps(question) + "\n")
            entrance.flush()
            line = out.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ["it printed nothing"])[-1]
            raise UserError(f"the GPU compiler ended with exit code {code}: {last[:500]}")
        return json.loads(line)


@contextmanager
def compiler(gpu: str, *, devices: int) -> Iterator[Compiler]:
    """Starts a process that compiles for `devices` GPUs; it is killed at the end.

    Args:
      gpu: one of `NAMES`.
      devices: GPUs, at most 8 on a host.

    Raises:
      UserError: the GPU or the number of GPUs is not supported, or there is no matching CUDA
          plugin.
    """
    target(gpu)
    topology(devices)
    check_plugin()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # The same package as here, wherever it was imported from.
    folders = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    with (
        tempfile.TemporaryDirectory(prefix="arcface_jax_gpu_") as folder,
        tempfile.TemporaryFile("w+") as log,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", _WORKER, gpu, str(devices)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        try:
            yield Compiler(process, Path(folder), log)
        finally:
            process.kill()
            process.communicate()


def compile_step(
    config: Config,
    *,
    num_classes: int,
    gpu: str,
    devices: int,
    part: Part = "step",
) -> Program:
    """Compiles one program; for several, use `compiler`.

    Raises:
      UserError: as `compiler` and `Compiler.compile`.
    """
    with compiler(gpu, devices=devices) as process:
        return process.compile(config, num_classes=num_classes, part=part)


def target(name: str) -> Target:
    """Returns the facts about a GPU that time and memory depend on.

    Raises:
      ConfigError: the GPU has no description.
    """
    text = description(name)

    def fact(field: str) -> str:
        found = re.search(rf'^\s*{field}: "?([^"\n]+)', text, re.MULTILINE)
        assert found is not None, f"{name}.txtpb has no {field}"
        return found[1]

    return Target(
        name,
        device_kind=fact("name"),
        memory=int(fact("device_memory_size")),
        bandwidth=float(fact("memory_bandwidth")),
        l2=int(fact("l2_cache_size")),
    )


def name_of(device_kind: str) -> str | None:
    """Returns the target that describes a real GPU, by CUDA's name for it; None without one."""
    return next((name for name in NAMES if target(name).device_kind == device_kind), None)


def description(name: str) -> str:
    """Returns XLA's description of a GPU, a text proto `GpuTargetConfigProto`.

    Raises:
      ConfigError: the name is unknown.
    """
    if name not in NAMES:
        raise ConfigError(f"--gpu {name} is unknown: use one of {', '.join(NAMES)}")
    return (_TARGETS / f"{name}.txtpb").read_text()


def topology(devices: int) -> str:
    """Returns XLA's topology: hosts x 1 x GPUs per host, the largest divisor up to 8.

    Raises:
      ConfigError: the number of GPUs is out of range.
    """
    if not 1 <= devices <= MOST_DEVICES:
        raise ConfigError(f"--devices {devices} must be 1 to {MOST_DEVICES} GPUs to plan for")
    each = max(n for n in range(1, GPUS_A_HOST + 1) if devices % n == 0)
    return f"{devices // each}x1x{each}"


def check_plugin() -> str:
    """Finds the CUDA plugin that compiles, and returns its distribution's name and version.

    Raises:
      UserError: no plugin matches jaxlib's version, or a dependency is missing; the message has the
        command to install it.
    """
    wanted = metadata.version("jaxlib")
    found = {}
    for cuda in ("13", "12"):
        if importlib.util.find_spec(f"jax_cuda{cuda}_plugin") is not None:
            found[cuda] = metadata.version(f"jax-cuda{cuda}-plugin")
    fitting = [cuda for cuda, version in found.items() if release(version) == release(wanted)]
    if not fitting:
        cuda = next(iter(found), "12")
        has = f"jax-cuda{cuda}-plugin {found[cuda]} is installed" if found else "none is installed"
        raise UserError(
            f"compiling for a GPU needs the CUDA plugin of jaxlib {wanted}, and {has}: "
            f"{install_command(cuda)}"
        )
    cuda = fitting[0]
    if not _has_ptxas():
        raise UserError(
            f"compiling for a GPU needs ptxas, of the nvcc package or a CUDA toolkit on PATH: "
            f"{install_command(cuda)}"
        )
    return f"jax-cuda{cuda}-plugin {found[cuda]}"


def release(version: str) -> list[str]:
    """Returns the first three numbers: the fourth, as in 0.12.0.1, marks a rebuild for one
    jaxlib.
    """
    return version.split(".")[:3]


def install_command(cuda: str) -> str:
    """Returns the command to install the compiler, at versions that match this jaxlib."""
    wanted = ".".join([*release(metadata.version("jaxlib")), "*"])
    nvcc = "nvidia-cuda-nvcc-cu12" if cuda == "12" else "'nvidia-cuda-nvcc<14' 'nvidia-nvvm<14'"
    return (
        f"pip install 'jax-cuda{cuda}-plugin=={wanted}' 'jax-cuda{cuda}-pjrt=={wanted}' {nvcc} "
        f"(1.2 GB; the packages of the extra gpu-plan-cuda{cuda})"
    )


def _has_ptxas() -> bool:
    """Returns whether a wheel, PATH or CUDA_HOME has the assembler that XLA calls."""
    if (
        shutil.which("ptxas")
        or (Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/ptxas").exists()
    ):
        return True
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    wheels = ("cuda_nvcc/bin/ptxas", "cu13/bin/ptxas")
    return any((Path(folder) / wheel).exists() for folder in folders or () for wheel in wheels)
