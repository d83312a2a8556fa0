"""Backbones: `build` makes one by name, as two pure functions on plain dicts of arrays."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx

from arcface_jax import plugins
from arcface_jax.config import Dtype, ModelConfig
from arcface_jax.errors import ConfigError
from arcface_jax.models import layers

Arrays = dict[str, jax.Array | np.ndarray]


class Backbone(NamedTuple):
    """A network as functions; all state is in dicts with insightface's dotted names.

    Names are insightface's `state_dict` names with another last component: `kernel`, `scale`,
    `bias`, `mean`, `var`, `slope`.
    """

    init: Callable[[int], tuple[Arrays, Arrays]]
    """seed -> (params, batch_stats), float32 NumPy arrays."""
    shapes: tuple[Arrays, Arrays]
    """(params, batch_stats) as views of one zero, for their shapes and types."""
    apply: Callable[..., tuple[jax.Array, Arrays]]
    """(params, batch_stats, images (B, 112, 112, 3) in [-1, 1], train=..., keys=...) -> (embeddings
    (B, D) float32, not normalized; batch_stats, updated if train). The (B,) random keys, one per
    image, are for training; only the vision transformers need them."""
    unrolled: bool = False
    """Whether `apply` runs the layers of stacks one by one instead of in a loop."""


def build(
    network: str,
    *,
    embedding_size: int = 512,
    bn_groups: int | str = 1,
    dtype: Dtype = "float32",
    options: plugins.Options = (),
    stacked: bool = True,
    gpu: float = 0,
    frozen_statistics: Collection[str] = (),
    measured: bool = False,
) -> Backbone:
    """Makes a backbone.

    Args:
      network: a name in `NETWORKS`, or `package.module:name` of a `MakeNetwork`.
      embedding_size: D.
      bn_groups: number of slices of a training batch with separate BatchNorm statistics; or the
        name of the mesh axis whose devices share a single slice.
      dtype: compute type of the convolutional part.
      options: settings of a network from outside the package.
      stacked: whether an IResNet that scans its blocks does so; otherwise each block has separate
        arrays (`stacks.restack` converts between the two), for comparison.
      gpu: compute capability of the NVIDIA GPUs that `apply` is for, such as 9.0; 0 for a program
        that runs on every platform. Arrays are the same, and results up to rounding.
      frozen_statistics: names of statistics that training uses without updating them.
      measured: whether `apply` in evaluation returns mean and variance of each BatchNorm's input
        instead of the statistics that it used.

    Raises:
      ConfigError: no network has that name, or it cannot be trained.
    """
    make = plugins.load(network, field="model.network", options=options)
    model = ModelConfig(
        network=network, embedding_size=embedding_size, dtype=dtype, options=tuple(options)
    )
    known = inspect.signature(make).parameters
    wanted: dict[str, Any] = ({} if stacked else {"stacked": False}) | ({"gpu": gpu} if gpu else {})
    form = {name: value for name, value in wanted.items() if name in known}

    def module(init: layers.Initializer) -> nnx.Module:
        return make(model, bn_groups=bn_groups, init=init, **form)

    built = module(layers.ShapeInitializer())
    _check(built, network)
    _freeze_statistics(built, frozen_statistics)
    for _, layer in nnx.iter_modules(built):
        if isinstance(layer, layers.BatchNorm):
            layer.measured = measured
    graph, *shapes = nnx.split(built, nnx.Param, nnx.BatchStat)
    paths = {_name(path): path for part in shapes for path, _ in nnx.to_flat_state(part)}

    def unflatten(arrays: Arrays) -> nnx.State:
        flat: Any = {paths[name]: array for name, array in arrays.items()}
        return nnx.from_flat_state(flat)

    def init(seed: int) -> tuple[Arrays, Arrays]:
        module_with_weights = module(layers.RandomInitializer(seed))
        _, params, batch_stats = nnx.split(module_with_weights, nnx.Param, nnx.BatchStat)
        return _as_numpy(_flatten(params)), _as_numpy(_flatten(batch_stats))

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
        if train or measured:
            return embeddings, _flatten(nnx.state(model, nnx.BatchStat))
        return embeddings, batch_stats

    params, batch_stats = (_zeros(_flatten(part)) for part in shapes)
    unrolled = bool(getattr(built, "unrolled", False))
    return Backbone(init, (params, batch_stats), apply, unrolled)


class MakeNetwork(Protocol):
    """Makes a Flax NNX module whose state is Param and BatchStat; named in `model.network`.

    The module is called as `module(x, train=..., keys=...)`: x is (B, 112, 112, 3) float32 RGB in
    [-1, 1], the result (B, D) float32, not normalized. In training `keys` are B random keys, one
    per image; in evaluation None. Attribute names, joined with dots, name its arrays in
    checkpoints, patterns and exports.
    """

    def __call__(
        self, model: ModelConfig, *, bn_groups: int | str, init: layers.Initializer
    ) -> nnx.Module:
        """Makes the module.

        Args:
          model: the section of the recipe: `embedding_size`, `dtype`, `options`.
          bn_groups: `groups` of every `layers.BatchNorm`.
          init: where first weights come from: its `normal` and `uniform`, or `init.rngs()` for
            Flax's own layers.

        If it also takes `gpu: float = 0`, that is the compute capability of the NVIDIA GPUs that
        train the network, for which it may apply the same arrays differently. A true attribute
        `unrolled` means that it applies the layers of its stacks one by one.
        """
        ...


NETWORKS = tuple(plugins.BUILT_IN["model.network"])

# Name of the bias of the layer whose output is the embedding, by family.
_LAST_BIASES = (
    *("features.bias", "features.layers.3.bias", "feature.3.bias", "fc.bias"),
    "model.head.fc.linear2.bias",
)


def embedding_size(arrays: Mapping[str, Any]) -> int | None:
    """Returns D from a network's parameters or torch `state_dict`; None without such a layer."""
    return next((len(arrays[name]) for name in _LAST_BIASES if name in arrays), None)


def _check(module: object, network: str) -> None:
    if not isinstance(module, nnx.Module):
        raise ConfigError(
            f"model.network {network} returned {type(module).__name__}; expected a flax.nnx.Module"
        )
    known = (nnx.Param, nnx.BatchStat)
    others = {
        _name(path): type(leaf).__name__
        for path, leaf in nnx.to_flat_state(nnx.state(module))
        if not isinstance(leaf, known)
    }
    if others:
        raise ConfigError(
            f"model.network {network} keeps state besides nnx.Param and nnx.BatchStat: "
            f"{', '.join(f'{name} ({kind})' for name, kind in others.items())}. Draw what training "
            "draws at random from the `keys` that the module is called with, one for each image"
        )


def _freeze_statistics(module: nnx.Module, names: Collection[str]) -> None:
    unfrozen = {name.rpartition(".")[0] for name in names}
    for path, layer in nnx.iter_modules(module):
        if isinstance(layer, layers.BatchNorm) and _name(path) in unfrozen:
            layer.frozen = True
            unfrozen.remove(_name(path))
    if unfrozen:
        raise ConfigError(
            f"finetune.frozen_statistics: {', '.join(sorted(unfrozen))} cannot be frozen; expected "
            "layers of arcface_jax.models.layers.BatchNorm"
        )


def _as_numpy(arrays: Arrays) -> Arrays:
    return {name: np.asarray(array) for name, array in arrays.items()}


def _zeros(arrays: Arrays) -> Arrays:
    return {
        name: np.broadcast_to(np.zeros((), array.dtype), array.shape)
        for name, array in arrays.items()
    }


def _flatten(state: nnx.State) -> Arrays:
    return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
