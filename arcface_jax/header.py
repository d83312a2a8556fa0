"""The text header of a run: WORKDIR/run.txt, all that a person may ask about it later."""

import importlib.metadata
import platform
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from arcface_jax import config_files, distributed, plan, storage
from arcface_jax.config import Config
from arcface_jax.models import Arrays
from arcface_jax.step import TrainState

_PACKAGES = ("arcface-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
MIB = 2**20


def write(config: Config, state: TrainState, devices: Mesh, *, first_lines: str) -> str:
    """Writes WORKDIR/run.txt; a resumed run's takes the place of the last.

    Args:
      config: of the run.
      state: on the devices.
      devices: its mesh.
      first_lines: what the terminal says of the run.

    Returns:
      A few lines of it for the terminal.
    """
    changed = changed_settings(config)
    held = plan.state_bytes(state)
    memory = f"state {sum(held.values()) / MIB:,.1f} MiB on each device"
    parts = [
        first_lines,
        "Versions\n" + _indented(versions()),
        "Mesh\n" + _indented(mesh_lines(devices)),
        "Memory\n" + _indented(_memory_lines(held)),
        "Settings (* differs from the default)\n" + _indented(_setting_lines(config, changed)),
        "Parameters\n" + _indented(parameter_lines(state.params)),
    ]
    path = Path(config.workdir) / "run.txt"
    if distributed.is_first():
        with storage.in_words(path.parent, path):
            storage.write_whole(path, "\n\n".join(parts) + "\n")
    count = sum(array.size for array in state.params.values())
    return (
        f"{count:,} parameters; {memory}; {len(changed)} settings differ from their defaults; "
        f"{path} has them all"
    )


def changed_settings(config: Config) -> dict[str, tuple[object, object]]:
    """(value, default) of the settings that differ from their default, by dotted name."""
    now, default = config_files.flatten(config), config_files.flatten(Config())
    return {name: (x, default[name]) for name, x in now.items() if x != default[name]}


def versions() -> list[str]:
    """Of Python and the packages that a run's numbers come from, as far as they are installed."""
    found = [f"python {platform.python_version()} on {platform.platform()}"]
    for name in _PACKAGES + _PLUGINS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def mesh_lines(devices: Mesh) -> list[str]:
    """The axis, and where its devices are."""
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
        "on each device, the state alone:",
        *rows,
        f"{'total':<20}{sum(held.values()) / MIB:>12,.2f} MiB",
        "activations are not in it; scripts/plan.py tells them before a run",
    ]


def _setting_lines(config: Config, changed: dict[str, tuple[object, object]]) -> list[str]:
    lines = []
    for name, value in config_files.flatten(config).items():
        default = f"   (default {changed[name][1]!r})" if name in changed else ""
        lines.append(f"{'*' if name in changed else ' '} {name} = {value!r}{default}")
    return lines


def parameter_lines(params: Arrays) -> list[str]:
    """Every array with its shape and count, under its stage with the stage's sum.

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
