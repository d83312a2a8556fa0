"""Diagnose a run while it trains: chance-level loss, health warnings, failures, stragglers, hangs.

A step whose loss or gradient is not finite changes neither weights nor statistics (`step.py`).
Enough of them in a row end the run, with a report of the last batch; the state is still the last
good one.
"""

import faulthandler
import json
import math
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from arcface_jax.config import DataConfig, HeadConfig, LoggingConfig, OptimizerConfig
from arcface_jax.data import pipeline
from arcface_jax.errors import UserError
from arcface_jax.evaluation.verification import Verification
from arcface_jax.heads import margins, partial_fc
from arcface_jax.runtime import launch
from arcface_jax.runtime.files import reporting_disk_errors, write_atomic

# A loss has plateaued when its mean changes by less than this share of itself.
_PLATEAU = 0.002
# Too few distinct labels: below this share of the number expected in a shuffled batch.
_FEW_LABELS = 0.5
# Input-bound: more than this share of the step time is spent waiting for data.
_MAX_WAIT_SHARE = 0.2
# Mean cosine above which all faces look alike to the network.
_ONE_POINT = 0.9
# Effective rank below which the embeddings use few directions.
_FEW_DIRECTIONS = 3.0
# Mean cosine between training and evaluation mode below which they act as different networks.
_OTHER_NETWORK = 0.5
# A loss below this share of the chance-level loss: the network has learned something.
_FALLEN = 0.9
# A host is a straggler if it needs this many times the median, and this many ms/step more.
_STRAGGLER_RATIO, _STRAGGLER_MS = 1.5, 5.0


def chance_loss(
    head: HeadConfig,
    *,
    num_classes: int,
    embedding_size: int,
    global_batch_size: int,
    num_devices: int,
) -> float:
    """Returns the expected loss at initialization, with random embeddings and random centers.

    Cosines are then normal with variance 1 / D. With n classes in the softmax the negatives' sum of
    exponentials is n exp(s^2 / (2 D)), and the loss is -s psi(0) + ln(n) + s^2 / (2 D), where psi
    is the margin function. The integral is evaluated numerically, so it also holds for margins that
    transform the negatives and for the nearest of several sub-centers. Embeddings have the norm
    that the backbones' last BatchNorm gives them, sqrt(D).
    """
    margin = margins.make(head)
    state = {name: jnp.float32(value) for name, value in margin.initial_state.items()}
    deviations = np.linspace(-8, 8, 4001)
    density = np.exp(-(deviations**2) / 2)
    below = np.cumsum(density) / density.sum()
    density = density * below ** (head.subcenters - 1)  # density of the largest sub-center
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


class HealthMonitor:
    """Training-health warnings (label distribution, skipped steps, plateau, slow input).

    Each method returns a warning, or None; each cause but skipped steps is reported once.

    Args:
      num_classes: identities in the training set.
      chance_loss: expected loss at initialization.
      plateau_steps: warn when the loss has not changed for this many steps.
      skipped: non-finite steps before this start of the run.
    """

    def __init__(
        self, *, num_classes: int, chance_loss: float, plateau_steps: int, skipped: int = 0
    ):
        self._num_classes = num_classes
        self._chance_loss = chance_loss
        self._plateau_steps = plateau_steps
        self._losses: deque[tuple[int, float]] = deque()
        self._skipped = float(skipped)
        self._reported: set[str] = set()

    def few_labels(self, labels: np.ndarray) -> str | None:
        """Warns if a batch's (b,) labels have few identities: BatchNorm would learn only these."""
        expected = self._num_classes * -np.expm1(
            len(labels) * np.log1p(-1 / max(self._num_classes, 2))
        )
        distinct = len(np.unique(labels))
        if distinct >= _FEW_LABELS * expected or not self._first_time("labels"):
            return None
        return (
            f"warning: only {distinct} distinct identities in a batch of {len(labels)} (expected "
            f"~{expected:.0f} if shuffled): a few identities dominate the training set, or its "
            "labels are wrong"
        )

    def empty_images(self, images: np.ndarray) -> str | None:
        """Warns if a batch's (b, h, w, 3) images are all of one color, or all the same."""
        pixels = images.reshape(len(images), -1, images.shape[-1])
        if (pixels == pixels[:, :1]).all():
            found = "black" if not images.any() else "of a single color"
        elif len(images) > 1 and (images == images[:1]).all():
            found = "identical"
        else:
            return None
        return (
            f"warning: all {len(images)} images of the first batch are {found}: nothing can be "
            "learned from them. Check the files of --data.path (`arcface-jax data inspect`)"
        )

    def skipped_steps(self, step: int, values: Mapping[str, float]) -> str | None:
        """Reports the non-finite steps since the last log step."""
        before, self._skipped = self._skipped, values["train/skipped_steps"]
        new = int(self._skipped - before)
        if new <= 0:
            return None
        scale = values.get("train/loss_scale")
        reason = "" if scale is None else f" (float16 overflow; loss scale now {scale:g})"
        return f"step {step}: skipped {new} non-finite step(s){reason}; {self._skipped:.0f} total"

    def plateau(self, step: int, loss: float) -> str | None:
        """Warns if the loss has stopped moving."""
        if not math.isfinite(loss):  # of a skipped step
            return None
        self._losses.append((step, loss))
        while self._losses[0][0] <= step - self._plateau_steps:
            self._losses.popleft()
        if step - self._losses[0][0] < 0.9 * self._plateau_steps or len(self._losses) < 4:
            return None
        values = [value for _, value in self._losses]
        early, late = (np.mean(half) for half in np.array_split(values, 2))
        if abs(early - late) > _PLATEAU * abs(early) or not self._first_time("loss"):
            return None
        meaning = (
            f"chance level is {self._chance_loss:.2f}: check the labels, the learning rate, and "
            "that images are aligned"
            if late > 0.9 * self._chance_loss
            else "it may have converged for this learning rate"
        )
        return f"warning: loss plateaued at {late:.2f} for {self._plateau_steps} steps; {meaning}"

    def slow_input(self, values: Mapping[str, float], data: DataConfig) -> str | None:
        """Warns if the devices wait for images."""
        share = values.get("perf/data_wait_share", 0.0)
        if share <= _MAX_WAIT_SHARE or not self._first_time("input"):
            return None
        return (
            f"input-bound: {share:.0%} of step time spent waiting for data "
            f"({values['perf/data_wait_ms']:.0f} ms/step). Try more --data.workers (now "
            f"{data.workers}) or --data.threads (now {pipeline.num_threads(data)}), fewer "
            "augmentations, or a faster disk; arcface-jax data bench shows the slowest stage"
        )

    def _first_time(self, cause: str) -> bool:
        new = cause not in self._reported
        self._reported.add(cause)
        return new


def explain_chance_accuracy(result: Verification, *, loss: float, chance_loss: float) -> str | None:
    """Explains why verification stays at chance level although the training loss has fallen.

    Args:
      result: accuracy on one set, and the spread of its embeddings.
      loss: current training loss.
      chance_loss: expected loss at initialization.

    Returns:
      None if the accuracy is above chance level, or if the loss has not fallen yet.
    """
    share = float(np.mean(result.same))
    chance = max(share, 1 - share)
    if result.interval[0] > chance or not loss < _FALLEN * chance_loss:
        return None
    return (
        f"{result.name}: accuracy {result.accuracy:.3f} is no better than chance ({chance:.3f}), "
        f"although the training loss is {loss:.1f} (chance level: {chance_loss:.1f}). "
        f"{_cause(result)}"
    )


def _cause(result: Verification) -> str:
    if result.mode_cosine is not None and not result.mode_cosine > _OTHER_NETWORK:
        return (
            "Training mode and evaluation mode disagree: the mean cosine between their embeddings "
            f"of the same image is {result.mode_cosine:.2f}. BatchNorm's running statistics do not "
            "match the batches. Early in a run they lag, so wait a few hundred steps; later, check "
            "for batches of one identity or one source (shuffle the training set), or for a "
            "--model.bn-batch-size that is too small"
        )
    if result.mean_cosine > _ONE_POINT:
        return (
            "The embeddings have collapsed to one point: the mean cosine of two images is "
            f"{result.mean_cosine:.3f}. Lower --optimizer.learning-rate, lengthen "
            "--schedule.warmup-epochs, and check that images are aligned"
        )
    if result.effective_rank < _FEW_DIRECTIONS:
        return (
            f"The embeddings use only {result.effective_rank:.1f} directions: lower "
            "--optimizer.learning-rate, and check that labels are correct and identities are many"
        )
    return (
        "The embeddings have not collapsed, so this set differs from the training set: check that "
        "both are aligned the same way, that both are RGB, and that the pairs are labeled "
        "correctly; or the network is overfitting and needs more identities"
    )


def write_failure(
    workdir: Path,
    step: int,
    *,
    metrics: Mapping[str, float],
    images: list[str],
    gradient_norms: Mapping[str, float],
    scale: float,
) -> Path:
    """Writes WORKDIR/failure_STEP.json, the starting point to find out why a run failed.

    Args:
      workdir: the run's working directory.
      step: the failed step.
      metrics: metrics of that step.
      images: file and position of each image in the batch.
      gradient_norms: norm of each array's gradient, by name.
      scale: the head's scale; the largest logit is this times the largest cosine.

    Returns:
      The path; only the first process writes it.
    """
    report: dict[str, Any] = {
        "step": step,
        "largest_logit": _json_number(scale * metrics.get("train/largest_cosine", 0.0)),
        "metrics": {name: _json_number(value) for name, value in metrics.items()},
        "gradient_norms": {name: _json_number(value) for name, value in gradient_norms.items()},
        "not_finite": [name for name, x in gradient_norms.items() if not math.isfinite(x)],
        "images": images,
    }
    path = workdir / f"failure_{step}.json"
    if not launch.is_first():
        return path
    with reporting_disk_errors(workdir, path):
        write_atomic(path, json.dumps(report, indent=1) + "\n")
    return path


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN


def failure_error(
    step: int,
    metrics: Mapping[str, float],
    report: Path,
    *,
    optimizer: OptimizerConfig,
    dtype: str,
) -> UserError:
    """Returns the error that ends a run after too many non-finite steps in a row.

    Args:
      step: the failed step.
      metrics: metrics of that step, with `train/loss` and `train/skipped_in_row`.
      report: the file that `write_failure` wrote.
      optimizer: the recipe's section.
      dtype: the network's computing type.
    """
    loss, in_row = metrics["train/loss"], metrics["train/skipped_in_row"]
    limit = optimizer.stop_after_skipped
    reason = f"optimizer.stop_after_skipped {limit}" if in_row >= limit else "all steps of the run"
    first = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
    return UserError(
        f"step {step}: {first}, for {in_row:.0f} steps in a row ({reason}). These steps were "
        f"skipped; the checkpoint saved now is still valid. {report} has the batch, the largest "
        f"logit and each layer's gradient norm. {_failure_fix(loss, optimizer, dtype)}"
    )


def untrained_error(skipped: int, *, optimizer: OptimizerConfig, dtype: str) -> UserError:
    """Returns the error of a complete run in which all steps were skipped.

    Args:
      skipped: steps without a finite gradient.
      optimizer: the recipe's section.
      dtype: the network's computing type.
    """
    return UserError(
        f"all {skipped} steps were skipped because their gradient was not finite, so the weights "
        f"are the initial ones and nothing is exported. {_failure_fix(0.0, optimizer, dtype)}"
    )


def _failure_fix(loss: float, optimizer: OptimizerConfig, dtype: str) -> str:
    if dtype == "float16" and not math.isfinite(loss):
        return "float16 overflows above 65504: use --model.dtype bfloat16, which does not"
    if dtype == "float16":
        return (
            "float16 gradients overflow above 65504: start a new run (new --workdir) with a lower "
            f"--optimizer.loss-scale (now {optimizer.loss_scale:g}) or --model.dtype bfloat16"
        )
    return (
        "Start a new run (new --workdir) with a lower learning rate (--optimizer.learning-rate "
        f"{optimizer.learning_rate / 10:g}), a warm-up (--schedule.warmup-epochs 1) or "
        "--model.dtype float32"
    )


def slowest_host(own_ms: float) -> tuple[dict[str, float], str | None]:
    """Finds the slowest host. A collective operation: all hosts call it at the same step.

    Args:
      own_ms: this host's time per step, in milliseconds, minus the time spent waiting for its
        devices. A step takes equally long on all hosts, because collectives synchronize them: the
        devices of the other hosts wait for the slowest one.

    Returns:
      `perf/slowest_host_ms` and `perf/slowest_host`, and a warning if that host is a straggler.
    """
    if jax.process_count() == 1:
        return {"perf/slowest_host_ms": own_ms, "perf/slowest_host": 0}, None
    times = multihost_utils.process_allgather(np.float32(own_ms)).reshape(-1)
    return compare_hosts(np.asarray(times))


def compare_hosts(times: np.ndarray) -> tuple[dict[str, float], str | None]:
    """Finds the slowest host, as `slowest_host`, from the (hosts,) times in milliseconds."""
    slowest = int(times.argmax())
    worst, others = float(times[slowest]), float(np.median(np.delete(times, slowest)))
    values = {"perf/slowest_host_ms": worst, "perf/slowest_host": slowest}
    if worst < max(_STRAGGLER_RATIO * others, others + _STRAGGLER_MS):
        return values, None
    return values, (
        f"host {slowest}/{len(times)} is a straggler: {worst:.0f} ms/step of host time vs. "
        f"{others:.0f} ms elsewhere; check its disk, its CPU and its data.workers"
    )


def arm_watchdog(logging: LoggingConfig) -> None:
    """Dumps all stacks to stderr unless the step ends within `logging.watchdog_seconds`.

    A thread of the standard library does this without the GIL, so it works even while a call into
    the devices or the network holds the GIL.
    """
    if logging.watchdog_seconds:
        faulthandler.dump_traceback_later(
            logging.watchdog_seconds, exit=logging.watchdog_abort, file=sys.__stderr__ or 2
        )


def disarm_watchdog() -> None:
    """Stops the countdown, because evaluating and saving may take long."""
    faulthandler.cancel_dump_traceback_later()
