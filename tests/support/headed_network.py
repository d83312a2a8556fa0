"""A network with a torch twin whose last layer has a name that no built-in network has."""

from typing import TYPE_CHECKING

import jax
from flax import nnx

from arcface_jax.config import ModelConfig
from arcface_jax.models.layers import Initializer

if TYPE_CHECKING:
    import torch

NAME = "tests.support.headed_network:make"
GRID, SIDE = 4, 28
FEATURES = 3 * GRID**2


class HeadedNetwork(nnx.Module):
    """A linear layer on the mean colors of 4 x 4 squares."""

    def __init__(self, model: ModelConfig, init: Initializer):
        self.head = nnx.Linear(FEATURES, model.embedding_size, rngs=init.rngs())

    def __call__(self, x: jax.Array, *, train: bool, keys: jax.Array | None = None) -> jax.Array:
        """(B, 112, 112, 3) in [-1, 1] to (B, D) float32, not normalized."""
        squares = x.reshape(len(x), GRID, SIDE, GRID, SIDE, 3).mean((2, 4))
        return self.head(squares.reshape(len(x), FEATURES))


def make(model: ModelConfig, *, bn_groups: int | str, init: Initializer) -> HeadedNetwork:
    """Makes the network that `NAME` names."""
    return HeadedNetwork(model, init)


def _twin(network: str, *, embedding_size: int) -> "torch.nn.Module":
    import torch

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(FEATURES, embedding_size)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            squares = x.reshape(len(x), 3, GRID, SIDE, GRID, SIDE).mean((3, 5))
            return self.head(squares.permute(0, 2, 3, 1).reshape(len(x), FEATURES))

    return Twin()


make.torch_twin = _twin
