"""Import an ONNX file as a trainable network.

The graph's layers are compared one by one with each network's (`layer_sequence`), its arrays
get the names of the network that fits, BatchNorms that an exporter folded are put back, and the
embeddings are compared with ONNX Runtime's on the file before anything is used.

A BatchNorm that was folded into the layer before it has lost its mean and variance. It is restored
with mean 0 and variance 1 - epsilon, which `training.folded_statistics` recognizes and replaces by
measured statistics before the first training step.

Folding has multiplied the layer's kernel by scale / deviation. Once it is normalized again, the
kernel's norm does not affect the layer's output, but it determines how far a training step rotates
the kernel: in proportion to learning rate / norm^2 (van Laarhoven, arXiv 1706.05350). Folded
kernels have about a third of the norm of trained ones, so at the same learning rate they would
rotate eight times as fast. Each output channel is therefore rescaled to the norm in a fresh
network, and the BatchNorm's scale reverts the factor.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from arcface_jax import config
from arcface_jax.config.choices import OnnxOptions
from arcface_jax.convert import onnx_layers, parity, torch_layers, twins, weights
from arcface_jax.convert.layer_sequence import Layer
from arcface_jax.convert.onnx_layers import BatchNormArrays, OnnxLayers, UnknownGraph
from arcface_jax.convert.onnx_runner import OnnxModel, onnx_embedder
from arcface_jax.convert.torch_layers import BatchNormName
from arcface_jax.convert.weight_files import StateDict
from arcface_jax.errors import UserError
from arcface_jax.models import preprocess, registry
from arcface_jax.models.registry import Arrays
from arcface_jax.training import checkpoint
from arcface_jax.training.network import Network

FLOAT16_TOLERANCE = 2e-2
"""Tolerance for files with float16 weights, because ONNX Runtime then computes in float16."""
_LAYERS_OF_OTHERS = 1000
# Enough images to tell two computations apart, in a quarter of the time that 16 take.
_FACES = 4
# Two ways to write the middle of 0 .. 255; zero padding rules out others.
_SAME_MEAN = 1e-3


class Imported(NamedTuple):
    """A backbone from an ONNX file."""

    network: str
    params: Arrays
    batch_stats: Arrays
    folded: int
    """Number of BatchNorms that were restored without statistics."""
    error: float
    """Largest relative difference from ONNX Runtime's embeddings of the file."""
    notes: tuple[str, ...]
    """Findings and assumptions, one sentence each."""


class _Candidate(NamedTuple):
    """A network compared with the file."""

    network: str
    layers: list[Layer]
    equal: int
    """Number of layers that agree before the first that does not."""


def load(path: Path, network: str | None = None, *, options: OnnxOptions | None = None) -> Imported:
    """Reads the network in an ONNX file, in the form that this project trains.

    Args:
      path: the file.
      network: its network; by default found by the graph.
      options: known properties of its input; the others are read from metadata and graph.

    Raises:
      UserError: the packages for ONNX are missing, the graph is not a network of the registry
        (naming the first layer that differs), it needs pixels of another mean, or the embeddings
        differ.
    """
    if network in registry.NETWORKS and not twins.has_layer_sequence(network):
        raise UnknownGraph(
            f"{network} cannot be read from ONNX, where parts of its weights are multiplied with "
            f"constants: import the .pth or safetensors file that {path} was made from"
        )
    found = onnx_layers.read(path)
    chosen = _choose(path, found.layers, [network] if network else _networks(found.layers))
    model = onnx_embedder(path, options=options or OnnxOptions())
    first = _first_kernel(path, found, model)
    state, folded = _state(path, chosen, found.layers, first)
    params, batch_stats = weights.from_state_dict(state, chosen.network, source=str(path))
    error = _check(path, found, model, (chosen.network, params, batch_stats))
    notes = [f"{chosen.network}, by its {len(found.layers)} layers"]
    if folded:
        notes.append(
            f"{folded} BatchNorms are folded into other layers and have no statistics; training "
            "takes them from its first images (docs/finetuning.md)"
        )
    if model.guessed:
        notes.append(model.guessed)
    return Imported(chosen.network, params, batch_stats, folded, error, tuple(notes))


def convert(
    path: Path, output: Path, network: str | None = None, *, options: OnnxOptions | None = None
) -> Imported:
    """Converts an ONNX file to a workdir, to evaluate, export or fine-tune.

    Args:
      path: as `load`.
      output: the workdir, a new or empty folder.
      network: as `load`.
      options: as `load`.

    Raises:
      UserError: as `load`, or the workdir is not empty.
    """
    checkpoint.require_empty(output)
    made = load(path, network, options=options)
    model = config.ModelConfig(
        network=cast("config.Network", made.network),
        embedding_size=registry.embedding_size(made.params) or 512,
        dtype="float32",
    )
    run = config.Config(workdir=str(output), model=model)
    checkpoint.save_weights(run, made.params, made.batch_stats)
    return made


def _networks(layers: list[Layer]) -> list[str]:
    """Returns the networks to compare with.

    r2060 has 4,000 layers and takes longer to trace than all others, so short files skip it.
    """
    found = [name for name in registry.NETWORKS if twins.has_layer_sequence(name)]
    return [name for name in found if name != "r2060" or len(layers) > _LAYERS_OF_OTHERS]


def _choose(path: Path, layers: list[Layer], networks: Sequence[str]) -> _Candidate:
    """Finds the network with the file's layers.

    Raises:
      UnknownGraph: no network matches; names the one that agrees longest.
    """
    nearest = None
    for network in networks:
        candidate = _compare(network, layers)
        if candidate.equal == len(layers) == len(candidate.layers):
            return candidate
        if nearest is None or candidate.equal > nearest.equal:
            nearest = candidate
    assert nearest is not None
    theirs, ours = (_at(each, nearest.equal) for each in (layers, nearest.layers))
    raise UnknownGraph(
        f"{path} is not {'any network of the registry' if len(networks) > 1 else networks[0]}: of "
        f"its {len(layers)} layers the first {nearest.equal} are as in {nearest.network}, then it "
        f"has {theirs} where {nearest.network} has {ours}. Only networks that `arcface-jax models` "
        "lists can be trained"
    )


def _at(layers: list[Layer], position: int) -> str:
    if position == len(layers):
        return "its end"
    layer = layers[position]
    return f"{layer} at {layer.where}" if layer.where else str(layer)


def _compare(network: str, layers: list[Layer]) -> _Candidate:
    twin, size = twins.require(network), _embedding_size(layers)
    module = torch_layers.build_on_meta(twin, network, embedding_size=size)
    ours = torch_layers.layers(module)
    pairs = zip(layers, ours, strict=False)
    equal = next((n for n, (a, b) in enumerate(pairs) if not _agree(a, b)), None)
    return _Candidate(network, ours, min(len(layers), len(ours)) if equal is None else equal)


def _embedding_size(layers: list[Layer]) -> int:
    return next((layer.shape[0] for layer in reversed(layers) if layer.shape), 0)


def _agree(theirs: Layer, ours: Layer) -> bool:
    """Returns whether the arrays of a file's layer fit the network's layer."""
    has_place = ours.batchnorm or not (theirs.batchnorm or _has_bias(theirs)) or ours.bias
    norm_has_place = ours.batchnorm or not theirs.batchnorm
    return theirs.form == ours.form and bool(has_place and norm_has_place)


def _has_bias(layer: Layer) -> bool:
    return layer.bias is not None and bool(np.any(layer.bias))


def _first_kernel(path: Path, found: OnnxLayers, model: OnnxModel) -> np.ndarray:
    """Converts the first convolution to RGB and (x - 127.5) / 127.5.

    Zero padding stands for the mean, which therefore has to be 127.5.
    """
    outside = model.input
    mean = outside.mean + outside.scale * found.mean
    scale = outside.scale * found.scale
    if abs(mean - preprocess.MEAN) > _SAME_MEAN * preprocess.SCALE:
        raise UserError(
            f"{path} takes (x - {mean:.4g}) / {scale:.4g}; expected a mean of {preprocess.MEAN}: "
            "zero padding stands for the mean, so another mean cannot be converted. If it was "
            "guessed wrongly, set --mean and --scale"
        )
    kernel = np.asarray(found.layers[0].weight, np.float64) * (preprocess.SCALE / scale)
    return kernel[:, ::-1] if outside.color_order == "BGR" else kernel


def _state(
    path: Path, chosen: _Candidate, layers: list[Layer], first: np.ndarray
) -> tuple[StateDict, int]:
    """Returns the file's arrays by insightface's names, and the number of BatchNorms restored."""
    state: dict[str, np.ndarray] = {}
    folded: list[Layer] = []
    for number, (theirs, ours) in enumerate(zip(layers, chosen.layers, strict=True)):
        if theirs.weight is not None:
            state[ours.weight] = first if number == 0 else theirs.weight
        bias = 0.0 if theirs.bias is None else theirs.bias
        if ours.bias:
            state[ours.bias] = np.broadcast_to(bias, theirs.shape[:1] or ())
            bias = 0.0
        if ours.batchnorm:
            if theirs.batchnorm is None:
                folded.append(ours)
            norm = theirs.batchnorm or _identity(ours.batchnorm, theirs.shape[0])
            state |= _batch_norm(norm, ours.batchnorm, bias, is_folded=theirs.batchnorm is None)
    if folded:
        network = registry.build(chosen.network, embedding_size=_embedding_size(layers))
        fresh = weights.to_state_dict(*network.init(0))
        state |= _with_fresh_lengths(state, folded, fresh)
    state |= _untold(chosen)
    return {name: _tensor(array) for name, array in state.items()}, len(folded)


def _with_fresh_lengths(
    state: Mapping[str, np.ndarray], folded: Sequence[Layer], fresh: StateDict
) -> dict[str, np.ndarray]:
    """Rescales the kernels of folded layers: each output channel gets a fresh network's norm."""
    changed: dict[str, np.ndarray] = {}
    for layer in folded:
        kernel = np.asarray(state[layer.weight], np.float64)
        scale = f"{layer.batchnorm.name}.weight"
        target = np.sqrt(np.mean(_lengths(fresh[layer.weight].numpy()) ** 2))
        lengths = _lengths(kernel)
        factor = np.divide(target, lengths, out=np.ones_like(lengths), where=lengths > 0)
        changed[layer.weight] = kernel * factor.reshape(-1, *[1] * (kernel.ndim - 1))
        if layer.bias:
            changed[layer.bias] = state[layer.bias] * factor
        changed[scale] = state[scale] / factor
    return changed


def _lengths(kernel: np.ndarray) -> np.ndarray:
    """Returns the norm of each output channel, (output channels,) float64."""
    return np.linalg.norm(np.asarray(kernel, np.float64).reshape(len(kernel), -1), axis=1)


def _identity(name: BatchNormName, channels: int) -> BatchNormArrays:
    ones, zeros = np.ones(channels), np.zeros(channels)
    return BatchNormArrays(ones, zeros, zeros, ones - name.epsilon, name.epsilon)


def _batch_norm(
    norm: BatchNormArrays, name: BatchNormName, bias: Any, *, is_folded: bool
) -> dict[str, np.ndarray]:
    """Makes a BatchNorm with the network's epsilon, after a layer that has lost its bias."""
    scale, shift, mean, var = (np.asarray(array, np.float64) for array in norm[:4])
    if is_folded:
        shift = shift + bias
    else:
        mean = mean - bias
    moved = var + norm.epsilon - name.epsilon
    kept = np.maximum(moved, 0)  # the file's epsilon may be smaller than the network's
    scale = scale * np.sqrt((kept + name.epsilon) / (var + norm.epsilon))
    values = {"weight": scale, "bias": shift, "running_mean": mean, "running_var": kept}
    return {f"{name.name}.{last}": array for last, array in values.items()}


def _untold(chosen: _Candidate) -> dict[str, np.ndarray]:
    """Returns arrays that inference does not use, so files lack them: the mask token of
    training.
    """
    width = next((layer.shape for layer in chosen.layers if layer.weight == "pos_embed"), None)
    return {"mask_token": np.zeros((1, 1, width[-1]))} if width else {}


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32, order="C"))


def _check(
    path: Path, found: OnnxLayers, model: OnnxModel, weights: tuple[str, Arrays, Arrays]
) -> float:
    """Returns the largest relative difference from the file's embeddings.

    Raises:
      UserError: they differ by more than rounding, or weights are not finite.
    """
    faces = parity.drawn_faces(_FACES)
    network = Network(*weights, batch_size=len(faces), devices=1)
    parity.require_finite(network)
    error = parity.largest_error(network(faces), model(faces))
    bound = FLOAT16_TOLERANCE if found.is_float16 else parity.TOLERANCE
    if not error <= bound:
        raise UnknownGraph(
            f"{path} has the layers of {weights[0]} and other embeddings: ONNX Runtime's differ by "
            f"{error:.1e} (relative), more than {bound:.0e}. The graph computes something that the "
            "network does not, such as a normalization of its output"
        )
    return error
