"""A process that saves at every step and keeps one checkpoint, until its stdin is closed.

python tests/support/pruning_run.py WORKDIR
"""

import dataclasses
import sys
import threading
from pathlib import Path

import jax.numpy as jnp

from arcface_jax.config import CheckpointConfig, Config, ModelConfig
from arcface_jax.runtime import devices, locks
from arcface_jax.training import checkpoint, step


def main(workdir: str) -> None:
    """Saves the same small state as step 1, 2, ... of a run."""
    config = Config(
        workdir=workdir,
        model=ModelConfig(network="r_tiny", embedding_size=16),
        checkpoint=CheckpointConfig(keep=1),
    )
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    with locks.held(Path(workdir)), checkpoint.open_workdir(config) as manager:
        state = step.init_state(config, num_classes=3, mesh=devices.make(1))
        number = 0
        while not ended.is_set():
            number += 1
            state = dataclasses.replace(state, step=jnp.asarray(number))
            checkpoint.save(manager, state, {"num_classes": 3, "num_images": 9})
            manager.wait_until_finished()


if __name__ == "__main__":
    main(sys.argv[1])
