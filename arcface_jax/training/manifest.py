"""Record of a run: run.txt for people, environment.json for programs, and the bytes of its state.

Both files record the versions, devices, settings and code that a run was started with. `arcface-jax
doctor` also uses `versions`.
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from arcface_jax.config import Config, loading
from arcface_jax.heads import automatic
from arcface_jax.models.registry import Arrays
from arcface_jax.runtime import damaged, foreign, launch
from arcface_jax.runtime.devices import compute_capability
from arcface_jax.runtime.files import complete_steps, reporting_disk_errors, write_atomic
from arcface_jax.training.step import TrainState

PACKAGES = (
    "arcface-jax",
    "flax",
    "grain",
    "jax",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "jaxlib",
    "numpy",
    "opencv-python-headless",
    "optax",
    "orbax-checkpoint",
)
"""Packages that affect a run's numbers. At most one of the plugins is installed."""
MIB = 2**20
# Environment variables that change what a run does begin with these.
_VARIABLES = ("XLA_", "JAX_", "SLURM_JOB", "OMPI_COMM", "CUDA_VISIBLE", "NVIDIA_TF32", "GLIBC_TUN")


def versions() -> dict[str, str]:
    """Returns the versions of the installed `PACKAGES`."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_environment(config: Config) -> Path:
    """Appends this start to the list in WORKDIR/environment.json; a damaged file is set aside.

    Raises:
      CheckpointError: the file cannot be written.
    """
    workdir = Path(config.workdir)
    path = workdir / "environment.json"
    with reporting_disk_errors(workdir, path):
        starts = _earlier_starts(path)
        if starts is None:
            aside = damaged.set_aside(path, workdir)
            damaged.warn([f"{path} is damaged; moved to {aside}; starting a new one"])
        elif not starts and complete_steps(workdir):
            damaged.warn([f"{path} is missing: the earlier starts of this run are not on record"])
        starts = [*(starts or []), _this_start(config)]
        write_atomic(path, json.dumps(starts, indent=1) + "\n")
    return path


def _earlier_starts(path: Path) -> list[dict[str, Any]] | None:
    """Reads the starts in environment.json; None where it is damaged."""
    if not path.exists():
        return []
    try:
        starts = foreign.parse_json(path.read_bytes())
    except ValueError:
        return None
    return starts if isinstance(starts, list) else None


def _this_start(config: Config) -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "python": sys.version,
        "system": platform.platform(),
        "host": platform.node(),
        "packages": versions(),
        "git": _checkout(),
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
        "config": json.loads(loading.to_json(config)),
    }


def _checkout() -> dict[str, Any] | None:
    """Returns commit and changed files of the code's checkout; None if installed without one.

    A virtual environment may lie in a repository of the user's, which does not track this file.
    """
    if _git_output("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git_output("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git_output("status", "--porcelain", "--untracked-files=no") or ""
    return {"commit": commit.strip(), "changed": changed.splitlines()}


def _git_output(*arguments: str) -> str | None:
    """Returns the output of a git command about this file's checkout; None if it fails."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def write_summary(config: Config, state: TrainState, devices: Mesh, *, first_lines: str) -> str:
    """Writes WORKDIR/run.txt; a resumed run replaces it.

    Args:
      config: configuration of the run.
      state: on the devices.
      devices: its mesh.
      first_lines: what the terminal prints of the run.

    Returns:
      A few lines of it for the terminal.
    """
    changed = loading.changed_settings(config)
    held = state_bytes(state)
    memory = f"state {sum(held.values()) / MIB:,.1f} MiB on each device"
    parts = [
        first_lines,
        "Versions\n" + _indented(_version_lines()),
        "Mesh\n" + _indented(mesh_lines(devices)),
        "Memory\n" + _indented(_memory_lines(held)),
        "Settings (* differs from the default)\n" + _indented(_setting_lines(config, changed)),
        "Automatic settings\n" + _indented(_automatic_lines(config, devices)),
        "Parameters\n" + _indented(parameter_lines(state.params)),
    ]
    path = Path(config.workdir) / "run.txt"
    if launch.is_first():
        with reporting_disk_errors(path.parent, path):
            write_atomic(path, "\n\n".join(parts) + "\n")
    count = sum(array.size for array in state.params.values())
    return (
        f"{count:,} parameters; {memory}; {len(changed)} settings differ from their defaults; "
        f"{path} has them all"
    )


def _version_lines() -> list[str]:
    system = f"python {platform.python_version()} on {platform.platform()}"
    return [system, *(f"{name} {version}" for name, version in versions().items())]


def mesh_lines(devices: Mesh) -> list[str]:
    """Returns lines about the mesh: its axis, and where its devices are."""
    flat = devices.devices.flat
    axes = ", ".join(f"{name} {size}" for name, size in devices.shape.items())
    return [
        f"{axes}: batch and class centers split, backbone on every device",
        f"{jax.process_count()} process(es), {len(jax.local_devices())} device(s) in each",
        *(f"{d.id}: {d.device_kind} ({d.platform}), process {d.process_index}" for d in flat),
    ]


def _memory_lines(held: dict[str, int]) -> list[str]:
    rows = [f"{name:<20}{size / MIB:>12,.2f} MiB" for name, size in held.items()]
    return [
        "on each device, state only:",
        *rows,
        f"{'total':<20}{sum(held.values()) / MIB:>12,.2f} MiB",
        "activations are not included; `arcface-jax plan` reports them before a run",
    ]


def _setting_lines(config: Config, changed: dict[str, tuple[object, object]]) -> list[str]:
    lines = []
    for name, value in loading.flatten(config).items():
        default = f"   (default {changed[name][1]!r})" if name in changed else ""
        lines.append(f"{'*' if name in changed else ' '} {name} = {value!r}{default}")
    return lines


def _automatic_lines(config: Config, devices: Mesh) -> list[str]:
    """Returns the settings chosen automatically, with their values on this mesh."""
    platform = devices.devices.flat[0].platform
    head = automatic.resolve(
        config.head,
        platform=platform,
        batch=config.data.global_batch_size,
        capability=compute_capability(devices),
    )
    given = {
        "head.block_size": config.head.block_size != 0,
        "head.block_form": config.head.block_form != "automatic",
    }
    return [
        f"{name} = {getattr(head, name.removeprefix('head.'))!r} "
        f"({'as configured' if as_given else f'chosen for {platform}'})"
        for name, as_given in given.items()
    ]


def parameter_lines(params: Arrays) -> list[str]:
    """Lists every array with its shape and size, under its stage with the stage's total.

    A stage is the first part of the dotted name.
    """
    stages: dict[str, Arrays] = {}
    for name, array in params.items():
        stages.setdefault(name.partition(".")[0], {})[name] = array
    lines = []
    for stage, arrays in stages.items():
        total = sum(array.size for array in arrays.values())
        lines.append(f"{stage}: {total:,} in {len(arrays)} arrays")
        for name, array in arrays.items():
            shape = " x ".join(map(str, np.shape(array)))
            lines.append(f"  {name:<48} {shape:<24} {array.size:>14,}")
    return [*lines, f"total: {sum(a.size for a in params.values()):,} in {len(params)} arrays"]


def _indented(lines: list[str]) -> str:
    return "\n".join("  " + line for line in lines)


def device_bytes(tree: Any) -> int:
    """Returns the bytes of abstract arrays on one device of their mesh."""
    shards = [(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards)


def state_bytes(state: TrainState) -> dict[str, int]:
    """Returns the bytes of an abstract state on each device, by the names in `Plan.needed`."""
    parts = {
        "parameters": state.params,
        "batch_norm": state.batch_stats,
        "optimizer": state.opt_state,
        "centers": state.centers,
        "centers_optimizer": state.centers_opt,
        "running_mean": state.ema,
        "scalars": (state.step, state.head_state, state.counters, state.loss_scale),
    }
    return {name: device_bytes(part) for name, part in parts.items()}
