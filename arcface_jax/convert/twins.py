"""The torch module of every network that has one."""

from collections.abc import Callable

import torch

from arcface_jax import plugins
from arcface_jax.convert import torch_edgeface, torch_iresnet, torch_mobilefacenet, torch_vit
from arcface_jax.errors import UserError
from arcface_jax.models import edgeface, iresnet, mobilefacenet, registry, vit

Twin = Callable[..., torch.nn.Module]

# The last is an array that every network of the family has, and no other.
_FAMILIES = (
    (iresnet.ARCHITECTURES, torch_iresnet.build, "layer1.0.conv1.weight"),
    (mobilefacenet.ARCHITECTURES, torch_mobilefacenet.build, "features.layers.3.bias"),
    (vit.ARCHITECTURES, torch_vit.build, "patch_embed.proj.weight"),
    (edgeface.ARCHITECTURES, torch_edgeface.build, "model.head.fc.linear2.bias"),
)


def find(network: str) -> Twin | None:
    """Returns the function that makes a network's twin; None for a network without one.

    A network from outside the package may have one as the attribute `torch_twin` of the function
    that makes it.
    """
    for architectures, build_family, _ in _FAMILIES:
        if network in architectures:
            return build_family
    return getattr(plugins.load(network, field="model.network"), "torch_twin", None)


def has_layer_sequence(network: str) -> bool:
    """Whether `torch_layers` can tell the network's layers, by which ONNX files are recognized.

    An EdgeFace's cannot be told: it multiplies and joins branches, and its ONNX file holds the
    positions after their projection, not the projection's weights.
    """
    return network not in edgeface.ARCHITECTURES and find(network) is not None


def sign(network: str) -> str | None:
    """Returns the name of an array that tells a built-in network's family; None for a plug-in."""
    return next((name for networks, _, name in _FAMILIES if network in networks), None)


def require(network: str) -> Twin:
    """As `find`, for what cannot do without.

    Raises:
      UserError: there is no twin.
    """
    twin = find(network)
    if twin is None:
        raise UserError(
            f"{network} has no torch twin, so it has no form for PyTorch: export ONNX (pip install "
            "'arcface-jax[jax2onnx]') or StableHLO, or give the function that makes the network "
            "the attribute torch_twin (docs/extending.md)"
        )
    return twin


def build(network: str, *, embedding_size: int = 512) -> torch.nn.Module:
    """Makes the twin of `arcface_jax.models.registry.build(network)`, its weights yet to be loaded.

    Its `state_dict` has insightface's names.

    Raises:
      UserError: there is no twin.
    """
    return require(network)(network, embedding_size=embedding_size)


def load(
    network: str, state: dict[str, torch.Tensor], *, embedding_size: int | None = None
) -> torch.nn.Module:
    """Makes the twin that holds these tensors themselves: r2060 has 4.5 GB of them.

    Args:
      network: as `model.network`.
      state: the weights.
      embedding_size: D; read from the weights of a built-in network when not given.

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
