"""Diagnose a run while it trains: chance-level loss, plateaus, skipped steps, stragglers, hangs.

A step whose loss or gradient is not finite changes neither weights nor statistics (`step.py`).
Enough of them in a row end the run, with a report of the last batch; the state is still the last
good one.
"""

import dataclasses
import faulthandler
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from arcface_jax.config import Config, HeadConfig, LoggingConfig
from arcface_jax.errors import UserError
from arcface_jax.heads import margins, partial_fc
from arcface_jax.runtime import launch
from arcface_jax.runtime.files import reporting_disk_errors, write_whole
from arcface_jax.training.step import TrainState

# A loss counts as not moving when its mean changes by less than this share of itself.
_STILL = 0.002
# Distinct labels in a batch, as a share of those that a shuffled batch would have.
_FEW_LABELS = 0.5


class Watch:
    """Reads the log steps of a run, and says what is wrong once for each cause.

    Args:
      num_classes: identities.
      by_chance: loss of a network that knows nothing.
      steps: the loss has to move within so many steps.
    """

    def __init__(self, *, num_classes: int, by_chance: float, steps: int):
        self._num_classes = num_classes
        self._by_chance = by_chance
        self._steps = steps
        self._losses: deque[tuple[int, float]] = deque()
        self._skipped = 0.0
        self._said: set[str] = set()

    def labels(self, labels: np.ndarray) -> str | None:
        """About a batch's labels (b,): a batch of few identities teaches BatchNorm these alone."""
        expected = self._num_classes * -np.expm1(
            len(labels) * np.log1p(-1 / max(self._num_classes, 2))
        )
        distinct = len(np.unique(labels))
        if distinct >= _FEW_LABELS * expected or not self._first_time("labels"):
            return None
        return (
            f"warning: this batch shows {distinct} identities where a shuffled one of "
            f"{len(labels)} images would show about {expected:.0f}: the training set is dominated "
            "by a few of them, or its labels are wrong"
        )

    def skipped(self, step: int, values: Mapping[str, float]) -> str | None:
        """About steps without a finite gradient since the last log step."""
        before, self._skipped = self._skipped, values["train/skipped_steps"]
        new = int(self._skipped - before)
        if new <= 0:
            return None
        scale = values.get("train/loss_scale")
        reason = "" if scale is None else f" (float16; the loss scale is {scale:g} now)"
        return (
            f"step {step}: {new} step(s) without a finite gradient changed nothing{reason}; "
            f"{self._skipped:.0f} in all"
        )

    def loss(self, step: int, value: float) -> str | None:
        """About a loss that does not move."""
        self._losses.append((step, value))
        while self._losses[0][0] <= step - self._steps:
            self._losses.popleft()
        if step - self._losses[0][0] < 0.9 * self._steps or len(self._losses) < 4:
            return None
        values = [loss for _, loss in self._losses]
        early, late = (np.mean(half) for half in np.array_split(values, 2))
        if abs(early - late) > _STILL * abs(early) or not self._first_time("loss"):
            return None
        known = (
            f"a network that knows nothing has about {self._by_chance:.2f}: check the labels, the "
            "rate, and that the images are aligned"
            if late > 0.9 * self._by_chance
            else "it may be as low as this rate takes it"
        )
        return f"warning: the loss has been {late:.2f} for {self._steps} steps; {known}"

    def _first_time(self, cause: str) -> bool:
        new = cause not in self._said
        self._said.add(cause)
        return new


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
    if not launch.is_first():
        return path
    with reporting_disk_errors(workdir, path):
        write_whole(path, json.dumps(found, indent=1) + "\n")
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


def chance_loss(
    head: HeadConfig,
    *,
    num_classes: int,
    embedding_size: int,
    global_batch_size: int,
    num_devices: int,
) -> float:
    """The expected loss at random embeddings and centers.

    Cosines are then normal with variance 1 / D, so that the others' sum of exponentials is n
    exp(s^2 / (2 D)) for n classes in the softmax, and the loss
    -s psi(0) + ln(n) + s^2 / (2 D) where psi is the margin. This is the integral itself, which
    holds for margins that change the others, and for the nearest of several sub-centers, too.
    Lengths of embeddings are those that the backbones' last BatchNorm gives, sqrt(D).
    """
    margin = margins.make(head)
    state = {name: jnp.float32(value) for name, value in margin.initial_state.items()}
    deviations = np.linspace(-8, 8, 4001)
    density = np.exp(-(deviations**2) / 2)
    below = np.cumsum(density) / density.sum()
    density = density * below ** (head.subcenters - 1)  # of the largest of several
    density /= density.sum()
    cosine = np.clip(deviations / math.sqrt(embedding_size), -1, 1)

    target = jnp.full((1,), np.sum(density * cosine), jnp.float32)
    norm = jnp.full((1,), math.sqrt(embedding_size), jnp.float32)
    target_logit = head.scale * float(margin.target(target, norm, state)[0])
    others = cosine
    if margin.negatives is not None:
        given = margin.negatives(jnp.asarray(cosine, jnp.float32)[None], target[:, None], state)
        others = np.asarray(given[0], np.float64)
    count = num_classes
    if head.sample_rate < 1:
        drawn = int(partial_fc.sample_sizes(num_classes, num_devices, head.sample_rate).sum())
        count = max(drawn, min(global_batch_size, num_classes))
    largest = head.scale * others.max()
    sum_of_others = (count - 1) * np.sum(density * np.exp(head.scale * others - largest))
    log_others = largest + math.log(sum_of_others) if count > 1 else -math.inf
    extra = 0.0 if margin.extra_loss is None else float(margin.extra_loss(norm)[0])
    return float(np.logaddexp(log_others, target_logit)) - target_logit + extra


def arm(logging: LoggingConfig) -> None:
    """A step begins: after `logging.watchdog_seconds` without its end all stacks go to stderr.

    The standard library's own thread waits and writes; it needs no lock of Python's, so that it
    works where a call into the devices or the network holds it.
    """
    if logging.watchdog_seconds:
        faulthandler.dump_traceback_later(
            logging.watchdog_seconds, exit=logging.watchdog_abort, file=sys.__stderr__ or 2
        )


def disarm() -> None:
    """What follows may take long: an evaluation, a save, the end."""
    faulthandler.cancel_dump_traceback_later()


# A host that takes so much longer than the median is called slow, if it costs this many ms a step.
_SLOW_RATIO, _SLOW_MS = 1.5, 5.0


def slowest_host(own_ms: float) -> tuple[dict[str, float], str | None]:
    """Compares the hosts; all of them have to call this at the same step.

    Args:
      own_ms: of this host, a step: the time that it did not spend waiting for its devices. A step
        takes every host equally long, for they meet in its collectives; in the slowest the others'
        devices wait.

    Returns:
      `perf/slowest_host_ms` and `perf/slowest_host`, and words where one host holds up the rest.
    """
    if jax.process_count() == 1:
        return {"perf/slowest_host_ms": own_ms, "perf/slowest_host": 0}, None
    times = multihost_utils.process_allgather(np.float32(own_ms)).reshape(-1)
    return compare_hosts(np.asarray(times))


def compare_hosts(times: np.ndarray) -> tuple[dict[str, float], str | None]:
    """What `slowest_host` returns, of the times (hosts,) of all, in milliseconds."""
    slowest = int(times.argmax())
    worst, others = float(times[slowest]), float(np.median(np.delete(times, slowest)))
    values = {"perf/slowest_host_ms": worst, "perf/slowest_host": slowest}
    if worst < max(_SLOW_RATIO * others, others + _SLOW_MS):
        return values, None
    return values, (
        f"host {slowest} of {len(times)} holds the others up: it is busy for {worst:.0f} ms a step "
        f"outside the devices, the others for {others:.0f}; look at its disk, its processor, and "
        "its data.workers"
    )
