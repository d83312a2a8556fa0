"""Train a recipe, or resume the run in its working directory, and export the backbone.

    arcface-jax train ms1mv3_r50 --data.path FOLDER --workdir runs/ms1mv3_r50
    arcface-jax train my_recipe.py --data.no-flip --workdir runs/mine

RECIPE is a name of `arcface-jax recipes` or a file.
"""

import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from arcface_jax import errors
from arcface_jax.commands import Result, command
from arcface_jax.config import Config, loading, replace

_DEMO = """Train a small network on synthetic faces: the recipe `demo`, without any download.

    arcface-jax demo
    arcface-jax demo --schedule.epochs 2 --workdir runs/longer
"""
_TUNABLES = "GLIBC_TUNABLES"


@command
def main(
    words: Sequence[str], *, prog: str = "arcface-jax train", own_process: bool = False
) -> Result:
    """Trains the recipe that the first word names.

    Args:
      words: the recipe and its options.
      prog: the program's name in usage.
      own_process: the process runs only this command and may be restarted.
    """
    config = loading.load(words, prog=prog, description=__doc__ or "")
    return _train(config, own_process=own_process)


@command
def demo(
    words: Sequence[str], *, prog: str = "arcface-jax demo", own_process: bool = False
) -> Result:
    """Trains the recipe `demo`, by default in runs/demo; arguments as in `main`."""
    recipe = replace(loading.read_recipe("demo"), workdir="runs/demo")
    config = loading.override(recipe, words, prog=prog, description=_DEMO)
    return _train(config, own_process=own_process)


def _train(config: Config, *, own_process: bool) -> Result:
    from arcface_jax.runtime import files, signals

    try:
        if own_process:
            _use_huge_pages()  # restarts the process, so it comes before slow imports
        return _train_here(config)
    except signals.StoppedAtStart as stopped:
        print(
            f"stopped by {stopped} before the first step; rerun the same command; "
            f"{files.resume_point(Path(config.workdir))}",
            file=sys.stderr,
        )
        return Result(code=signals.exit_code(config.checkpoint, stopped.by))


def _train_here(config: Config) -> Result:
    """Trains in this process, and exports the backbone."""
    from arcface_jax.commands import console
    from arcface_jax.evaluation.report import tables
    from arcface_jax.runtime import launch, signals
    from arcface_jax.runtime.files import reporting_disk_errors
    from arcface_jax.train import train

    signals.raise_if_remembered()
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
            files += _export(workdir, config.model.network)
    stopped_by = outcome.stopped_by or signals.remembered()
    code = 0 if stopped_by is None else signals.exit_code(config.checkpoint, stopped_by)
    if first and (compared := tables.before_and_after(outcome.results)):
        console().print(compared)
    values = {**outcome.results, "step": outcome.step, **outcome.data}
    if outcome.evaluated_at is not None:
        values["eval/step"] = outcome.evaluated_at
    return Result(values, files, code=code, reported=first)


def _export(workdir: Path, network: str) -> list[Path]:
    """Writes WORKDIR/backbone.pth if torch is installed and has the network; returns its path."""
    from arcface_jax.runtime import signals

    if stopped := signals.remembered():
        print(f"no backbone.pth: stopped by {stopped.name}; rerun the same command to write it")
        return []
    if importlib.util.find_spec("torch") is None:
        print(f"no backbone.pth: PyTorch is not installed; {errors.install('torch')}")
        return []
    from arcface_jax.convert import to_torch, twins

    if twins.find(network) is None:
        print(f"no backbone.pth: {twins.missing(network)}")
        return []
    path = workdir / "backbone.pth"
    error = to_torch.export(workdir, path)
    print(f"{path}: embeddings equal JAX's to {error:.1e} (relative)")
    return [path]


def _use_huge_pages() -> None:
    """Restarts this program once, in the same process, with huge pages.

    A training step on the CPU allocates and frees more than a gigabyte of memory, which is slow in
    pages of 4 KiB (docs/benchmarks_appendix.md). Does nothing if the C library is not glibc, or if
    the user has set its options.
    """
    if platform.libc_ver()[0] == "glibc" and _TUNABLES not in os.environ:
        from arcface_jax.runtime import signals

        os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
        signals.hold_back()
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
