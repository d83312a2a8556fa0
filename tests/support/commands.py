"""The project's commands as users run them: in this process, or in one of their own."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]

HANG = 1200
"""Seconds after which a process or a wait counts as hung; a busy machine never takes that long."""

# A run of nine steps in three epochs, on the smallest set that exercises everything.
TINY_RECIPE = """
from arcface_jax import config as c


def get_config():
    return c.Config(
        data=c.DataConfig(
            path="synthetic",
            global_batch_size=8,
            synthetic=c.SyntheticConfig(
                identities=5, images_per_identity=5, pairs=20, pair_identities=4
            ),
        ),
        model=c.ModelConfig(
            network="tests.support.small_network:make",
            dtype="float32",
            embedding_size=32,
            bn_batch_size=8,
        ),
        head=c.HeadConfig(dtype="float32", margin=0.2, scale=16.0),
        schedule=c.ScheduleConfig(epochs=3),
        evaluation=c.EvaluationConfig(targets=("synthetic",), batch_size=24, baselines=True),
        logging=c.LoggingConfig(every_steps=1),
    )
"""


@cache
def script(name: str) -> ModuleType:
    """The module of scripts/NAME.py; its `main` takes the command line as a list."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # tyro reads its source
    spec.loader.exec_module(module)
    return module


def result(text: str) -> dict:
    """The RESULT that a command prints last."""
    last = text.strip().splitlines()[-1]
    assert last.startswith("RESULT ")
    return json.loads(last.removeprefix("RESULT "))


def run_process(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    """Run a Python command from the checkout in its own process, with its output captured.

    Args:
      command: what follows `python`.
      **options: of `subprocess.run`, where they differ from these.
    """
    ours = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": HANG}
    return subprocess.run([sys.executable, *command], **(ours | options))


def wait_until(ready: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    """Wait for a condition, as long as the process that is to bring it about runs."""
    deadline = time.monotonic() + HANG
    while not ready():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"nothing happened for {HANG} s"
        time.sleep(0.01)
