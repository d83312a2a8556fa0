"""The torch module of every network."""

import torch

from arcface_jax.convert import torch_iresnet, torch_mobilefacenet, torch_vit
from arcface_jax.models import iresnet, mobilefacenet, registry


def build(network: str, *, embedding_size: int = 512) -> torch.nn.Module:
    """The twin of `arcface_jax.models.registry.build(network)`, with weights yet to be loaded.

    Its `state_dict` has insightface's names.
    """
    if network in iresnet.ARCHITECTURES:
        return torch_iresnet.build(network, embedding_size=embedding_size)
    if network in mobilefacenet.ARCHITECTURES:
        return torch_mobilefacenet.build(network, embedding_size=embedding_size)
    return torch_vit.build(network, embedding_size=embedding_size)


def load(network: str, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The twin that holds these tensors themselves: r2060 has 4.5 GB of them.

    Raises:
      RuntimeError: one is missing, unexpected or misshapen.
    """
    with torch.device("meta"):
        module = build(network, embedding_size=registry.embedding_size(state) or 0)
    module.load_state_dict(state, strict=True, assign=True)
    return module
