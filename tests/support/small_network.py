"""A network that compiles quickly, for tests whose subject is not the network.

Recipes name it `NAME`, which processes started in the checkout can import too. Its layers are of
the kinds that the small IResNet has and bear the same names, and it has a torch twin.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from arcface_jax.config import ModelConfig
from arcface_jax.models.layers import BatchNorm, Conv, Initializer, Linear, PReLU

if TYPE_CHECKING:
    import torch

NAME = "tests.support.small_network:make"
DROPPING = "tests.support.small_network:make_dropping"
CHANNELS, STRIDE = 8, 8
FEATURES = CHANNELS * (112 // STRIDE) ** 2


class SmallNetwork(nnx.Module):
    """One strided convolution with BatchNorm and PReLU, and the last two layers of an IResNet."""

    def __init__(self, model: ModelConfig, *, bn_groups: int | str, init: Initializer):
        self.dtype = jnp.dtype(model.dtype)
        self.conv1 = Conv(3, CHANNELS, kernel=3, stride=STRIDE, dtype=self.dtype, init=init)
        self.bn1 = BatchNorm(CHANNELS, groups=bn_groups)
        self.prelu = PReLU(CHANNELS)
        self.fc = Linear(FEATURES, model.embedding_size, init=init)
        self.features = BatchNorm(model.embedding_size, groups=bn_groups, train_scale=False)

    def __call__(self, x: jax.Array, *, train: bool, keys: jax.Array | None = None) -> jax.Array:
        """(B, 112, 112, 3) in [-1, 1] to (B, D) float32, not normalized."""
        x = self.conv1(x.astype(self.dtype))
        x = self.bn1(x, train=train, activation=self.prelu)
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # as torch flattens
        x = self.drop(x, keys) if train else x
        return self.features(self.fc(x), train=train)

    def drop(self, features: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Leave (B, F) features as they are."""
        return features


class DroppingNetwork(SmallNetwork):
    """The small network with dropout before its last linear layer, by the key of each image.

    That layer has no bias: before a BatchNorm its gradient would be nothing but rounding errors.
    """

    def __init__(self, model: ModelConfig, *, bn_groups: int | str, init: Initializer):
        super().__init__(model, bn_groups=bn_groups, init=init)
        self.fc = Linear(FEATURES, model.embedding_size, bias="none", init=init)

    def drop(self, features: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Set half of the (B, F) features to zero."""
        assert keys is not None
        return features * jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (FEATURES,)))(keys)


def make(model: ModelConfig, *, bn_groups: int | str, init: Initializer) -> SmallNetwork:
    """Make the network of a `ModelConfig`."""
    return SmallNetwork(model, bn_groups=bn_groups, init=init)


def make_dropping(model: ModelConfig, *, bn_groups: int | str, init: Initializer) -> SmallNetwork:
    """As `make`, of a network that draws at random in training."""
    return DroppingNetwork(model, bn_groups=bn_groups, init=init)


def _twin(network: str, *, embedding_size: int) -> "torch.nn.Module":
    from torch import nn

    module = nn.Sequential()
    module.add_module("conv1", nn.Conv2d(3, CHANNELS, 3, STRIDE, padding=1, bias=False))
    module.add_module("bn1", nn.BatchNorm2d(CHANNELS))
    module.add_module("prelu", nn.PReLU(CHANNELS))
    module.add_module("flatten", nn.Flatten())
    module.add_module("fc", nn.Linear(FEATURES, embedding_size))
    module.add_module("features", nn.BatchNorm1d(embedding_size))
    return module


make.torch_twin = _twin
