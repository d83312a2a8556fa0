"""Backbones: `build` makes one by name, as two pure functions on plain dicts of arrays."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arcface_jax.errors import ConfigError
from arcface_jax.models import iresnet, layers, mobilefacenet, vit

Arrays = dict[str, jax.Array | np.ndarray]


class Backbone(NamedTuple):
    """A network as functions; all state is in dicts with insightface's dotted names.

    A name is insightface's `state_dict` name with another last word: `kernel`, `scale`, `bias`,
    `mean`, `var`, `slope`.
    """

    init: Callable[[int], tuple[Arrays, Arrays]]
    """seed -> (params, batch_stats), float32 NumPy arrays."""
    shapes: tuple[Arrays, Arrays]
    """(params, batch_stats) as views of one zero, for their shapes and types."""
    apply: Callable[..., tuple[jax.Array, Arrays]]
    """(params, batch_stats, images (B, 112, 112, 3) in [-1, 1], train=..., keys=...) -> (embeddings
    (B, D) float32, not normalized; batch_stats, moved if train). The (B,) keys, one for each image,
    are for what training draws at random; the vision transformers alone need them."""


def build(
    network: str,
    *,
    embedding_size: int = 512,
    bn_groups: int | str = 1,
    dtype: str = "float32",
    stacked: bool = True,
    frozen_statistics: Collection[str] = (),
) -> Backbone:
    """Makes a backbone.

    Args:
      network: a name in `NETWORKS`.
      embedding_size: D.
      bn_groups: slices of a training batch with BatchNorm statistics of their own; or the name of
        the mesh axis over whose devices a single slice goes.
      dtype: compute type of the convolutional part.
      stacked: whether an IResNet that scans its blocks does so; without, each block has arrays of
        its own (`stacks.restack` goes from one form to the other), for comparison.
      frozen_statistics: names of statistics that training uses and does not move.

    Raises:
      ConfigError: no network has that name.
    """
    if network not in NETWORKS:
        raise ConfigError(f"unknown network {network!r}: use one of {', '.join(NETWORKS)}")

    settings: dict[str, Any] = {
        "embedding_size": embedding_size,
        "bn_groups": bn_groups,
        "dtype": jnp.dtype(dtype),
    }

    def module(init: layers.Initializer) -> nnx.Module:
        if network in vit.ARCHITECTURES:
            return vit.VisionTransformer(vit.ARCHITECTURES[network], init=init, **settings)
        if network in mobilefacenet.ARCHITECTURES:
            return mobilefacenet.MobileFaceNet(
                mobilefacenet.ARCHITECTURES[network],
                init=init,
                **settings,
            )
        architecture = iresnet.ARCHITECTURES[network]
        if not stacked:
            architecture = replace(architecture, blocks_are="unrolled")
        return iresnet.IResNet(architecture, init=init, **settings)

    built = module(layers.ShapeInitializer())
    _freeze_statistics(built, frozen_statistics)
    graph, *shapes = nnx.split(built, nnx.Param, nnx.BatchStat)
    paths = {_name(path): path for part in shapes for path, _ in nnx.to_flat_state(part)}

    def unflatten(arrays: Arrays) -> nnx.State:
        flat: Any = {paths[name]: array for name, array in arrays.items()}
        return nnx.from_flat_state(flat)

    def init(seed: int) -> tuple[Arrays, Arrays]:
        module_with_weights = module(layers.RandomInitializer(seed))
        _, params, batch_stats = nnx.split(module_with_weights, nnx.Param, nnx.BatchStat)
        return _flatten(params), _flatten(batch_stats)

    def apply(
        params: Arrays,
        batch_stats: Arrays,
        images: jax.Array,
        *,
        train: bool,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, Arrays]:
        model: Any = nnx.merge(graph, unflatten(params), unflatten(batch_stats))
        embeddings = model(images, train=train, keys=keys)
        return embeddings, _flatten(nnx.state(model, nnx.BatchStat)) if train else batch_stats

    params, batch_stats = map(_flatten, shapes)
    return Backbone(init, (params, batch_stats), apply)


NETWORKS = (*iresnet.ARCHITECTURES, *mobilefacenet.ARCHITECTURES, *vit.ARCHITECTURES)

# What each family calls the bias of the BatchNorm whose output is the embedding.
_LAST_BIASES = ("features.bias", "features.layers.3.bias", "feature.3.bias")


def embedding_size(arrays: Mapping[str, Any]) -> int | None:
    """D of a network's parameters or torch `state_dict`; None where there is no such layer."""
    return next((len(arrays[name]) for name in _LAST_BIASES if name in arrays), None)


def _freeze_statistics(module: nnx.Module, names: Collection[str]) -> None:
    layers_named = {name.rpartition(".")[0] for name in names}
    for path, layer in nnx.iter_modules(module):
        if isinstance(layer, layers.BatchNorm) and _name(path) in layers_named:
            layer.frozen = True


def _flatten(state: nnx.State) -> Arrays:
    return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
