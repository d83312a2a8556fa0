"""What is set up before JAX looks at its devices: determinism, compiled programs, processes."""

import os
from pathlib import Path

import jax

from arcface_jax import distributed
from arcface_jax.config import Config

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def start(config: Config) -> None:
    """Makes this process ready for a run; the first thing that a command does with its recipe.

    Raises:
      ConfigError: the processes of the run do not find each other.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if config.deterministic and _DETERMINISTIC not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}".strip()
    if config.compilation_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(config.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    distributed.start(config.distributed)
