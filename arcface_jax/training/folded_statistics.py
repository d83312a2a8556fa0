"""Statistics for BatchNorms that were folded into the layers before them when a file was exported.

Such a BatchNorm comes back from an ONNX file as the identity. In evaluation that is exact. In
training it would divide by each batch's standard deviation and multiply by 1, which loses the
signal's magnitude and with it what the network has learned. So mean and variance are measured by
one evaluation pass over images of the training set, and scale and bias are set to leave evaluation
unchanged: scale = sqrt(var + epsilon), bias = bias + mean.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils

from arcface_jax.config import Config
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.data.source import Source
from arcface_jax.errors import DataError
from arcface_jax.models import preprocess, registry
from arcface_jax.models.registry import Arrays
from arcface_jax.runtime import launch
from arcface_jax.training import name_rules
from arcface_jax.training.finetune import Weights

IMAGES = 512
_BATCH = 64
# An identity has variance 1 - epsilon; fresh statistics are exactly 1.
_LARGEST_EPSILON = 1e-3
_DECIMALS = 6


def folded(batch_stats: Arrays) -> list[str]:
    """Returns the names of the BatchNorms whose statistics are an identity's."""
    layers = [name.removesuffix(".mean") for name in batch_stats if name.endswith(".mean")]
    return [name for name in layers if _is_identity(batch_stats, name)]


def _is_identity(batch_stats: Arrays, layer: str) -> bool:
    mean, var = (np.asarray(batch_stats[f"{layer}.{last}"]) for last in ("mean", "var"))
    return bool(not mean.any() and ((var >= 1 - _LARGEST_EPSILON) & (var < 1)).all())


def complete(weights: Weights, config: Config, source: Source) -> tuple[Weights, list[str]]:
    """Sets statistics in the BatchNorms that lack them, except frozen ones; a collective operation.

    Args:
      weights: initial weights of the run.
      config: the run.
      source: its training set, of which 512 evenly spaced images are read.

    Returns:
      The weights, with unchanged embeddings, and a message if there were such BatchNorms.

    Raises:
      DataError: none of these images can be read.
    """
    params, batch_stats = weights
    frozen = name_rules.select(
        config.finetune.frozen_statistics, list(batch_stats), field="finetune.frozen_statistics"
    )
    missing = [name for name in folded(batch_stats) if f"{name}.mean" not in frozen]
    if not missing:
        return weights, []
    with launch.failing_together():
        images = _images(source, config.data.path)
    measured = _of_first_host(_measure(weights, config, images))
    params, batch_stats = dict(params), dict(batch_stats)
    for layer in missing:
        mean, var = (measured[f"{layer}.{last}"] for last in ("mean", "var"))
        epsilon = np.round(1 - np.asarray(batch_stats[f"{layer}.var"], np.float64), _DECIMALS)
        where_scale = params if f"{layer}.scale" in params else batch_stats
        where_bias = params if f"{layer}.bias" in params else batch_stats
        scale = np.asarray(where_scale[f"{layer}.scale"], np.float64)
        bias = np.asarray(where_bias[f"{layer}.bias"], np.float64) + scale * mean
        where_scale[f"{layer}.scale"] = (scale * np.sqrt(var + epsilon)).astype(np.float32)
        where_bias[f"{layer}.bias"] = bias.astype(np.float32)
        batch_stats[f"{layer}.mean"] = mean.astype(np.float32)
        batch_stats[f"{layer}.var"] = var.astype(np.float32)
    return (params, batch_stats), [
        f"{len(missing)} BatchNorm layers were folded in init_from {config.init_from}: their "
        f"statistics were measured on {len(images)} training images"
    ]


def _images(source: Source, name: str) -> np.ndarray:
    """Reads evenly spaced images, (n, 112, 112, 3) uint8, skipping unreadable ones."""
    numbers = np.unique(np.linspace(0, len(source) - 1, IMAGES).astype(np.int64))
    images = np.zeros((len(numbers), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    rows = np.arange(len(numbers))
    bad = {row for row, _ in source.load(numbers, rows, images, np.zeros(len(numbers), np.int32))}
    readable = images[[row for row in rows.tolist() if row not in bad]]
    if not len(readable):
        raise DataError(f"none of {len(numbers)} images of {name} can be read: check the data")
    return readable


def _of_first_host(measured: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the first host's float64 arrays, bit for bit: another device may sum differently."""
    if jax.process_count() == 1:
        return measured
    bits = {name: array.view(np.uint32) for name, array in measured.items()}
    found = multihost_utils.broadcast_one_to_all(bits)
    return {name: np.asarray(array).view(np.float64) for name, array in found.items()}


def _measure(weights: Weights, config: Config, images: np.ndarray) -> dict[str, np.ndarray]:
    """Measures mean and variance of each BatchNorm's input, by name, in float64."""
    model = config.model
    network = registry.build(
        model.network, embedding_size=model.embedding_size, options=model.options, measured=True
    )

    @jax.jit
    def run(params: Arrays, batch_stats: Arrays, batch: jax.Array) -> Arrays:
        with jax.default_matmul_precision("highest"):  # as `step.make_embed`
            return network.apply(params, batch_stats, preprocess.normalize(batch), train=False)[1]

    sums: dict[str, np.ndarray] = {}
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        found = {n: np.asarray(x, np.float64) for n, x in run(*weights, batch).items()}
        for name in (n for n in found if n.endswith(".mean")):
            var = name.removesuffix("mean") + "var"
            moments = {name: found[name], var: found[var] + found[name] ** 2}
            for key, moment in moments.items():
                sums[key] = sums.get(key, 0) + moment * (len(batch) / len(images))
    for name in [n for n in sums if n.endswith(".var")]:
        mean = sums[name.removesuffix("var") + "mean"]
        sums[name] = np.maximum(sums[name] - mean**2, 0)
    return sums
