"""Trains a recipe, or resumes what its working directory holds, and exports the backbone.

python scripts/train.py RECIPE [--section.field value ...] --workdir FOLDER
"""

from arcface_jax.runtime import launch

if __name__ == "__main__":
    launch.use_huge_pages()  # restarts, and so comes before the imports that take seconds

import importlib.util
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from arcface_jax import errors
from arcface_jax.config import loading
from arcface_jax.evaluation.report import tables
from arcface_jax.runtime import launch, signals
from arcface_jax.runtime.files import reporting_disk_errors
from arcface_jax.train import train


def export(workdir: Path) -> list[Path]:
    """Writes WORKDIR/backbone.pth where torch is installed; returns it."""
    if importlib.util.find_spec("torch") is None:
        print("no backbone.pth: PyTorch is not installed (pip install 'arcface-jax[torch]')")
        return []
    from arcface_jax.convert import to_torch

    path = workdir / "backbone.pth"
    error = to_torch.export(workdir, path)
    print(f"{path}: embeddings equal those of JAX to {error:.1e} (relative)")
    return [path]


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    begin = time.perf_counter()
    with errors.reported():
        config = loading.load(argv)
        launch.start(
            config.distributed,
            deterministic=config.deterministic,
            compilation_cache=config.compilation_cache,
        )
        outcome = train(config)
        workdir = Path(config.workdir)
        files = [workdir / "metrics.jsonl", workdir / "checkpoints", *outcome.files]
        first = launch.is_first()
        if first and outcome.stopped_by is None:
            with reporting_disk_errors(workdir):
                files += export(workdir)
    by = outcome.stopped_by
    code = 0 if by is None else signals.exit_code(config.checkpoint, by)
    if not first:
        return code
    if compared := tables.before_and_after(outcome.results):
        Console(width=100).print(compared)
    result = {
        **outcome.results,
        "step": outcome.step,
        "seconds": round(time.perf_counter() - begin, 1),
        "files": [str(file) for file in files],
    }
    print("RESULT " + json.dumps(result))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
