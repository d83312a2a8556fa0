"""Read checkpoints for inference, export and fine-tuning."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from arcface_jax.config import Config
from arcface_jax.config.choices import Which
from arcface_jax.errors import CheckpointError
from arcface_jax.models import registry
from arcface_jax.runtime import checksums
from arcface_jax.runtime.files import complete_steps
from arcface_jax.training import checkpoint, checkpoint_forms, room, step
from arcface_jax.training.checkpoint import CONFIG


def restore_backbone(
    workdir: Path, which: Which = "latest"
) -> tuple[Config, registry.Arrays, registry.Arrays, int]:
    """What inference needs of a run: configuration, params, batch_stats, and their step.

    Raises:
      CheckpointError: the folder holds no run, no such checkpoint, or one that is damaged or of
        another network.
    """
    config, manager, number = _open_to_read(workdir, which)
    item = "ema" if config.optimizer.ema else "backbone"
    checksums.require_whole(checkpoint.folder_of(workdir) / str(number), item)
    placed = SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), part)
        for name, part in zip(checkpoint.BACKBONE_FIELDS, step.backbone(config).shapes, strict=True)
    }
    room.require_to_read(wanted, workdir, jax.local_devices()[0])
    form = checkpoint_forms.stored(manager, number)
    try:
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


def restore_centers(workdir: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(C * subcenters, D) float32 class centers of the newest checkpoint, and their SGD momentum.

    The momentum is None for another optimizer, and for imported weights.

    Raises:
      CheckpointError: the folder holds no checkpoint, or one without centers.
    """
    config, manager, number = _open_to_read(workdir)
    path = checkpoint.folder_of(workdir) / str(number) / _item_of_centers(workdir, number)
    dataset = manager.restore(number, args=ocp.args.Composite(dataset=ocp.args.JsonRestore()))
    rows = dataset["dataset"]["num_classes"] * config.head.subcenters  # the rest is padding
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(path).item_metadata.tree
        wanted = {"centers": tree["centers"]}
        if "momentum" in tree.get("centers_opt", {}):
            wanted["centers_opt"] = {"momentum": tree["centers_opt"]["momentum"]}
        room.require_to_read(wanted, workdir)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        found = reader.restore(path, item=wanted, restore_args=as_numpy, partial_restore=True)
    momentum = found.get("centers_opt", {}).get("momentum")
    return found["centers"][:rows], None if momentum is None else momentum[:rows]


def restore_kept_centers(
    workdir: Path, *, like: jax.Array, num_classes: int, subcenters: int
) -> jax.Array:
    """The class centers of another run of the same classes.

    Args:
      workdir: of that run.
      like: an array of the shape and placement they are to have.
      num_classes: C of the new run.
      subcenters: per class, of the new run.

    Raises:
      CheckpointError: the folder holds no checkpoint, or its centers do not fit.
    """
    there, manager, number = _open_to_read(workdir)
    item = _item_of_centers(workdir, number)
    dataset = manager.restore(number, args=ocp.args.Composite(dataset=ocp.args.JsonRestore()))
    stored = (dataset["dataset"]["num_classes"], there.head.subcenters)
    if stored != (num_classes, subcenters):
        raise CheckpointError(
            f"finetune.centers kept: {workdir} has centers of {stored[0]} classes x {stored[1]}, "
            f"the training set here needs {num_classes} x {subcenters}: use "
            "--finetune.centers class_means or random"
        )
    wanted = {"centers": like}
    args = checkpoint.restore_args(wanted, strict_shapes=False, partial=True)
    return manager.restore(number, args=ocp.args.Composite(**{item: args}))[item]["centers"]


def is_begun(workdir: Path) -> bool:
    """Whether the workdir holds a checkpoint to resume from."""
    return bool(complete_steps(workdir))


def _item_of_centers(workdir: Path, number: int) -> str:
    saved = checkpoint.folder_of(workdir) / str(number)
    item = next((name for name in ("training", "centers") if (saved / name).is_dir()), None)
    if item is None:
        raise CheckpointError(f"{workdir} holds a backbone and no class centers")
    return item


def _open_to_read(
    workdir: Path, which: Which = "latest"
) -> tuple[Config, ocp.CheckpointManager, int]:
    """The configuration, and one of the checkpoints by number."""
    config = checkpoint.read_config(workdir)
    manager = ocp.CheckpointManager(
        checkpoint.folder_of(workdir),
        options=ocp.CheckpointManagerOptions(create=False, multiprocessing_options=_alone()),
    )
    return config, manager, _choose(manager, which, workdir)


def _choose(manager: ocp.CheckpointManager, which: Which, workdir: Path) -> int:
    """The step of one of the checkpoints on disk."""
    steps = sorted(manager.all_steps())
    if not steps:
        raise CheckpointError(
            f"{workdir} holds no checkpoint yet: train first, or name another --checkpoint"
        )
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
    # A resumed run may rank by another metric than config.json does: it is stored with the value.
    measured = {step: score for step in steps if (score := manager.metrics(step))}
    if not measured:
        raise CheckpointError(
            f"{workdir} has no best checkpoint (checkpoint.best_metric was not set): train with "
            "--checkpoint.best-metric eval/NAME/accuracy, or use --step latest"
        )
    (name,) = measured[max(measured)]
    return max(measured, key=lambda step: (checkpoint.rank_of(measured[step], name), step))


def _alone() -> ocp.options.MultiprocessingOptions:
    """Options with which each process reads independently of the others."""
    here = jax.process_index()
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"alone-{here}"
    )
