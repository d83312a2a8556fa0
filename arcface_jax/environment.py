"""WORKDIR/environment.json: what a run was started with, once for each start."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from arcface_jax import config_files, storage
from arcface_jax.config import Config
from arcface_jax.errors import CheckpointError

_PACKAGES = (
    "arcface-jax",
    "flax",
    "grain",
    "jax",
    "jaxlib",
    "numpy",
    "opencv-python-headless",
    "optax",
    "orbax-checkpoint",
)
_VARIABLES = ("XLA_", "JAX_", "SLURM_JOB", "OMPI_COMM", "CUDA_VISIBLE", "NVIDIA_TF32", "GLIBC_TUN")


def write(config: Config) -> Path:
    """Appends this start to the list in WORKDIR/environment.json.

    Raises:
      CheckpointError: it cannot be written.
    """
    path = Path(config.workdir) / "environment.json"
    try:
        starts = json.loads(path.read_text()) if path.exists() else []
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; remove it") from error
    with storage.in_words(path.parent, path):
        storage.write_whole(path, json.dumps([*starts, _now(config)], indent=1) + "\n")
    return path


def _now(config: Config) -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "python": sys.version,
        "system": platform.platform(),
        "host": platform.node(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": _git(),
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
        "config": json.loads(config_files.to_json(config)),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit and changed files of the code's checkout; None where there is none."""
    commit = _output("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _output("status", "--porcelain", "--untracked-files=no") or ""
    return {"commit": commit.strip(), "changed": changed.splitlines()}


def _output(*words: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
