"""Change the length of a run that has begun: `schedule.extend`."""

from pathlib import Path

import jax.numpy as jnp

from arcface_jax.config import Config, ScheduleConfig, replace
from arcface_jax.errors import CheckpointError
from arcface_jax.runtime import launch
from arcface_jax.runtime.files import reporting_disk_errors
from arcface_jax.training import checkpoint, optim

# A rate that changes by less than this share of itself does not count as a jump.
_JUMP = 0.01


def stored_schedule(config: Config) -> ScheduleConfig | None:
    """Returns the schedule of the run in the workdir, if `schedule.extend` asks for another.

    With several processes, all read it before the first one replaces it.
    """
    workdir = Path(config.workdir)
    if not config.schedule.extend or not checkpoint.holds_config(workdir):
        return None
    stored = checkpoint.read_config(workdir).schedule
    same = (stored.epochs, stored.decay_epochs) == (
        config.schedule.epochs,
        config.schedule.decay_epochs,
    )
    return None if same else stored


def extend(config: Config, stored: ScheduleConfig, *, start: int, per_epoch: int) -> list[str]:
    """Records the new schedule in config.json; environment.json keeps the one of every start.

    Args:
      config: the run with its new schedule.
      stored: the schedule until now.
      start: steps done.
      per_epoch: steps per epoch.

    Returns:
      Lines for the terminal: both schedules, and a warning if the learning rate jumps.

    Raises:
      CheckpointError: the new schedule would have changed steps that are already done, or
        config.json cannot be written.
    """
    new, workdir = config.schedule, Path(config.workdir)
    if new.epochs * per_epoch < start:
        raise CheckpointError(
            f"schedule.epochs {new.epochs} is {new.epochs * per_epoch} steps, and {workdir} has "
            f"done {start}: give at least {-(-start // per_epoch)}"
        )
    before, after = (_drops_done(s, start, per_epoch) for s in (stored, new))
    if before != after:
        raise CheckpointError(
            f"schedule.decay_epochs {new.decay_epochs} differ from the stored "
            f"{stored.decay_epochs} in the {start / per_epoch:g} epochs that {workdir} has done: "
            "change later ones only"
        )
    if launch.is_first():
        longer = replace(
            checkpoint.read_config(workdir),
            schedule__epochs=new.epochs,
            schedule__decay_epochs=new.decay_epochs,
        )
        with reporting_disk_errors(workdir, workdir / checkpoint.CONFIG):
            checkpoint.replace_config(workdir, longer)
    rates = tuple(
        float(
            optim.make_schedule(
                schedule, base_rate=config.optimizer.learning_rate, steps_per_epoch=per_epoch
            )(jnp.int32(start))
        )
        for schedule in (stored, new)
    )
    return _lines(stored, new, rates=rates, start=start, per_epoch=per_epoch)


def _drops_done(schedule: ScheduleConfig, start: int, per_epoch: int) -> list[int]:
    return [epoch for epoch in schedule.decay_epochs if epoch * per_epoch < start]


def _lines(
    stored: ScheduleConfig,
    new: ScheduleConfig,
    *,
    rates: tuple[float, ...],
    start: int,
    per_epoch: int,
) -> list[str]:
    old_text, new_text = (
        f"{s.epochs} epochs ({s.epochs * per_epoch} steps)"
        + (f", decay_epochs {s.decay_epochs}" if s.decay_epochs else "")
        for s in (stored, new)
    )
    old_rate, new_rate = rates
    lines = [
        f"{new.kind} schedule changed from {old_text} to {new_text}; learning rate at step {start}:"
        f" {new_rate:.4g} (was {old_rate:.4g})"
    ]
    if abs(new_rate - old_rate) > _JUMP * max(new_rate, old_rate):
        lines.append(
            f"warning: the learning rate jumps from {old_rate:.4g} to {new_rate:.4g}, so the loss "
            "may rise at first and the result differs from a run of this length; for that, start "
            "a new run"
        )
    return lines
