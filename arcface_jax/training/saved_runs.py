"""Read checkpoints for inference, export and fine-tuning, also while the run trains.

Such a run removes old checkpoints. If one vanishes while it is read, the next one is read.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from arcface_jax.config import Config
from arcface_jax.config.choices import Which
from arcface_jax.errors import CheckpointError
from arcface_jax.models import registry
from arcface_jax.runtime import checksums, damaged, locks
from arcface_jax.runtime.files import complete_steps, quiet_orbax
from arcface_jax.training import checkpoint, checkpoint_forms, room, step
from arcface_jax.training.checkpoint import CONFIG

# Number of checkpoints to try, each of which may be removed while it is read.
_ATTEMPTS = 20
# Removing a checkpoint takes a while, during which some of its files are missing.
_REMOVAL_SECONDS = 5.0
_PAUSE_SECONDS = 0.1

T = TypeVar("T")


def restore_backbone(
    workdir: Path, which: Which = "latest"
) -> tuple[Config, registry.Arrays, registry.Arrays, int]:
    """Reads what inference needs of a run: configuration, params, batch_stats, and their step.

    Raises:
      CheckpointError: the folder has no run, no such checkpoint, or one that is damaged or of
        another network.
    """
    return _read(workdir, which, _restore_backbone)


def _restore_backbone(
    workdir: Path, config: Config, manager: ocp.CheckpointManager, number: int
) -> tuple[Config, registry.Arrays, registry.Arrays, int]:
    item = "ema" if config.optimizer.ema else "backbone"
    saved = checkpoint.folder_of(workdir) / str(number)
    checksums.require_whole(saved, item)
    placed = SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), part)
        for name, part in zip(checkpoint.BACKBONE_FIELDS, step.backbone(config).shapes, strict=True)
    }
    room.require_to_read(wanted, workdir, jax.local_devices()[0])
    try:
        with checksums.reporting_unreadable(saved):
            form = checkpoint_forms.stored(manager, number)
            as_stored = checkpoint_forms.as_stored(wanted, wanted, form)
            args = ocp.args.Composite(**{item: checkpoint.restore_args(as_stored)})
            restored = manager.restore(number, args=args)[item]
            restored = checkpoint_forms.as_wanted(restored, form, wanted)
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"the checkpoint in {workdir} does not match model.network {config.model.network} in "
            f"its {CONFIG}; restore the original {CONFIG}: {error}"
        ) from error
    return config, restored["params"], restored["batch_stats"], number


def restore_dataset(workdir: Path, which: Which = "latest") -> tuple[Config, int, dict[str, Any]]:
    """Reads a run's configuration, and a checkpoint's step and record of the training set.

    The record has num_classes and num_images; it is empty for imported weights.

    Raises:
      CheckpointError: as `restore_backbone`.
    """
    return _read(workdir, which, _restore_dataset)


def _restore_dataset(
    workdir: Path, config: Config, manager: ocp.CheckpointManager, number: int
) -> tuple[Config, int, dict[str, Any]]:
    saved = checkpoint.folder_of(workdir) / str(number)
    if not (saved / "dataset").is_dir():
        return config, number, {}
    checksums.require_whole(saved, "dataset")
    with checksums.reporting_unreadable(saved):
        items = ocp.args.Composite(dataset=ocp.args.JsonRestore())
        return config, number, manager.restore(number, args=items)["dataset"]


def restore_centers(workdir: Path, which: Which = "latest") -> tuple[np.ndarray, np.ndarray | None]:
    """Reads the (C * subcenters, D) float32 class centers of a run, and their SGD momentum.

    The momentum is None for another optimizer, and for imported weights.

    Raises:
      CheckpointError: the folder has no such checkpoint, or one without centers.
    """
    return _read(workdir, which, _restore_centers)


def _restore_centers(
    workdir: Path, config: Config, manager: ocp.CheckpointManager, number: int
) -> tuple[np.ndarray, np.ndarray | None]:
    item = _item_of_centers(workdir, number)
    path = checkpoint.folder_of(workdir) / str(number) / item
    classes = _num_classes(manager, path)
    rows = classes * config.head.subcenters  # the rest is padding
    with checksums.reporting_unreadable(path.parent):
        # A Checkpointer would warn that this item has no metadata of a whole checkpoint.
        stored = manager.directory / str(number) / item
        tree: Any = ocp.PyTreeCheckpointHandler().metadata(stored)
        wanted = {"centers": tree["centers"]}
        if "momentum" in tree.get("centers_opt", {}):
            wanted["centers_opt"] = {"momentum": tree["centers_opt"]["momentum"]}
        room.require_to_read(wanted, workdir)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
        found = manager.restore(number, args=ocp.args.Composite(**{item: args}))[item]
    momentum = found.get("centers_opt", {}).get("momentum")
    return found["centers"][:rows], None if momentum is None else momentum[:rows]


def restore_kept_centers(
    workdir: Path,
    *,
    like: jax.Array,
    num_classes: int,
    subcenters: int,
    label_map: np.ndarray | None = None,
) -> jax.Array:
    """Reads the class centers of another run with the same classes, or with mapped ones.

    Args:
      workdir: workdir of that run.
      like: an array with the wanted shape and placement.
      num_classes: C of the new run.
      subcenters: centers per class of the new run.
      label_map: (C of the other run,) the new label of each old class, -1 for none; a merged class
        gets the mean of its centers.

    Raises:
      CheckpointError: the folder has no checkpoint, or its centers do not fit.
    """

    def restore(
        workdir: Path, there: Config, manager: ocp.CheckpointManager, number: int
    ) -> jax.Array:
        item = _item_of_centers(workdir, number)
        saved = checkpoint.folder_of(workdir) / str(number)
        stored = (_num_classes(manager, saved / item), there.head.subcenters)
        fits = label_map is not None and label_map.max(initial=-1) < num_classes
        if label_map is not None and fits and stored == (len(label_map), subcenters):
            old, _ = _restore_centers(workdir, there, manager, number)
            return _mapped(old, label_map, like=like)
        if stored != (num_classes, subcenters):
            raise CheckpointError(
                f"finetune.centers kept: {workdir} has centers of {stored[0]} classes x "
                f"{stored[1]}, the training set here needs {num_classes} x {subcenters}: use "
                "--finetune.centers class_means or random"
            )
        wanted = {"centers": like}
        args = checkpoint.restore_args(wanted, strict_shapes=False, partial=True)
        with checksums.reporting_unreadable(saved):
            return manager.restore(number, args=ocp.args.Composite(**{item: args}))[item]["centers"]

    return _read(workdir, "latest", restore)


def _mapped(old: np.ndarray, label_map: np.ndarray, *, like: jax.Array) -> jax.Array:
    """Averages the old centers of each new class; classes without any keep the rows of `like`."""
    size = old.shape[1]
    subcenters = len(old) // len(label_map)
    kept = label_map >= 0
    rows = like.shape[0] // subcenters  # classes including padding
    sums = np.zeros((rows, subcenters, size), np.float32)
    np.add.at(sums, label_map[kept], old.reshape(-1, subcenters, size)[kept])
    parts = np.bincount(label_map[kept], minlength=rows)
    means = (sums / np.maximum(parts, 1)[:, None, None]).reshape(-1, size)
    known = np.repeat(parts > 0, subcenters)[:, None]
    placed, chosen = (jax.device_put(array, like.sharding) for array in (means, known))
    return jax.jit(jax.numpy.where, out_shardings=like.sharding)(chosen, placed, like)


def is_begun(workdir: Path) -> bool:
    """Returns whether the workdir has a checkpoint to resume from."""
    return bool(complete_steps(workdir))


def _num_classes(manager: ocp.CheckpointManager, centers: Path) -> int:
    """Returns C of a checkpoint, after verifying its item with the class centers."""
    saved = centers.parent
    checksums.require_whole(saved, centers.name)
    checksums.require_whole(saved, "dataset")
    with checksums.reporting_unreadable(saved):
        items = ocp.args.Composite(dataset=ocp.args.JsonRestore())
        return manager.restore(int(saved.name), args=items)["dataset"]["num_classes"]


def _item_of_centers(workdir: Path, number: int) -> str:
    saved = checkpoint.folder_of(workdir) / str(number)
    item = next((name for name in ("training", "centers") if (saved / name).is_dir()), None)
    if item is None:
        raise CheckpointError(
            f"{workdir} has a backbone but no class centers: import it with `arcface-jax import "
            "torch --centers FOLDER`, or use --finetune.centers class_means or random"
        )
    return item


def _read(
    workdir: Path,
    which: Which,
    read: Callable[[Path, Config, ocp.CheckpointManager, int], T],
) -> T:
    """Applies `read` to a checkpoint, or to another one if that is removed in the meantime.

    Raises:
      CheckpointError: there is none, `which` names a removed step, or each of several was removed.
    """
    quiet_orbax()  # of a failed read, some parts fail after its error is raised
    for attempt in range(_ATTEMPTS):
        number = None
        try:
            config = checkpoint.read_config(workdir)
            if not checkpoint.folder_of(workdir).is_dir():
                raise CheckpointError(
                    f"{workdir} holds no folder of checkpoints: train first, or name another run"
                )
            checksums.require_listable(workdir)
            with _manager(workdir) as manager:
                number = _choose(manager, which, workdir)
                return read(workdir, config, manager, number)
        except Exception as error:
            named = isinstance(which, int)
            if (named and number is None) or not _is_removed(workdir, number):
                raise
            if number is None and attempt == _ATTEMPTS - 1:
                raise  # no checkpoint was chosen that the run could have removed
            if named or attempt == _ATTEMPTS - 1:
                raise CheckpointError(
                    f"{workdir}: the checkpoint of step {number} was removed by its run while it "
                    "was read; use --step latest, or raise --checkpoint.keep of the run"
                ) from error
    raise AssertionError("unreachable: the last attempt returns or raises")


def _is_removed(workdir: Path, number: int | None) -> bool:
    """Returns whether a checkpoint is gone or about to be; None means that listing failed."""
    path = checkpoint.folder_of(workdir) / str(number)
    if number is not None and not path.exists():
        return True
    holder = locks.find(workdir)
    if holder is None or not holder[1]:
        return False  # no run removes checkpoints here
    if number is None:
        time.sleep(_PAUSE_SECONDS)
        return bool(complete_steps(workdir))
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE_SECONDS)
    return True


def _manager(workdir: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        checkpoint.folder_of(workdir),
        options=ocp.CheckpointManagerOptions(create=False, multiprocessing_options=_alone()),
    )


def _choose(manager: ocp.CheckpointManager, which: Which, workdir: Path) -> int:
    """Returns the step of the requested checkpoint on disk."""
    steps = complete_steps(workdir)
    if not steps:
        raise CheckpointError(
            f"{workdir} holds no checkpoint yet: train first, or name another run"
        )
    if which in ("latest", "best"):
        damaged.warn(checksums.missing(workdir))
    if which == "latest":
        return steps[-1]
    if which == "best":
        return _best(manager, steps, workdir)
    if which not in steps:
        stored = ", ".join(map(str, steps))
        raise CheckpointError(
            f"{workdir} holds no checkpoint of step {which}: use one of {stored}, latest or best"
        )
    return which


def _best(manager: ocp.CheckpointManager, steps: list[int], workdir: Path) -> int:
    # A resumed run may rank by another metric than config.json names: it is stored with the value.
    measured = {}
    for number in steps:
        saved = checkpoint.folder_of(workdir) / str(number)
        if (saved / "metrics").is_dir():
            checksums.require_whole(saved, "metrics")
        with checksums.reporting_unreadable(saved):
            if score := manager.metrics(number):
                measured[number] = score
    if not measured:
        raise CheckpointError(
            f"{workdir} has no best checkpoint (checkpoint.best_metric was not set): train with "
            "--checkpoint.best-metric eval/NAME/accuracy, or use --step latest"
        )
    (name,) = measured[max(measured)]
    return max(measured, key=lambda step: (checkpoint.rank_of(measured[step], name), step))


def _alone() -> ocp.options.MultiprocessingOptions:
    """Returns options with which each process reads independently of the others."""
    here = jax.process_index()
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"reader-{here}"
    )
