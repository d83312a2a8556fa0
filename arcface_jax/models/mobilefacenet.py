"""MobileFaceNet, as insightface's arcface_torch builds it (with wider layers than the paper).

Module names, and so the dotted names of parameters and statistics, are insightface's `state_dict`
names; a list has a place for each of its layers, including those without weights. Source: Chen et
al., "MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on Mobile Devices"
(CCBR 2018).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from arcface_jax.config import ModelConfig
from arcface_jax.models.layers import FLOAT32, BatchNorm, Conv, Initializer, Linear, PReLU


@dataclass(frozen=True)
class Architecture:
    """Parameters of a MobileFaceNet architecture."""

    blocks: tuple[int, int, int, int]
    """Residual blocks in each of the four stages."""
    scale: int
    """Factor on the number of channels."""


ARCHITECTURES = {
    "mbf": Architecture((1, 4, 6, 2), scale=2),
    "mbf_large": Architecture((2, 8, 12, 4), scale=4),
    # MobileFaceNet y1 of insightface's model zoo, with the paper's widths and 128 numbers.
    "mobilefacenet_y1": Architecture((1, 4, 6, 2), scale=1),
}

_LAST_CHANNELS, _LAST_SIZE = 512, 7


@dataclass(frozen=True)
class _Settings:
    """Settings shared by all convolutions of a network."""

    bn_groups: int | str
    dtype: jnp.dtype
    init: Initializer


class _Unit(nnx.Module):
    """Convolution - BatchNorm - PReLU; without PReLU if linear."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        settings: _Settings,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        padded: bool = True,
        linear: bool = False,
    ):
        conv = Conv(
            in_channels,
            out_channels,
            kernel=kernel,
            stride=stride,
            groups=groups,
            padded=padded,
            std=_kaiming_std(out_channels * kernel**2),
            dtype=settings.dtype,
            init=settings.init,
        )
        norm = BatchNorm(out_channels, groups=settings.bn_groups)
        self.layers: nnx.List[Any] = nnx.List([conv, norm])
        if not linear:
            self.layers.append(PReLU(out_channels))

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv, norm, *activation = self.layers
        return norm(conv(x), train=train, activation=activation[0] if activation else None)


class _DepthWise(nnx.Module):
    """1x1 to `width` channels, 3x3 depthwise, 1x1 to the output; added to x if residual."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        settings: _Settings,
        *,
        width: int,
        stride: int,
        residual: bool = False,
    ):
        self.residual = residual
        self.layers: nnx.List[Any] = nnx.List(
            [
                _Unit(in_channels, width, settings),
                _Unit(width, width, settings, kernel=3, stride=stride, groups=width),
                _Unit(width, out_channels, settings, linear=True),
            ]
        )

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = x
        for layer in self.layers:
            y = layer(y, train=train)
        return x + y if self.residual else y


class _Residual(nnx.Module):
    """Several residual blocks in a row."""

    def __init__(self, channels: int, settings: _Settings, *, blocks: int, width: int):
        self.layers: nnx.List[Any] = nnx.List(
            [
                _DepthWise(channels, channels, settings, width=width, stride=1, residual=True)
                for _ in range(blocks)
            ]
        )

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for layer in self.layers:
            x = layer(x, train=train)
        return x


class _NoWeights(nnx.Module):
    """Placeholder for a layer without weights."""


class _Features(nnx.Module):
    """A 7x7 depthwise convolution, to the embedding; in float32."""

    def __init__(self, embedding_size: int, settings: _Settings):
        channels = _LAST_CHANNELS
        draw = partial(settings.init.normal, std=_kaiming_std(embedding_size))
        self.layers: nnx.List[Any] = nnx.List(
            [
                _Unit(
                    channels,
                    channels,
                    settings,
                    kernel=_LAST_SIZE,
                    groups=channels,
                    padded=False,
                    linear=True,
                ),
                _NoWeights(),
                Linear(channels, embedding_size, bias="none", kernel=draw, init=settings.init),
                BatchNorm(embedding_size, groups=settings.bn_groups),
            ]
        )

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        pool, _, linear, norm = self.layers
        x = pool(x, train=train)
        return norm(linear(x.reshape(x.shape[0], -1)), train=train)


def make(model: ModelConfig, *, bn_groups: int | str, init: Initializer) -> "MobileFaceNet":
    """Makes the network that `model.network` names."""
    return MobileFaceNet(
        ARCHITECTURES[model.network],
        embedding_size=model.embedding_size,
        bn_groups=bn_groups,
        dtype=jnp.dtype(model.dtype),
        init=init,
    )


class MobileFaceNet(nnx.Module):
    """Images in [-1, 1] to embeddings.

    Args:
      architecture: blocks and width.
      embedding_size: D.
      bn_groups: slices of a training batch with separate BatchNorm statistics.
      dtype: compute type up to the last 1x1 convolution; that one and everything after it are
          float32.
      init: source of the initial weights.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        embedding_size: int,
        bn_groups: int | str,
        dtype: jnp.dtype,
        init: Initializer,
    ):
        narrow, wide = 64 * architecture.scale, 128 * architecture.scale
        blocks = architecture.blocks
        settings = _Settings(bn_groups, dtype, init)
        last = _Settings(bn_groups, FLOAT32, init)
        first = (
            _Unit(narrow, narrow, settings, kernel=3, groups=64)
            if blocks[0] == 1
            else _Residual(narrow, settings, blocks=blocks[0], width=128)
        )
        self.dtype = dtype
        self.layers: nnx.List[Any] = nnx.List(
            [
                _Unit(3, narrow, settings, kernel=3, stride=2),
                first,
                _DepthWise(narrow, narrow, settings, width=128, stride=2),
                _Residual(narrow, settings, blocks=blocks[1], width=128),
                _DepthWise(narrow, wide, settings, width=256, stride=2),
                _Residual(wide, settings, blocks=blocks[2], width=256),
                _DepthWise(wide, wide, settings, width=512, stride=2),
                _Residual(wide, settings, blocks=blocks[3], width=256),
            ]
        )
        self.conv_sep = _Unit(wide, _LAST_CHANNELS, last)
        self.features = _Features(embedding_size, last)

    def __call__(self, x: jax.Array, *, train: bool, keys: jax.Array | None = None) -> jax.Array:
        """Maps (B, 112, 112, 3) in [-1, 1] to (B, D) float32, not normalized; deterministic."""
        x = x.astype(self.dtype)
        for layer in self.layers:
            x = layer(x, train=train)
        return self.features(self.conv_sep(x, train=train), train=train)


def _kaiming_std(fan_out: int) -> float:
    """Returns the standard deviation of He et al. (ICCV 2015) for layers before a ReLU."""
    return math.sqrt(2 / fan_out)
