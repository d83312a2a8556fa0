"""Checkpoints with Orbax: saved in the background, restored on any number of devices.

A checkpoint holds three items: `backbone` (parameters and BatchNorm statistics, all that inference
needs), `training` (the rest of the state) and `dataset` (what the centers' rows stand for).
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from arcface_jax import checkpoint_forms, config_files, models, step
from arcface_jax.config import Config
from arcface_jax.errors import CheckpointError
from arcface_jax.step import TrainState

CONFIG = "config.json"
Dataset = dict[str, int]
"""num_classes and num_images of the training set."""

_BACKBONE_FIELDS = ("params", "batch_stats")


def open_workdir(config: Config) -> ocp.CheckpointManager:
    """Makes WORKDIR with its config.json, or checks that the run it holds can go on.

    Raises:
      CheckpointError: the folder holds another run, every difference of which is named, or cannot
        be written. Nothing that was there has changed.
    """
    workdir = Path(config.workdir)
    if (workdir / CONFIG).exists():
        different = config_files.differences(read_config(workdir), config)
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
            (workdir / CONFIG).write_text(config_files.to_json(config))
    except OSError as error:
        raise CheckpointError(f"cannot write to --workdir {workdir}: {error.strerror}") from error
    options = ocp.CheckpointManagerOptions(max_to_keep=config.checkpoint.keep)
    return ocp.CheckpointManager(_folder(workdir), options=options)


def read_config(workdir: Path) -> Config:
    """The configuration of a stored run.

    Raises:
      CheckpointError: the folder holds none.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{workdir} holds no {CONFIG}: name the --workdir of a training run")
    return config_files.from_json(path.read_text(), source=str(path))


def save(manager: ocp.CheckpointManager, state: TrainState, dataset: Dataset) -> None:
    """Begins to save; the state may be used up by the next step at once.

    A step that is saved already is left as it is.
    """
    number = int(state.step)
    if number in manager.all_steps():
        return
    backbone, training = _split(state)
    manager.save(
        number,
        args=ocp.args.Composite(
            backbone=ocp.args.PyTreeSave(backbone),
            training=ocp.args.PyTreeSave(training),
            dataset=ocp.args.JsonSave(dataset),
        ),
    )


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
    backbone, training = _split(fresh)
    form = checkpoint_forms.stored(manager, number)
    restored = manager.restore(
        number,
        args=ocp.args.Composite(
            backbone=_restore_args(checkpoint_forms.as_stored(backbone, backbone, form)),
            # The centers are stored with as many rows of padding as the devices wanted that wrote
            # them: Orbax pads or cuts them to what is wanted here. The classes' rows are all
            # there, for their number is the stored one.
            training=_restore_args(
                checkpoint_forms.as_stored(training, backbone, form), strict_shapes=False
            ),
        ),
    )
    state = {**restored["backbone"], **restored["training"]}
    return TrainState(**checkpoint_forms.as_wanted(state, form, backbone))


def restore_backbone(workdir: Path) -> tuple[Config, models.Arrays, models.Arrays, int]:
    """What inference needs of a run: configuration, params, batch_stats, and their step.

    Raises:
      CheckpointError: the folder holds no run, no checkpoint, or one of another network.
    """
    config = read_config(workdir)
    manager = ocp.CheckpointManager(
        _folder(workdir), options=ocp.CheckpointManagerOptions(create=False)
    )
    number = manager.latest_step()
    if number is None:
        raise CheckpointError(
            f"{workdir} holds no checkpoint yet: train first, or name another --checkpoint"
        )
    placed = SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), part)
        for name, part in zip(_BACKBONE_FIELDS, step.backbone(config).shapes, strict=True)
    }
    form = checkpoint_forms.stored(manager, number)
    try:
        as_stored = checkpoint_forms.as_stored(wanted, wanted, form)
        args = ocp.args.Composite(backbone=_restore_args(as_stored))
        restored = manager.restore(number, args=args)["backbone"]
        restored = checkpoint_forms.as_wanted(restored, form, wanted)
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"the checkpoint in {workdir} is not of the network {config.model.network} that its "
            f"{CONFIG} names; "
            f"put the right {CONFIG} back: {error}"
        ) from error
    return config, restored["params"], restored["batch_stats"], number


def restore_centers(
    workdir: Path, config: Config, *, like: jax.Array, num_classes: int
) -> jax.Array:
    """The class centers of another run of the same classes.

    Args:
      workdir: of that run.
      config: of the run that wants them.
      like: an array of their shape and placement here.
      num_classes: C here.

    Raises:
      CheckpointError: the folder holds no checkpoint, or its centers do not fit.
    """
    manager = ocp.CheckpointManager(
        _folder(workdir), options=ocp.CheckpointManagerOptions(create=False)
    )
    number = manager.latest_step()
    head = read_config(workdir).head
    there = manager.restore(number, args=ocp.args.Composite(dataset=ocp.args.JsonRestore()))
    stored = (there["dataset"]["num_classes"], head.subcenters)
    if stored != (num_classes, config.head.subcenters):
        raise CheckpointError(
            f"finetune.centers kept: {workdir} has centers of {stored[0]} classes x {stored[1]}, "
            f"the training set here needs {num_classes} x {config.head.subcenters}: use "
            "--finetune.centers class_means or random"
        )
    wanted = {"centers": like}
    args = _restore_args(wanted, strict_shapes=False, partial=True)
    return manager.restore(number, args=ocp.args.Composite(training=args))["training"]["centers"]


def is_begun(workdir: Path) -> bool:
    """Whether a run has saved anything there that the same command resumes."""
    return _folder(workdir).is_dir() and bool(ocp.utils.checkpoint_steps(_folder(workdir)))


def _folder(workdir: Path) -> Path:
    return workdir.absolute() / "checkpoints"


def _split(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    fields = vars(state)
    backbone = {name: fields[name] for name in _BACKBONE_FIELDS}
    return backbone, {name: fields[name] for name in fields if name not in backbone}


def _restore_args(like: Any, *, strict_shapes: bool = True, partial: bool = False) -> Any:
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
