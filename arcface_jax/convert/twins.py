"""Find the torch module of a network."""

from collections.abc import Callable

import torch

from arcface_jax import plugins
from arcface_jax.convert import torch_edgeface, torch_iresnet, torch_mobilefacenet, torch_vit
from arcface_jax.errors import UserError
from arcface_jax.models import edgeface, iresnet, mobilefacenet, registry, vit

Twin = Callable[..., torch.nn.Module]

# The last entry is an array that every network of the family has, and no other network.
_FAMILIES = (
    (iresnet.ARCHITECTURES, torch_iresnet.build, "layer1.0.conv1.weight"),
    (mobilefacenet.ARCHITECTURES, torch_mobilefacenet.build, "features.layers.3.bias"),
    (vit.ARCHITECTURES, torch_vit.build, "patch_embed.proj.weight"),
    (edgeface.ARCHITECTURES, torch_edgeface.build, "model.head.fc.linear2.bias"),
)


def find(network: str) -> Twin | None:
    """Returns the function that makes a network's twin; None for a network without one.

    A network from outside the package may provide it as the attribute `torch_twin` of its function.
    """
    for architectures, build_family, _ in _FAMILIES:
        if network in architectures:
            return build_family
    return getattr(plugins.load(network, field="model.network"), "torch_twin", None)


def has_layer_sequence(network: str) -> bool:
    """Returns whether `torch_layers` supports the network, as the import of ONNX files requires.

    EdgeFace is not supported: it multiplies and concatenates branches, and its ONNX file has the
    projected positions instead of the projection's weights.
    """
    return network not in edgeface.ARCHITECTURES and find(network) is not None


def sign(network: str) -> str | None:
    """Returns the name of an array that identifies a built-in network's family; None for a
    plug-in.
    """
    return next((name for networks, _, name in _FAMILIES if network in networks), None)


def missing(network: str) -> str:
    """Returns the message for a network without a twin."""
    return (
        f"{network} has no torch twin, so it has no form for PyTorch: export ONNX (pip install "
        "'arcface-jax[jax2onnx]') or StableHLO, or give the function that makes the network "
        "the attribute torch_twin (docs/extending.md)"
    )


def require(network: str) -> Twin:
    """Returns `find(network)`, or raises without a twin.

    Raises:
      UserError: the network has no twin.
    """
    twin = find(network)
    if twin is None:
        raise UserError(missing(network))
    return twin


def build(network: str, *, embedding_size: int = 512) -> torch.nn.Module:
    """Makes the twin of `arcface_jax.models.registry.build(network)`, without its weights.

    Its `state_dict` has insightface's names.

    Raises:
      UserError: the network has no twin.
    """
    return require(network)(network, embedding_size=embedding_size)


def load(
    network: str, state: dict[str, torch.Tensor], *, embedding_size: int | None = None
) -> torch.nn.Module:
    """Makes the twin with these tensors, without copying them: r2060 has 4.5 GB.

    Args:
      network: as `model.network`.
      state: the weights.
      embedding_size: D; by default read from the weights of a built-in network.

    Raises:
      UserError: there is no twin.
      RuntimeError: a tensor is missing, unexpected or misshapen.
    """
    with torch.device("meta"):
        module = build(
            network, embedding_size=embedding_size or registry.embedding_size(state) or 0
        )
    module.load_state_dict(state, strict=True, assign=True)
    return module
