"""Checkpoints with Orbax: saved in the background, restored on any number of devices.

A checkpoint holds three items: `backbone` (parameters and BatchNorm statistics, all that inference
needs), `training` (the rest of the state) and `dataset` (what the centers' rows stand for); and,
if the recipe asks for running means of the weights, `ema`, which inference then uses. A checkpoint
of imported weights has no `training`: only `backbone`, or also `centers` and `dataset`.
"""

import math
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from arcface_jax.config import CheckpointConfig, Config, loading
from arcface_jax.errors import CheckpointError
from arcface_jax.models import registry
from arcface_jax.runtime import checksums, launch
from arcface_jax.runtime.files import (
    complete_steps,
    quiet_orbax,
    remove_unfinished,
    reporting_disk_errors,
    write_atomic,
)
from arcface_jax.training import checkpoint_forms, manifest
from arcface_jax.training.step import TrainState

CONFIG = "config.json"
Dataset = dict[str, int]
"""num_classes and num_images of the training set."""

EXTENDABLE = ("schedule.epochs:", "schedule.decay_epochs:")
"""How the differences begin that `schedule.extend` allows."""

BACKBONE_FIELDS = ("params", "batch_stats")


def open_workdir(config: Config) -> ocp.CheckpointManager:
    """Create WORKDIR with its config.json, or check that the run in it can be resumed.

    Raises:
      CheckpointError: the folder holds another run (every difference is named), or cannot be
        written. Nothing in it has changed.
    """
    with launch.first_process_first():
        _prepare(config)
        workdir = Path(config.workdir)
        folder = folder_of(workdir)
        if launch.is_first():
            with reporting_disk_errors(workdir, workdir):
                for message in checksums.set_aside_damaged(folder):
                    print(f"warning: {message}", file=sys.stderr)
                remove_unfinished(workdir)
            manifest.write_environment(config)
    quiet_orbax()
    options = _manager_options(config.checkpoint)
    if launch.is_first():
        note = partial(checksums.note, folder)
        options.async_options = ocp.options.AsyncOptions(post_finalization_callback=note)
    with reporting_disk_errors(workdir, folder):
        return ocp.CheckpointManager(folder, options=options)


def _prepare(config: Config) -> None:
    workdir = Path(config.workdir)
    if (workdir / CONFIG).exists():
        _refuse_imported_weights(workdir)
        different = loading.differences(read_config(workdir), config)
        if config.schedule.extend:  # `extension` checks these once it is known how far the run is
            different = [line for line in different if not line.startswith(EXTENDABLE)]
        if different:
            raise _not_resumable(workdir, different)
    elif workdir.is_dir() and any(workdir.iterdir()):
        raise CheckpointError(
            f"--workdir {workdir} is not empty and holds no {CONFIG}: use a new or empty folder, "
            "or the workdir of a run to resume"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not (workdir / CONFIG).exists():
            write_atomic(workdir / CONFIG, loading.to_json(config))
    except OSError as error:
        raise CheckpointError(
            f"cannot write to --workdir {workdir}: {error.strerror}. Free space, fix permissions, "
            "or choose another --workdir"
        ) from error


def _manager_options(config: CheckpointConfig) -> ocp.CheckpointManagerOptions:
    """Keep the newest checkpoints, and with `best_metric` the best ones; of equals the later."""
    name = config.best_metric
    if not name:
        return ocp.CheckpointManagerOptions(max_to_keep=config.keep)

    def rank(metrics: Mapping[str, float]) -> float:
        return rank_of(metrics, name)

    newest = ocp.checkpoint_managers.LatestN(n=config.keep)
    best = ocp.checkpoint_managers.BestN(
        get_metric_fn=rank, n=config.keep_best, keep_checkpoints_without_metrics=False
    )
    either = ocp.checkpoint_managers.AnyPreservationPolicy([newest, best])
    return ocp.CheckpointManagerOptions(best_fn=rank, preservation_policy=either)


def rank_of(metrics: Mapping[str, float], name: str) -> float:
    """Rank of a checkpoint: higher is better; -inf if the metric was not measured."""
    value = metrics.get(name, math.nan)
    if math.isnan(value):
        return -math.inf
    return -value if name.endswith("/eer") else value


def read_config(workdir: Path) -> Config:
    """The configuration of a stored run.

    Raises:
      CheckpointError: the folder holds none.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{workdir} holds no {CONFIG}: name the --workdir of a training run")
    return loading.from_json(path.read_text(), source=str(path))


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    dataset: Dataset,
    score: dict[str, float] | None = None,
) -> None:
    """Start saving in the background; the next step may donate the state at once.

    Does nothing if this step is already saved.

    Args:
      manager: of the workdir.
      state: to be saved.
      dataset: the training set.
      score: {checkpoint.best_metric: its value}, if it was measured for this state.

    Raises:
      CheckpointError: this checkpoint or the previous one cannot be written.
    """
    number = int(state.step)
    if number in manager.all_steps():
        return
    items: dict[str, Any] = {
        name: ocp.args.PyTreeSave(item) for name, item in _split(state).items()
    }
    items["dataset"] = ocp.args.JsonSave(dataset)
    with _reporting(manager):
        manager.save(number, args=ocp.args.Composite(**items), metrics=score)


def check(manager: ocp.CheckpointManager) -> None:
    """Check whether a background save has failed, without waiting.

    Orbax itself reports it in the next save, which may be hours later.

    Raises:
      CheckpointError: it has failed.
    """
    # A collective operation with several processes: they would have to call it at the same time.
    if jax.process_count() == 1 and not manager.is_saving_in_progress():
        with _reporting(manager):
            manager.wait_until_finished()


def close(manager: ocp.CheckpointManager) -> None:
    """Wait for a background save to finish.

    Raises:
      CheckpointError: it has failed.
    """
    with _reporting(manager):
        manager.close()


def _reporting(manager: ocp.CheckpointManager) -> AbstractContextManager[None]:
    folder = Path(manager.directory)
    return reporting_disk_errors(folder.parent, folder)


def restore(
    manager: ocp.CheckpointManager, fresh: TrainState, dataset: Dataset
) -> TrainState | None:
    """The newest state, placed as `fresh` on however many devices.

    Args:
      manager: of the workdir.
      fresh: a state of the run's shapes, placed on the devices as the restored one shall be; its
        arrays may be abstract.
      dataset: the training set, which must be the stored one.

    Returns:
      The state, or None where nothing was saved yet.

    Raises:
      CheckpointError: the checkpoint is of another training set.
    """
    number = manager.latest_step()
    if number is None:
        return None
    stored = manager.restore(number, args=ocp.args.Composite(dataset=ocp.args.JsonRestore()))[
        "dataset"
    ]
    different = [
        f"{name}: the stored run has {stored[name]}, the training set here has {dataset[name]}"
        for name in dataset
        if stored[name] != dataset[name]
    ]
    if different:
        raise _not_resumable(Path(manager.directory).parent, different)
    # The centers are stored with as many rows of padding as the devices wanted that wrote them:
    # Orbax pads or cuts them to what is wanted here. The classes' rows are all there, for their
    # number is the stored one.
    items = _split(fresh)
    backbone, form = items["backbone"], checkpoint_forms.stored(manager, number)
    args = {
        name: restore_args(
            checkpoint_forms.as_stored(item, backbone, form), strict_shapes=name != "training"
        )
        for name, item in items.items()
    }
    restored = dict(manager.restore(number, args=ocp.args.Composite(**args)))
    ema = restored.get("ema", {})
    state = {**restored["backbone"], **restored["training"], "ema": ema}
    return TrainState(**checkpoint_forms.as_wanted(state, form, backbone))


def save_weights(
    config: Config,
    params: registry.Arrays,
    batch_stats: registry.Arrays,
    *,
    centers: np.ndarray | None = None,
) -> None:
    """Write a WORKDIR with weights only: it can be read like any other, but not resumed.

    Args:
      config: names the workdir, the network and the embedding size; the rest has no meaning for
        imported weights.
      params: of the backbone.
      batch_stats: its BatchNorm statistics.
      centers: (C, D) float32 class centers, if known.

    Raises:
      CheckpointError: the folder is not empty, or cannot be written.
    """
    workdir = Path(config.workdir)
    require_empty(workdir)
    items: dict[str, Any] = {
        "backbone": ocp.args.PyTreeSave({"params": params, "batch_stats": batch_stats})
    }
    if centers is not None:
        items["centers"] = ocp.args.PyTreeSave({"centers": centers})
        items["dataset"] = ocp.args.JsonSave({"num_classes": len(centers)})
    try:
        with ocp.CheckpointManager(folder_of(workdir)) as manager:
            manager.save(0, args=ocp.args.Composite(**items))
        write_atomic(workdir / CONFIG, loading.to_json(config))
    except OSError as error:
        raise CheckpointError(f"cannot write to {workdir}: {error.strerror}") from error


def require_empty(workdir: Path) -> None:
    """Raise CheckpointError if the path is anything but an empty or missing folder."""
    if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
        raise CheckpointError(f"{workdir} exists and is not an empty folder: name a new one")


def _refuse_imported_weights(workdir: Path) -> None:
    for number in complete_steps(workdir):
        if not (folder_of(workdir) / str(number) / "training").is_dir():
            raise CheckpointError(
                f"--workdir {workdir} contains imported weights only and cannot be resumed; use a "
                f"new --workdir with --init-from {workdir}"
            )


def folder_of(workdir: Path) -> Path:
    """The folder of a run's checkpoints, as an absolute path, which Orbax requires."""
    return workdir.absolute() / "checkpoints"


def _split(state: TrainState) -> dict[str, dict[str, Any]]:
    """The state by checkpoint item."""
    fields = dict(vars(state))
    items = {"backbone": {name: fields.pop(name) for name in BACKBONE_FIELDS}}
    if ema := fields.pop("ema"):
        items["ema"] = ema
    return items | {"training": fields}


def restore_args(like: Any, *, strict_shapes: bool = True, partial: bool = False) -> Any:
    """Arguments to restore arrays of the shapes, types and placement of `like`.

    Args:
      like: the arrays.
      strict_shapes: whether stored arrays of other shapes are an error; else padded or cut.
      partial: whether `like` is only a part of what is stored.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    args = jax.tree.map(
        lambda x: ocp.ArrayRestoreArgs(
            sharding=x.sharding, global_shape=x.shape, dtype=x.dtype, strict=strict_shapes
        ),
        abstract,
    )
    return ocp.args.PyTreeRestore(item=abstract, restore_args=args, partial_restore=partial)


def _not_resumable(workdir: Path, different: list[str]) -> CheckpointError:
    fix = "Give the stored values to resume it, or another --workdir to begin a new run"
    if all(line.startswith(EXTENDABLE) for line in different):
        fix = (
            "Add --schedule.extend to continue it under the new schedule, or start a new run from "
            f"its weights with another --workdir and --init-from {workdir}"
        )
    return CheckpointError(
        f"{workdir} holds a run that this command cannot resume:\n  "
        + "\n  ".join(different)
        + f"\n{fix}"
    )
