"""What a fine-tuned run begins with: the weights of another, and class centers for its data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from arcface_jax.config import Config
from arcface_jax.data import pipeline
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.data.source import Source
from arcface_jax.errors import ConfigError
from arcface_jax.heads import block_passes
from arcface_jax.heads import centers as class_centers
from arcface_jax.models.registry import Arrays
from arcface_jax.runtime import devices as meshes
from arcface_jax.runtime.devices import AXIS
from arcface_jax.training import saved_runs, step
from arcface_jax.training.step import TrainState

Weights = tuple[Arrays, Arrays]
"""params and batch_stats by dotted name."""


def weights(config: Config, given: Weights | None) -> Weights | None:
    """The weights that a run begins with; None where they are random, or it has begun already.

    Args:
      config: whose `init_from` may name the workdir of another run.
      given: the arrays, where `init_from` is a file of another program, or empty.

    Raises:
      ConfigError: naming every array that the network lacks, does not know, or has in another
        shape.
      CheckpointError: the other run cannot be read.
    """
    source = Path(config.init_from)
    if saved_runs.is_begun(Path(config.workdir)) or not (config.init_from or given):
        return None
    if given is None:
        if not source.is_dir():
            raise ConfigError(
                f"init_from {source} is not the workdir of a run, and its arrays were not handed "
                "over: train(config, init=arcface_jax.convert.weights.load(path, network)), as "
                "scripts/train.py does"
            )
        _, params, batch_stats, _ = saved_runs.restore_backbone(source)
        given = (params, batch_stats)
    elif config.finetune.centers == "kept":
        raise ConfigError(
            f"finetune.centers kept: init_from {config.init_from} is not the workdir of a run, and "
            "holds no class centers; use --finetune.centers class_means or random"
        )
    _check(given, config)
    return given


def _check(given: Weights, config: Config) -> None:
    wanted = step.backbone(config).shapes
    here: dict[str, Any] = {**wanted[0], **wanted[1]}
    there: dict[str, Any] = {**given[0], **given[1]}
    problems = {
        "missing": [name for name in here if name not in there],
        "unexpected": [name for name in there if name not in here],
        "of another shape": [
            f"{name} {there[name].shape} instead of {here[name].shape}"
            for name in here
            if name in there and there[name].shape != here[name].shape
        ],
    }
    if any(problems.values()):
        raise ConfigError(
            f"the weights of init_from {config.init_from} are not those of model.network "
            f"{config.model.network} with model.embedding_size {config.model.embedding_size}: give "
            "the network that they belong to"
            + "".join(f"\n{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        )


def centers(config: Config, state: TrainState, source: Source, *, mesh: Mesh) -> jax.Array:
    """The first class centers, as `finetune.centers` says, placed as those of the state.

    Args:
      config: the run.
      state: with the backbone to begin with and random centers, which are used up.
      source: the training set.
      mesh: the devices.

    Raises:
      DataError: an image cannot be read.
      CheckpointError: there are no centers of these classes to keep.
    """
    kind = config.finetune.centers
    if kind == "random":
        return state.centers
    if kind == "kept":
        return saved_runs.restore_kept_centers(
            Path(config.init_from), config, like=state.centers, num_classes=source.num_classes
        )
    return _class_means(config, state, source, mesh=mesh)


def _class_means(config: Config, state: TrainState, source: Source, *, mesh: Mesh) -> jax.Array:
    """(C_padded, D): the direction of each class's mean of normalized embeddings.

    The length is that of the random centers, sqrt(D) times their deviation, on which the effect
    of the learning rate depends. A class without images keeps its random center. Every image is
    embedded once, not mirrored; beside the centers there is one more array of their size.
    """
    embed = step.make_embed(step.backbone(config))
    split, everywhere = P(AXIS), meshes.split(mesh)
    add = jax.jit(
        jax.shard_map(
            _add_on_one_device,
            mesh=mesh,
            in_specs=(split, split, split),
            out_specs=split,
            check_vma=False,
        ),
        donate_argnums=0,
    )
    sums = jax.jit(jnp.zeros_like, out_shardings=everywhere)(state.centers)
    for batch in _every_image_once(source, config):
        on_devices = meshes.to_devices(batch, mesh)
        embeddings = embed(state.params, state.batch_stats, on_devices["image"])
        # Waited for, that no batches pile up in the devices' memory.
        sums = jax.block_until_ready(add(sums, embeddings, on_devices["label"]))
    length = class_centers.INIT_STD * config.model.embedding_size**0.5

    def finish(sums: jax.Array, random: jax.Array) -> jax.Array:
        norm = jnp.linalg.norm(sums, axis=1, keepdims=True)
        return jnp.where(norm > 0, length * sums / jnp.maximum(norm, 1e-12), random)

    return jax.jit(finish, donate_argnums=0, out_shardings=everywhere)(sums, state.centers)


def _add_on_one_device(sums: jax.Array, embeddings: jax.Array, labels: jax.Array) -> jax.Array:
    """Adds the batch's normalized embeddings to the rows of the classes that lie here."""
    unit = lax.all_gather(block_passes.normalize(embeddings)[0], AXIS, tiled=True)
    row = lax.all_gather(labels, AXIS, tiled=True) - lax.axis_index(AXIS) * len(sums)
    here = (row >= 0) & (row < len(sums))
    return sums.at[jnp.where(here, row, len(sums))].add(unit, mode="drop")


def _every_image_once(source: Source, config: Config) -> Iterator[dict[str, np.ndarray]]:
    """This host's part of batches in the order of the source; what fills the last has label -1."""
    size = config.evaluation.batch_size
    share = size // jax.process_count()
    first = share * jax.process_index()

    def read(number: int) -> dict[str, np.ndarray]:
        begin = number * size + first
        images = np.zeros((share, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        labels = np.full(share, -1, np.int32)
        rows = np.arange(min(share, len(source) - begin))
        for row, _ in source.load(begin + rows, rows, images, labels):  # training tells of it
            labels[row] = -1
        return {"image": images, "label": labels}

    options = pipeline.read_options(config.data)
    numbers = grain.MapDataset.range(-(-len(source) // size))
    return iter(numbers.map(read).to_iter_dataset(options))
