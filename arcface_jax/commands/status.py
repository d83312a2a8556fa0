"""Print the status of a run: the process in its workdir, step, last save, metrics, disk.

    arcface-jax status runs/ms1mv3_r50

Only reads the workdir, while the run trains or after it ended.
"""

import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from arcface_jax import errors
from arcface_jax.commands import Result, command
from arcface_jax.config import command_line, loading


@dataclass(frozen=True)
class Arguments:
    """Options of `status`."""

    workdir: Annotated[Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Working directory of a run."""


@command
def main(words: Sequence[str], *, prog: str = "arcface-jax status") -> Result:
    """Prints a few lines about a run."""
    arguments = command_line.parse(Arguments, words, prog=prog, description=__doc__ or "")
    found = read(arguments.workdir)
    print(*_lines(found), sep="\n")
    return Result(found)


def read(workdir: Path) -> dict[str, Any]:
    """Reads the status of a run.

    Returns:
      `holder` (alive, stale or none) with `host`, `pid` and `since`; `step` of `total_steps`;
      `saved_step` and `saved_seconds_ago`; the last values of train/, perf/ and eval/;
      `eval_step`; `checkpoint_bytes` and `free_bytes`. None if unknown.

    Raises:
      CheckpointError: the folder holds no run.
      ConfigError: its configuration cannot be read.
    """
    from arcface_jax.runtime import locks
    from arcface_jax.runtime.files import complete_steps

    held, path = locks.find(workdir), workdir / "config.json"
    if held is None and not path.is_file():
        raise errors.CheckpointError(
            f"{workdir} holds no config.json: name the --workdir of a training run"
        )
    holder, alive = held or (None, False)
    trained, evaluated = _last_lines(workdir / "metrics.jsonl")
    saved = max(complete_steps(workdir), default=None)
    step = max(trained.get("step", 0), saved or 0)
    return {
        "holder": "none" if holder is None else "alive" if alive else "stale",
        "host": holder and holder.host,
        "pid": holder and holder.pid,
        "since": holder and holder.since,
        "step": step,
        "total_steps": _total_steps(path, trained),
        "saved_step": saved,
        "saved_seconds_ago": _age(workdir / "checkpoints" / str(saved)),
        "eval_step": evaluated.get("step"),
        **{name: trained.get(name) for name in ("train/loss", "perf/images_per_sec")},
        **{name: value for name, value in evaluated.items() if name.startswith("eval/")},
        "checkpoint_bytes": _size(workdir / "checkpoints"),
        "free_bytes": shutil.disk_usage(workdir).free,
    }


def _last_lines(metrics: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Returns the last lines of a training step and of an evaluation; empty if there are none."""
    trained: Mapping[str, Any] = {}
    evaluated: Mapping[str, Any] = {}
    for line in _from_the_end(metrics):
        if not trained and "train/loss" in line:
            trained = line
        if not evaluated and any(name.startswith("eval/") for name in line):
            evaluated = line
        if trained and evaluated:
            break
    return trained, evaluated


def _from_the_end(metrics: Path) -> Iterable[Mapping[str, Any]]:
    """Yields the readable lines in reverse order; the last one may still be being written."""
    from arcface_jax.runtime import foreign

    try:
        lines = metrics.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in reversed(lines):
        try:
            found = foreign.parse_json(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _total_steps(config: Path, trained: Mapping[str, Any]) -> int | None:
    """Returns the steps of the whole run; None before its first log line."""
    if not trained.get("epoch") or not config.is_file():
        return None
    epochs = loading.from_json(config.read_text(), source=str(config)).schedule.epochs
    return round(trained["step"] / trained["epoch"]) * epochs


def _age(path: Path) -> float | None:
    try:
        return round(time.time() - path.stat().st_mtime, 1)
    except OSError:  # there is none, or its run removed it
        return None


def _size(folder: Path) -> int:
    """Returns the bytes of all files in a folder whose files may vanish."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total


def _lines(found: Mapping[str, Any]) -> list[str]:
    """Formats the status in a few lines."""
    who = f"process {found['pid']} on {found['host']}, since {found['since']}"
    holder = {
        "alive": f"training: {who}",
        "stale": f"not training: {who}, ended without releasing the workdir; rerun to resume",
        "none": "not training",
    }
    total = "" if found["total_steps"] is None else f" of {found['total_steps']}"
    lines = [holder[found["holder"]], f"step {found['step']}{total}"]
    if found["train/loss"] is not None:
        speed = found["perf/images_per_sec"]
        images = "" if speed is None else f"  {speed:.0f} images/s"
        lines.append(f"loss {found['train/loss']:.4f}{images}")
    if found["saved_step"] is None:
        lines.append("no checkpoint yet")
    else:
        age = found["saved_seconds_ago"]
        ago = "" if age is None else f", {_duration(age)} ago"
        lines.append(f"last checkpoint: step {found['saved_step']}{ago}")
    if found["eval_step"] is not None:
        values = [f"{n} {v:.4f}" for n, v in found.items() if n.startswith("eval/") and _plain(v)]
        lines.append(f"evaluated at step {found['eval_step']}: {'  '.join(values)}")
    used, free = (found[name] / 2**30 for name in ("checkpoint_bytes", "free_bytes"))
    return [*lines, f"checkpoints {used:.2f} GiB, free on that disk {free:.1f} GiB"]


def _plain(value: object) -> bool:
    return isinstance(value, int | float)


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"
