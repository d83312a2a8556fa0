"""When training cannot go on: what the last batch was, written down, and what to change.

A step whose loss or gradient is not finite changes neither weights nor statistics (step.py). Enough
of them in a row end the run; the state is still the last good one.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from arcface_jax import distributed, storage
from arcface_jax.config import Config
from arcface_jax.errors import UserError
from arcface_jax.step import TrainState


def write(
    workdir: Path,
    step: int,
    *,
    metrics: Mapping[str, float],
    images: list[str],
    gradient_norms: Mapping[str, float],
    scale: float,
) -> Path:
    """WORKDIR/failure_STEP.json: all that a search for the cause begins with.

    Args:
      workdir: of the run.
      step: the last that was tried.
      metrics: of that step.
      images: which images its batch holds: their files and places in them.
      gradient_norms: by name of the backbone's array.
      scale: of the head; the largest logit is this times the largest cosine.
    """
    found: dict[str, Any] = {
        "step": step,
        "largest_logit": _number(scale * metrics["train/largest_cosine"]),
        "metrics": {name: _number(value) for name, value in metrics.items()},
        "gradient_norms": {name: _number(value) for name, value in gradient_norms.items()},
        "not_finite": [name for name, x in gradient_norms.items() if not math.isfinite(x)],
        "images": images,
    }
    path = workdir / f"failure_{step}.json"
    if not distributed.is_first():
        return path
    with storage.in_words(workdir, path):
        storage.write_whole(path, json.dumps(found, indent=1) + "\n")
    return path


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN


def error(config: Config, step: int, *, in_row: int, loss: float, report: Path) -> UserError:
    """What the run ends with."""
    first = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    return UserError(
        f"step {step}: {first}, for {in_row} steps in a row (optimizer.stop_after_skipped "
        f"{config.optimizer.stop_after_skipped}). They changed nothing, and the checkpoint of this "
        f"step is as good as the last. {report} has the batch, the largest logit and each layer's "
        f"gradient. {_hint(config, loss)}"
    )


def _hint(config: Config, loss: float) -> str:
    if config.model.dtype == "float16" and not math.isfinite(loss):
        return "float16 overflows above 65504: use --model.dtype bfloat16, which does not"
    lower = config.optimizer.learning_rate / 10
    return (
        f"Begin anew in another --workdir with a lower rate (--optimizer.learning-rate {lower:g}), "
        "a warm-up (--schedule.warmup-epochs 1) or --model.dtype float32"
    )


def report(
    config: Config,
    images: list[str],
    state: TrainState,
    gradient_norms: Callable,
    batch: dict[str, jax.Array],
    values: dict[str, float],
) -> UserError:
    """The error of a run whose steps no longer have a finite gradient, and its report."""
    done = int(state.step)
    norms = gradient_norms(dataclasses.replace(state, step=state.step - 1), batch)
    path = write(
        Path(config.workdir),
        done,
        metrics=values,
        images=images,
        gradient_norms={name: float(norm) for name, norm in norms.items()},
        scale=config.head.scale,
    )
    return error(
        config,
        done,
        in_row=int(values["train/skipped_in_row"]),
        loss=values["train/loss"],
        report=path,
    )
