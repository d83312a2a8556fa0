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

from arcface_jax import plugins
from arcface_jax.config import CheckpointConfig, Config, DataConfig, loading
from arcface_jax.data import fingerprint
from arcface_jax.data.source import Source
from arcface_jax.errors import CheckpointError
from arcface_jax.models import registry
from arcface_jax.runtime import checksums, damaged, foreign, launch, locks
from arcface_jax.runtime.files import (
    complete_steps,
    quiet_orbax,
    remove_unfinished,
    reporting_disk_errors,
    write_atomic,
)
from arcface_jax.runtime.metrics import METRICS
from arcface_jax.training import checkpoint_forms, manifest
from arcface_jax.training.step import TrainState

CONFIG = "config.json"
Dataset = dict[str, Any]
"""num_classes and num_images of the training set, and its `fingerprint`."""

EXTENDABLE = ("schedule.epochs:", "schedule.decay_epochs:")
"""How the differences begin that `schedule.extend` allows."""

BACKBONE_FIELDS = ("params", "batch_stats")
_MOST_BYTES = 1 << 26  # of config.json, which has a few thousand


def describe(source: Source, data: DataConfig) -> Dataset:
    """What is stored of the training set; a collective operation.

    Raises:
      DataError: the set cannot be read, or the processes of this run read different data.
    """
    return {
        "num_classes": source.num_classes,
        "num_images": len(source),
        "fingerprint": fingerprint.agreed(source, name=data.path),
    }


def open_workdir(config: Config) -> ocp.CheckpointManager:
    """Creates WORKDIR with its config.json, or check that the run in it can be resumed.

    Raises:
      CheckpointError: the folder holds another run (every difference is named), or cannot be
        written. Nothing in it has changed.
    """
    workdir = Path(config.workdir)
    folder = folder_of(workdir)
    with launch.first_process_first():
        _prepare(config)
        if launch.is_first():
            with reporting_disk_errors(workdir, workdir):
                damaged.warn(checksums.set_aside_damaged(folder))
                remove_unfinished(workdir)
        _refuse_imported_weights(workdir)
        if launch.is_first():
            manifest.write_environment(config)
    quiet_orbax()
    options = _manager_options(config.checkpoint)
    if launch.is_first():
        options.async_options = _noting_checksums(workdir)
    with reporting_disk_errors(workdir, folder):
        return ocp.CheckpointManager(folder, options=options)


def _noting_checksums(workdir: Path) -> ocp.options.AsyncOptions:
    note = partial(checksums.note, folder_of(workdir), workdir / METRICS)
    return ocp.options.AsyncOptions(post_finalization_callback=note)


def _prepare(config: Config) -> None:
    workdir = Path(config.workdir)
    text, problem = _stored_config(workdir)
    if text is not None:
        stored = _parse_config(workdir, text)
        different = loading.differences(stored, config)
        if config.schedule.extend:  # `extension` checks these once it is known how far the run is
            different = [line for line in different if not line.startswith(EXTENDABLE)]
        if different:
            raise _not_resumable(workdir, different)
    elif damaged.is_there(workdir / CONFIG):
        raise CheckpointError(f"{problem}; restore it from backup, or use another --workdir")
    elif _holds_files(workdir):
        raise CheckpointError(
            f"--workdir {workdir} is not empty and holds no {CONFIG}: use a new or empty folder, "
            "or the workdir of a run to resume"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        damaged.warn([problem] if problem else [])
        damaged.warn(damaged.set_aside_wrong_kinds(workdir))
        _write_config(workdir, text or loading.to_json(config), repaired=problem is not None)
    except OSError as error:
        raise CheckpointError(
            f"cannot write to --workdir {workdir}: {error.strerror}. Free space, fix permissions, "
            "or choose another --workdir"
        ) from error


def holds_config(workdir: Path) -> bool:
    """Returns whether a run has begun in the workdir: it has a config.json, or the copy of one."""
    return _stored_config(workdir)[0] is not None


def replace_config(workdir: Path, config: Config) -> None:
    """Writes config.json again, with its copy; a run that is killed in between uses the new one."""
    text = loading.to_json(config)
    checksums.keep_config(workdir, text)
    write_atomic(workdir / CONFIG, text)


def _manager_options(config: CheckpointConfig) -> ocp.CheckpointManagerOptions:
    """Keeps the newest checkpoints, and with `best_metric` the best ones; of equals the later."""
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
    """The configuration of a stored run; its copy where config.json is damaged, with a warning.

    Raises:
      CheckpointError: the folder holds none, or one that is damaged and has no copy.
    """
    text, problem = _stored_config(workdir)
    if text is None and damaged.is_there(workdir / CONFIG):
        raise CheckpointError(f"{problem}; restore it from backup")
    if text is None:
        raise CheckpointError(f"{workdir} holds no {CONFIG}: name the --workdir of a training run")
    damaged.warn([problem] if problem else [])
    config = _parse_config(workdir, text)
    plugins.require_own(_plugins_of(config), source=workdir / CONFIG)
    return config


def _plugins_of(config: Config) -> list[tuple[str, str]]:
    """Fields of a configuration, and the parts from outside the package that they name."""
    named = [
        ("model.network", config.model.network),
        ("head.loss", config.head.loss),
        ("optimizer.kind", config.optimizer.kind),
        *(("data.path", part.strip()) for part in config.data.path.split(",")),
        *(("evaluation.targets", target) for target in config.evaluation.targets),
    ]
    found = [(field, plugins.parse(name)) for field, name in named]
    return [(field, reference.name) for field, reference in found if reference is not None]


def _stored_config(workdir: Path) -> tuple[str | None, str | None]:
    """The text of config.json as it was written, and what is wrong with the file or its copy.

    The text is None where there is none, or none that is whole.
    """
    path = workdir / CONFIG
    try:
        text = foreign.read(path, most=_MOST_BYTES).decode()
    except (OSError, ValueError):
        text = None
    try:
        copy = checksums.config_copy(workdir)
    except ValueError as error:
        return text, f"{error}: {path} cannot be verified"
    if copy is None:  # of an earlier version
        unreadable = text is None and damaged.is_there(path)
        return text, f"{path} is not a readable text file" if unreadable else None
    if text == copy:
        return text, None
    wrong = "differs from" if damaged.is_there(path) else "is missing, but not"
    return copy, f"{path} {wrong} its copy checksums/{CONFIG}; using the copy"


def _parse_config(workdir: Path, text: str) -> Config:
    path = workdir / CONFIG
    try:
        foreign.parse_json(text)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}) and has no copy: restore it from backup; "
            f"{workdir / 'environment.json'} lists the configuration of each start"
        ) from error
    return loading.from_json(text, source=str(path))


def _write_config(workdir: Path, text: str, *, repaired: bool) -> None:
    """Writes config.json and its copy where they are missing, or both where one was damaged."""
    path = workdir / CONFIG
    if (
        repaired
        and damaged.is_there(path)
        and not (path.is_file() and path.read_bytes() == text.encode())
    ):
        damaged.warn([f"the damaged {CONFIG} is now {damaged.set_aside(path, workdir)}"])
    if not path.exists():
        write_atomic(path, text)
    if repaired or checksums.config_copy(workdir) is None:
        checksums.keep_config(workdir, text)


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    dataset: Dataset,
    score: dict[str, float] | None = None,
) -> None:
    """Starts saving in the background; the next step may donate the state at once.

    Does nothing if this step is already saved.

    Args:
      manager: of the workdir.
      state: to be saved.
      dataset: the training set.
      score: {checkpoint.best_metric: its value}, if it was measured for this state.

    Raises:
      CheckpointError: this checkpoint or the previous one cannot be written, or another run has
        taken the workdir over.
    """
    number = int(state.step)
    if number in manager.all_steps():
        return
    locks.require(Path(manager.directory).parent)
    items: dict[str, Any] = {
        name: ocp.args.PyTreeSave(item) for name, item in _split(state).items()
    }
    items["dataset"] = ocp.args.JsonSave(dataset)
    with _reporting(manager):
        manager.save(number, args=ocp.args.Composite(**items), metrics=score)


def check(manager: ocp.CheckpointManager) -> None:
    """Checks whether a background save has failed, without waiting.

    Orbax itself reports it in the next save, which may be hours later.

    Raises:
      CheckpointError: it has failed.
    """
    # A collective operation with several processes: they would have to call it at the same time.
    if jax.process_count() == 1 and not manager.is_saving_in_progress():
        with _reporting(manager):
            manager.wait_until_finished()


def close(manager: ocp.CheckpointManager) -> None:
    """Waits for a background save to finish.

    Raises:
      CheckpointError: it has failed.
    """
    with _reporting(manager):
        manager.close()


def _reporting(manager: ocp.CheckpointManager) -> AbstractContextManager[None]:
    folder = Path(manager.directory)
    return reporting_disk_errors(folder.parent, folder)


def check_data(manager: ocp.CheckpointManager, dataset: Dataset, data: DataConfig) -> None:
    """Compares the training set with the one of the newest checkpoint, if there is one.

    A change that `data.changed` accepts is printed.

    Raises:
      CheckpointError: they differ, and that is to be refused; or the number of classes has changed,
        for which the stored class centers do not fit.
    """
    number = manager.latest_step()
    if number is None:
        return
    workdir, stored = Path(manager.directory).parent, _stored_dataset(manager, number)
    _require_classes(manager, stored, dataset)
    old, new = stored.get("fingerprint"), dataset["fingerprint"]
    if fingerprint.comparable(old):
        different = fingerprint.differences(old, new)
    else:
        counts = (stored["num_images"], dataset["num_images"])
        different = [f"{counts[0]} images then and {counts[1]} now"] * (counts[0] != counts[1])
        _print_once(
            f"note: the checkpoint in {workdir} has no fingerprint of its training set: only the "
            "numbers of images and classes were compared; the next checkpoint will have one"
        )
    if not different:
        return
    change = (
        f"data.path {data.path} is not the data that the run in {workdir} was trained on: "
        + "; ".join(different)
    )
    if data.changed == "refuse":
        raise CheckpointError(
            f"{change}. Restore that data, use --data.changed accept to continue with the new one, "
            "or start a new run in another --workdir"
        )
    _print_once(f"warning: {change}. Continuing, because of --data.changed accept")


def _stored_dataset(manager: ocp.CheckpointManager, number: int) -> Dataset:
    args = ocp.args.Composite(dataset=ocp.args.JsonRestore())
    return manager.restore(number, args=args)["dataset"]


def _require_classes(manager: ocp.CheckpointManager, stored: Dataset, found: Dataset) -> None:
    different = [
        f"{name}: the stored run has {stored[name]}, the training set here has {found[name]}"
        for name in ("num_classes", "num_images")
        if name in found and stored[name] != found[name]
    ]
    if stored["num_classes"] != found["num_classes"]:
        raise _not_resumable(Path(manager.directory).parent, different)


def restore(
    manager: ocp.CheckpointManager, fresh: TrainState, dataset: Dataset
) -> TrainState | None:
    """Returns the newest state, placed as `fresh` on however many devices.

    Args:
      manager: of the workdir.
      fresh: a state of the run's shapes, placed on the devices as the restored one shall be; its
        arrays may be abstract.
      dataset: the training set, of as many classes as the stored one.

    Returns:
      The state, or None where nothing was saved yet.

    Raises:
      CheckpointError: the checkpoint has another number of classes.
    """
    number = manager.latest_step()
    if number is None:
        return None
    with checksums.reporting_unreadable(Path(manager.directory) / str(number)):
        return _restore(manager, number, fresh, dataset)


def _restore(
    manager: ocp.CheckpointManager, number: int, fresh: TrainState, dataset: Dataset
) -> TrainState:
    _require_classes(manager, _stored_dataset(manager, number), dataset)
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


def _print_once(message: str) -> None:
    if launch.is_first():
        print(message, file=sys.stderr)


def save_weights(
    config: Config,
    params: registry.Arrays,
    batch_stats: registry.Arrays,
    *,
    centers: np.ndarray | None = None,
) -> None:
    """Writes a WORKDIR with weights only: it can be read like any other, but not resumed.

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
    with locks.held(workdir):
        _write_weights(config, params, batch_stats, centers)


def _write_weights(
    config: Config,
    params: registry.Arrays,
    batch_stats: registry.Arrays,
    centers: np.ndarray | None,
) -> None:
    workdir = Path(config.workdir)
    require_empty(workdir)  # again: a run may have ended here before the lock was taken
    items: dict[str, Any] = {
        "backbone": ocp.args.PyTreeSave({"params": params, "batch_stats": batch_stats})
    }
    if centers is not None:
        items["centers"] = ocp.args.PyTreeSave({"centers": centers})
        items["dataset"] = ocp.args.JsonSave({"num_classes": len(centers)})
    try:
        options = ocp.CheckpointManagerOptions(async_options=_noting_checksums(workdir))
        with ocp.CheckpointManager(folder_of(workdir), options=options) as manager:
            manager.save(0, args=ocp.args.Composite(**items))
        _write_config(workdir, loading.to_json(config), repaired=False)
    except OSError as error:
        raise CheckpointError(f"cannot write to {workdir}: {error.strerror}") from error


def require_empty(workdir: Path) -> None:
    """Raises CheckpointError if the path is anything but an empty or missing folder."""
    if workdir.exists() and (not workdir.is_dir() or _holds_files(workdir)):
        raise CheckpointError(f"{workdir} exists and is not an empty folder: name a new one")


def _holds_files(workdir: Path) -> bool:
    """Whether a folder exists and holds more than the lock of this process."""
    return workdir.is_dir() and not all(map(locks.is_lock_file, workdir.iterdir()))


def _refuse_imported_weights(workdir: Path) -> None:
    # Checksums have shown that nothing is missing from the newest checkpoint of a run; of an older
    # one parts may be, where the run was killed while it was being removed.
    steps = complete_steps(workdir)
    if steps and not (folder_of(workdir) / str(steps[-1]) / "training").is_dir():
        raise CheckpointError(
            f"--workdir {workdir} contains imported weights only and cannot be resumed; use a new "
            f"--workdir with --init-from {workdir}"
        )


def folder_of(workdir: Path) -> Path:
    """Returns the folder of a run's checkpoints, as an absolute path, which Orbax requires."""
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
