"""Checkpoints with Orbax: saved in the background, restored on any number of devices.

A checkpoint holds three items: `backbone` (parameters and BatchNorm statistics, all that inference
needs), `training` (the rest of the state) and `dataset` (the training set that the centers' rows
belong to). If the recipe keeps running means of the weights, `ema` has them, and inference uses
these. A checkpoint of imported weights has `backbone`, possibly `centers` and `dataset`, and no
`training`.
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
"""Start of the lines that describe differences permitted by `schedule.extend`."""

BACKBONE_FIELDS = ("params", "batch_stats")
_MOST_BYTES = 1 << 26  # limit for config.json, which has a few thousand


def describe(source: Source, data: DataConfig) -> Dataset:
    """Describes the training set for a checkpoint; a collective operation.

    Raises:
      DataError: the set cannot be read, or the processes of this run read different data.
    """
    return {
        "num_classes": source.num_classes,
        "num_images": len(source),
        "fingerprint": fingerprint.agreed(source, name=data.path),
    }


def open_workdir(config: Config) -> ocp.CheckpointManager:
    """Creates WORKDIR with its config.json, or checks that the run in it can be resumed.

    Raises:
      CheckpointError: the folder contains another run with a checkpoint (every difference is
        named), or cannot be written. Its contents are unchanged.
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
    different: list[str] = []
    if text is not None:
        stored = _parse_config(workdir, text)
        different = loading.differences(stored, config)
        if config.schedule.extend:  # `extension` checks these once the progress is known
            different = [line for line in different if not line.startswith(EXTENDABLE)]
        if different and (complete_steps(workdir) or checksums.missing(workdir)):
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
        if different:  # an earlier start ended before its first checkpoint
            names = ", ".join(line.partition(":")[0] for line in different)
            damaged.warn(
                [
                    f"{workdir} was begun with another {names}, and saved no checkpoint: "
                    "this run starts over in it"
                ]
            )
            (workdir / METRICS).unlink(missing_ok=True)
            replace_config(workdir, config)
            return
        _write_config(workdir, text or loading.to_json(config), repaired=problem is not None)
    except OSError as error:
        raise locks.cannot_write(workdir, error) from error


def holds_config(workdir: Path) -> bool:
    """Returns whether the workdir contains a run: config.json, or its copy."""
    return _stored_config(workdir)[0] is not None


def replace_config(workdir: Path, config: Config) -> None:
    """Rewrites config.json and its copy; a run that is killed in between uses the new one."""
    text = loading.to_json(config)
    checksums.keep_config(workdir, text)
    write_atomic(workdir / CONFIG, text)


def _manager_options(config: CheckpointConfig) -> ocp.CheckpointManagerOptions:
    """Keeps the newest checkpoints and, with `best_metric`, the best; ties go to the later one."""
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
    """Ranks a checkpoint: higher is better; -inf if the metric was not measured."""
    value = metrics.get(name, math.nan)
    if math.isnan(value):
        return -math.inf
    return -value if name.endswith("/eer") else value


def read_config(workdir: Path) -> Config:
    """Reads a stored run's configuration; if config.json is damaged, its copy, with a warning.

    Raises:
      CheckpointError: the folder has none, or a damaged one without a copy.
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
    """Lists the fields of a configuration that name parts from outside the package."""
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
    """Returns the verified text of config.json, and what is wrong with the file or its copy.

    The text is None if it is missing, or if neither the file nor its copy is intact.
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
    if copy is None:  # workdir of an earlier version
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
    """Writes config.json and its copy if they are missing; rewrites both if one was damaged."""
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
      manager: the workdir's manager.
      state: the state to save.
      dataset: the training set.
      score: {checkpoint.best_metric: its value}, if it was measured for this state.

    Raises:
      CheckpointError: this checkpoint or the previous one cannot be written, or another run has
        taken over the workdir.
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
      CheckpointError: the save has failed.
    """
    # With several processes this is a collective operation: they would have to call it together.
    if jax.process_count() == 1 and not manager.is_saving_in_progress():
        with _reporting(manager):
            manager.wait_until_finished()


def close(manager: ocp.CheckpointManager) -> None:
    """Waits for a background save to finish.

    Raises:
      CheckpointError: the save has failed.
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
      CheckpointError: the sets differ and `data.changed` does not accept it, or the number of
        classes has changed, so that the stored class centers do not fit.
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
      manager: the workdir's manager.
      fresh: a state with the run's shapes and the wanted placement; its arrays may be abstract.
      dataset: the training set; its number of classes must equal the stored one.

    Returns:
      The state, or None if nothing was saved yet.

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
    # Centers are stored with the padding rows that the number of devices required when they were
    # written: Orbax pads or truncates them to the shape wanted here. No class is lost, because the
    # number of classes is the same.
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
    """Writes a WORKDIR with weights only: it can be read like a run's, but not resumed.

    Args:
      config: names the workdir, the network and the embedding size; the rest is not used.
      params: the backbone's parameters.
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
    require_empty(workdir)  # a run may have ended here before the lock was taken
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
    """Raises CheckpointError unless the path is an empty or missing folder."""
    if workdir.exists() and (not workdir.is_dir() or _holds_files(workdir)):
        raise CheckpointError(f"{workdir} exists and is not an empty folder: name a new one")


def _holds_files(workdir: Path) -> bool:
    """Returns whether a folder exists and has files other than this process's lock."""
    return workdir.is_dir() and not all(map(locks.is_lock_file, workdir.iterdir()))


def _refuse_imported_weights(workdir: Path) -> None:
    # The checksums have shown that the newest checkpoint of a run is complete; an older one may be
    # incomplete if the run was killed while removing it.
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
    """Splits the state into checkpoint items."""
    fields = dict(vars(state))
    items = {"backbone": {name: fields.pop(name) for name in BACKBONE_FIELDS}}
    if ema := fields.pop("ema"):
        items["ema"] = ema
    return items | {"training": fields}


def restore_args(like: Any, *, strict_shapes: bool = True, partial: bool = False) -> Any:
    """Returns the arguments to restore arrays of the shapes, types and placement of `like`.

    Args:
      like: the arrays.
      strict_shapes: whether stored arrays of other shapes are an error; otherwise they are padded
          or truncated.
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
