"""The torch module of every network."""

import torch

from arcface_jax.models import iresnet, mobilefacenet
from convert import torch_iresnet, torch_mobilefacenet, torch_vit


def build(network: str, *, embedding_size: int = 512) -> torch.nn.Module:
    """The twin of `arcface_jax.models.build(network)`, with weights yet to be loaded.

    Its `state_dict` has insightface's names.
    """
    if network in iresnet.ARCHITECTURES:
        return torch_iresnet.build(network, embedding_size=embedding_size)
    if network in mobilefacenet.ARCHITECTURES:
        return torch_mobilefacenet.build(network, embedding_size=embedding_size)
    return torch_vit.build(network, embedding_size=embedding_size)
