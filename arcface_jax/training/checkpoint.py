"""Checkpoints with Orbax: saved in the background, restored on any number of devices.

A checkpoint holds three items: `backbone` (parameters and BatchNorm statistics, all that inference
needs), `training` (the rest of the state) and `dataset` (what the centers' rows stand for); and,
where the recipe asks for running means of the weights, `ema`, which inference then takes. One of
imported weights has no `training`: `backbone` alone, or `centers` and `dataset` besides.
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

BACKBONE_FIELDS = ("params", "batch_stats")


def open_workdir(config: Config) -> ocp.CheckpointManager:
    """Makes WORKDIR with its config.json, or checks that the run it holds can go on.

    Raises:
      CheckpointError: the folder holds another run, every difference of which is named, or cannot
        be written. Nothing that was there has changed.
    """
    with launch.first_alone():
        _prepare(config)
        workdir = Path(config.workdir)
        folder = folder_of(workdir)
        if launch.is_first():
            with reporting_disk_errors(workdir, workdir):
                for sentence in checksums.set_aside_damaged(folder):
                    print(f"warning: {sentence}", file=sys.stderr)
                remove_unfinished(workdir)
            manifest.write_environment(config)
    quiet_orbax()
    options = _what_to_keep(config.checkpoint)
    if launch.is_first():
        note = partial(checksums.note, folder)
        options.async_options = ocp.options.AsyncOptions(post_finalization_callback=note)
    with reporting_disk_errors(workdir, folder):
        return ocp.CheckpointManager(folder, options=options)


def _prepare(config: Config) -> None:
    workdir = Path(config.workdir)
    if (workdir / CONFIG).exists():
        _refuse_weights_alone(workdir)
        different = loading.differences(read_config(workdir), config)
        if different:
            raise _not_resumable(workdir, different)
    elif workdir.is_dir() and any(workdir.iterdir()):
        raise CheckpointError(
            f"--workdir {workdir} is not empty and holds no {CONFIG}: give a new or empty folder, "
            "or that of a "
            f"run to resume"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not (workdir / CONFIG).exists():
            write_atomic(workdir / CONFIG, loading.to_json(config))
    except OSError as error:
        raise CheckpointError(
            f"cannot write to --workdir {workdir}: {error.strerror}. Make room, or make it "
            "writable, or name another folder"
        ) from error


def _what_to_keep(config: CheckpointConfig) -> ocp.CheckpointManagerOptions:
    """The newest; and where a metric is named those that it calls the best, of equals the later."""
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
    """The higher the better; last where the metric was not measured."""
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
    """Begins to save; the state may be used up by the next step at once.

    A step that is saved already is left as it is.

    Args:
      manager: of the workdir.
      state: to be saved.
      dataset: the training set.
      score: {checkpoint.best_metric: its value}, where it was measured for this state.

    Raises:
      CheckpointError: this cannot be written, or the one before it could not.
    """
    number = int(state.step)
    if number in manager.all_steps():
        return
    items: dict[str, Any] = {
        name: ocp.args.PyTreeSave(item) for name, item in _split(state).items()
    }
    items["dataset"] = ocp.args.JsonSave(dataset)
    with _in_words(manager):
        manager.save(number, args=ocp.args.Composite(**items), metrics=score)


def check(manager: ocp.CheckpointManager) -> None:
    """Looks whether a save that was begun has failed since; waits for nothing.

    Orbax itself says so in the next save, which may be hours later.

    Raises:
      CheckpointError: it has.
    """
    # Several processes would have to ask at the same time.
    if jax.process_count() == 1 and not manager.is_saving_in_progress():
        with _in_words(manager):
            manager.wait_until_finished()


def close(manager: ocp.CheckpointManager) -> None:
    """Waits for a save that is under way.

    Raises:
      CheckpointError: it has failed.
    """
    with _in_words(manager):
        manager.close()


def _in_words(manager: ocp.CheckpointManager) -> AbstractContextManager[None]:
    folder = Path(manager.directory)
    return reporting_disk_errors(folder.parent, folder)


def restore(
    manager: ocp.CheckpointManager, fresh: TrainState, dataset: Dataset
) -> TrainState | None:
    """The newest state, placed as `fresh` on however many devices.

    Args:
      manager: of the workdir.
      fresh: a state of the run's shapes, placed on the devices as the restored one shall be.
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
    """Makes a WORKDIR that holds weights alone: to be read as any other, not to be resumed.

    Args:
      config: names the workdir, the network and the embedding size; the rest says nothing of how
        the weights came to be.
      params: of the backbone.
      batch_stats: its BatchNorm statistics.
      centers: (C, D) float32 class centers, where they are known.

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
    """Raises CheckpointError where there is anything at that path but an empty folder."""
    if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
        raise CheckpointError(f"{workdir} exists and is not an empty folder: name a new one")


def _refuse_weights_alone(workdir: Path) -> None:
    for number in complete_steps(workdir):
        if not (folder_of(workdir) / str(number) / "training").is_dir():
            raise CheckpointError(
                f"--workdir {workdir} holds imported weights and no run that could be resumed: to "
                f"train from them, give a new --workdir and --init-from {workdir}"
            )


def folder_of(workdir: Path) -> Path:
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
    return CheckpointError(
        f"{workdir} holds a run that this command cannot resume:\n  "
        + "\n  ".join(different)
        + "\nGive the stored values to resume it, or another --workdir to begin a new run"
    )
