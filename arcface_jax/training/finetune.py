"""Fine-tuning initialization: backbone weights and class centers."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from arcface_jax.config import Config, DataConfig, ModelConfig
from arcface_jax.data import label_map, opening, pipeline
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.data.source import Source
from arcface_jax.errors import ConfigError
from arcface_jax.heads import centers as class_centers
from arcface_jax.heads.block_forms import normalize
from arcface_jax.models import registry
from arcface_jax.models.registry import Arrays
from arcface_jax.runtime import devices as meshes
from arcface_jax.runtime.devices import AXIS
from arcface_jax.training import saved_runs, step
from arcface_jax.training.step import TrainState

Weights = tuple[Arrays, Arrays]
"""params and batch_stats by dotted name."""


def weights(source: Path | Weights, model: ModelConfig, *, name: str) -> Weights:
    """Reads the backbone weights to start from, and checks them against the network.

    Args:
      source: the workdir of another run, or the arrays.
      model: network and embedding size of the run.
      name: `init_from` as the user wrote it, for errors.

    Raises:
      ConfigError: naming every array that is missing, unexpected or of another shape.
      CheckpointError: the other run cannot be read.
    """
    if isinstance(source, Path):
        _, params, batch_stats, _ = saved_runs.restore_backbone(source)
        source = (params, batch_stats)
    wanted = registry.build(
        model.network, embedding_size=model.embedding_size, options=model.options
    ).shapes
    expected: dict[str, Any] = {**wanted[0], **wanted[1]}
    given: dict[str, Any] = {**source[0], **source[1]}
    problems = {
        "missing": [array for array in expected if array not in given],
        "unexpected": [array for array in given if array not in expected],
        "of another shape": [
            f"{array} {given[array].shape} instead of {expected[array].shape}"
            for array in expected
            if array in given and given[array].shape != expected[array].shape
        ],
    }
    if any(problems.values()):
        raise ConfigError(
            f"the weights in init_from {name} do not fit model.network {model.network} with "
            f"model.embedding_size {model.embedding_size}: set both to match the checkpoint"
            + "".join(f"\n{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        )
    return source


def centers(config: Config, state: TrainState, source: Source, *, mesh: Mesh) -> jax.Array:
    """Returns the first class centers by `finetune.centers`, placed like the state's.

    Args:
      config: the run.
      state: has the initial backbone and random centers.
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
            Path(config.init_from),
            like=state.centers,
            num_classes=source.num_classes,
            subcenters=config.head.subcenters,
            label_map=label_map.read(opening.folder_with(config.data.path, label_map.FILE)),
        )
    batches = _every_image_once(source, config.data, batch_size=config.evaluation.batch_size)
    embed = step.make_embed(step.backbone(config))
    return _class_means(
        partial(embed, state.params, state.batch_stats), batches, random=state.centers, mesh=mesh
    )


def _class_means(
    embed: Callable[[jax.Array], jax.Array],
    batches: Iterator[dict[str, np.ndarray]],
    *,
    random: jax.Array,
    mesh: Mesh,
) -> jax.Array:
    """Returns (C_padded, D): the direction of each class's mean normalized embedding.

    The norm equals the random centers', sqrt(D) times their standard deviation, because the effect
    of the learning rate depends on it. A class without images keeps its random center. Every image
    is embedded once, without its flip. Memory: one more array of the centers' size.
    """
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
    sums = jax.jit(jnp.zeros_like, out_shardings=everywhere)(random)
    for batch in batches:
        on_devices = meshes.to_devices(batch, mesh)
        embeddings = embed(on_devices["image"])
        # Wait, or batches would pile up in the devices' memory.
        sums = jax.block_until_ready(add(sums, embeddings, on_devices["label"]))
    finish = jax.jit(class_centers.of_directions, donate_argnums=0, out_shardings=everywhere)
    return finish(sums, random)


def _add_on_one_device(sums: jax.Array, embeddings: jax.Array, labels: jax.Array) -> jax.Array:
    """Adds the batch's normalized embeddings to the rows of this device's classes."""
    unit = lax.all_gather(normalize(embeddings)[0], AXIS, tiled=True)
    row = lax.all_gather(labels, AXIS, tiled=True) - lax.axis_index(AXIS) * len(sums)
    here = (row >= 0) & (row < len(sums))
    return sums.at[jnp.where(here, row, len(sums))].add(unit, mode="drop")


def _every_image_once(
    source: Source, data: DataConfig, *, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this host's part of each batch, in the order of the source; padding has label -1."""
    share = batch_size // jax.process_count()
    first = share * jax.process_index()

    def read(number: int) -> dict[str, np.ndarray]:
        begin = number * batch_size + first
        images = np.zeros((share, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        labels = np.full(share, -1, np.int32)
        rows = np.arange(min(share, len(source) - begin))
        for row, _ in source.load(begin + rows, rows, images, labels):  # training reports them
            labels[row] = -1
        return {"image": images, "label": labels}

    options = pipeline.read_options(data)
    numbers = grain.MapDataset.range(-(-len(source) // batch_size))
    return iter(numbers.map(read).to_iter_dataset(options))
