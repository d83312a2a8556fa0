"""EdgeFace: EdgeNeXt with an embedding as its output and low-rank linear layers.

Convolution blocks and, at the end of stages, attention between channels instead of positions, whose
cost is linear in the number of positions. There is no BatchNorm. Names follow EdgeFace's published
`state_dict`. Source: George et al., "EdgeFace: Efficient Face Recognition Model for Edge Devices"
(IEEE T-BIOM 2024); Maaz et al., "EdgeNeXt" (ECCV Workshops 2022); attention between channels:
El-Nouby et al., "XCiT" (NeurIPS 2021).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from arcface_jax.config import ModelConfig
from arcface_jax.models.layers import FLOAT32, Conv, Initializer, LayerNorm, Linear

_MLP_RATIO = 4
_EPSILON = 1e-6
# Standard deviation of the initial normal distribution, truncated at two deviations.
_STD = 0.02 * 0.8796
_FIRST_GAMMA = 1e-6
_KERNELS = (3, 5, 7, 9)
# Number of channel slices in a stage's last block; the first stage has no such block.
_SLICES = (0, 2, 3, 4)
_WITH_POSITIONS = 1
_FREQUENCIES = 32
_SMALLEST_SQUARE = 1e-24


@dataclass(frozen=True)
class Architecture:
    """Parameters of an EdgeFace architecture."""

    widths: tuple[int, int, int, int]
    """Channels of each stage."""
    heads: int
    rank: float
    """Rank of a linear layer, as a share of the smaller of its two widths; EdgeFace's gamma."""
    depths: tuple[int, int, int, int] = (3, 3, 9, 3)
    """Blocks of each stage."""


ARCHITECTURES = {
    "edgeface_xs": Architecture((32, 64, 100, 192), heads=4, rank=0.6),
    "edgeface_s": Architecture((48, 96, 160, 304), heads=8, rank=0.5),
}


@dataclass(frozen=True)
class _Settings:
    """Settings shared by all layers of a network."""

    heads: int
    rank: float
    dtype: jnp.dtype
    init: Initializer


def low_rank(inputs: int, outputs: int, ratio: float) -> int:
    """Returns the rank of a linear layer of EdgeFace."""
    return max(2, int(min(inputs, outputs) * ratio))


def slice_widths(channels: int, slices: int) -> list[int]:
    """Returns the channels of each slice: equal ones, rounded up, and the remainder for the
    last.
    """
    width = -(-channels // slices)
    return [width] * (slices - 1) + [channels - width * (slices - 1)]


def positions(side: int) -> np.ndarray:
    """Returns sines and cosines of the position of each token, first its row, then its column.

    Args:
      side: side of the square of tokens.

    Returns:
      (side, side, 64) float32.
    """
    angles = 2 * np.pi * np.arange(1, side + 1) / (side + 1e-6)
    turns = angles[:, None] / 10000.0 ** (2 * np.arange(_FREQUENCIES // 2) / _FREQUENCIES)[None]
    one = np.stack([np.sin(turns), np.cos(turns)], axis=2).reshape(side, _FREQUENCIES)
    shape = (side, side, _FREQUENCIES)
    rows, columns = (np.broadcast_to(part, shape) for part in (one[:, None], one[None]))
    return np.concatenate([rows, columns], axis=2).astype(np.float32)


class _LowRank(nnx.Module):
    """A linear layer as a product of two."""

    def __init__(self, inputs: int, outputs: int, settings: _Settings):
        rank = low_rank(inputs, outputs, settings.rank)
        linear = partial(Linear, dtype=settings.dtype, init=settings.init)
        self.linear1 = linear(inputs, rank, bias="none")
        self.linear2 = linear(rank, outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear2(self.linear1(x))


class _Mlp(nnx.Module):
    """Two layers with GELU between them, computed in float32."""

    def __init__(self, width: int, settings: _Settings):
        self.fc1 = _LowRank(width, _MLP_RATIO * width, settings)
        self.fc2 = _LowRank(_MLP_RATIO * width, width, settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.fc1(x).astype(jnp.float32)
        return self.fc2(jax.nn.gelu(hidden, approximate=False))


class _ChannelAttention(nnx.Module):
    """Attention between the channels of a head: its scores are width x width.

    Products take operands of the compute type; scores, lengths and softmax are float32.
    """

    def __init__(self, width: int, settings: _Settings):
        self.heads = settings.heads
        self.temperature = nnx.Param(np.ones((self.heads, 1, 1), np.float32))
        self.qkv = _LowRank(width, 3 * width, settings)
        self.proj = _LowRank(width, width, settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, tokens, width) to the same shape."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        mixed = attend_to_channels(qkv, self.temperature[...])
        return self.proj(mixed.reshape(batch, tokens, width))


def attend_to_channels(qkv: jax.Array, temperature: jax.Array) -> jax.Array:
    """Computes cross-covariance attention.

    A channel's query and key are divided by their lengths over the tokens. The division is applied
    to the scores: they are small, and with 16 bits it avoids rounding the operands of the product
    once more.

    Args:
      qkv: (B, tokens, 3, heads, channels), queries, keys and values.
      temperature: (heads, 1, 1), a factor on the scores.

    Returns:
      (B, tokens, heads, channels) in the type of qkv.
    """
    query, key, value = (qkv[:, :, part] for part in range(3))
    scores = jnp.einsum("bnhc,bnhd->bhcd", query, key, preferred_element_type=jnp.float32)
    scores = scores * temperature[None]
    scores = scores * _inverse_lengths(query)[:, :, :, None] * _inverse_lengths(key)[:, :, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(qkv.dtype)
    return jnp.einsum("bhcd,bnhd->bnhc", weights, value)


def _inverse_lengths(x: jax.Array) -> jax.Array:
    """Returns the inverse lengths over the tokens: (B, tokens, heads, channels) to (B, heads,
    channels).
    """
    squares = jnp.square(x.astype(jnp.float32)).sum(1)
    return lax.rsqrt(jnp.maximum(squares, _SMALLEST_SQUARE))


class _ConvBlock(nnx.Module):
    """x + gamma * mlp(norm(depthwise convolution))."""

    def __init__(self, width: int, settings: _Settings, *, kernel: int):
        self.conv_dw = _channelwise(width, settings, kernel=kernel)
        self.norm = LayerNorm(width, epsilon=_EPSILON)
        self.mlp = _Mlp(width, settings)
        self.gamma = _layer_scale(width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to x, (B, H, W, width) float32."""
        return x + _scaled(self.gamma, self.mlp(self.norm(self.conv_dw(x))))


class _Positions(nnx.Module):
    """A linear map of the sines and cosines of the positions."""

    def __init__(self, width: int, settings: _Settings):
        self.token_projection = Conv(
            2 * _FREQUENCIES,
            width,
            kernel=1,
            std=_STD,
            bias=True,
            dtype=FLOAT32,
            init=settings.init,
        )

    def __call__(self, side: int) -> jax.Array:
        """Returns (1, side, side, width) float32."""
        return self.token_projection(jnp.asarray(positions(side))[None])


class _AttentionBlock(nnx.Module):
    """Convolutions of channel slices, each added to the next slice, then attention and mlp.

    EdgeNeXt's "split depth-wise transpose attention".
    """

    def __init__(self, width: int, settings: _Settings, *, slices: int, with_positions: bool):
        self.widths = tuple(slice_widths(width, slices))
        self.convs: nnx.List[Any] = nnx.List(
            [_channelwise(each, settings, kernel=3) for each in self.widths[:-1]]
        )
        self.pos_embd = _Positions(width, settings) if with_positions else None
        self.norm_xca = LayerNorm(width, epsilon=_EPSILON)
        self.gamma_xca = _layer_scale(width)
        self.xca = _ChannelAttention(width, settings)
        self.norm = LayerNorm(width, epsilon=_EPSILON)
        self.mlp = _Mlp(width, settings)
        self.gamma = _layer_scale(width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to x, (B, H, W, width) float32."""
        batch, height, _, width = x.shape
        y = self._mix_neighbors(x)
        if self.pos_embd is not None:
            y = y + self.pos_embd(height)
        y = y.reshape(batch, -1, width)
        y = y + _scaled(self.gamma_xca, self.xca(self.norm_xca(y)))
        y = _scaled(self.gamma, self.mlp(self.norm(y)))
        return x + y.reshape(x.shape)

    def _mix_neighbors(self, x: jax.Array) -> jax.Array:
        *slices, last = lax.split(x, self.widths, axis=3)
        mixed: list[jax.Array] = []
        for part, conv in zip(slices, self.convs, strict=True):
            given = part + mixed[-1] if mixed else part
            mixed.append(conv(given).astype(jnp.float32))
        return jnp.concatenate([*mixed, last], axis=3)


class _Stage(nnx.Module):
    """Blocks at half the resolution; the first stage keeps it."""

    def __init__(self, inputs: int, number: int, architecture: Architecture, settings: _Settings):
        width, depth = architecture.widths[number], architecture.depths[number]
        self.downsample: nnx.List[Any] = nnx.List([])
        if number:
            reduce = Conv(inputs, width, kernel=2, stride=2, **_conv_options(settings))
            self.downsample.extend([LayerNorm(inputs, epsilon=_EPSILON), reduce])
        slices = _SLICES[number]
        self.blocks: nnx.List[Any] = nnx.List(
            [
                _ConvBlock(width, settings, kernel=_KERNELS[number])
                for _ in range(depth - bool(slices))
            ]
        )
        if slices:
            positions = number == _WITH_POSITIONS
            last = _AttentionBlock(width, settings, slices=slices, with_positions=positions)
            self.blocks.append(last)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.downsample:
            x = layer(x).astype(jnp.float32)
        for block in self.blocks:
            x = block(x)
        return x


class _Head(nnx.Module):
    """LayerNorm of the spatial mean, and a linear layer; in float32."""

    def __init__(self, width: int, embedding_size: int, settings: _Settings):
        self.norm = LayerNorm(width, epsilon=_EPSILON)
        self.fc = _LowRank(width, embedding_size, settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(self.norm(x.mean((1, 2))))


class _EdgeNeXt(nnx.Module):
    """Stem, four stages, head; published under the name `model`."""

    def __init__(self, architecture: Architecture, embedding_size: int, settings: _Settings):
        widths = architecture.widths
        stem = Conv(3, widths[0], kernel=4, stride=4, **_conv_options(settings))
        self.stem: nnx.List[Any] = nnx.List([stem, LayerNorm(widths[0], epsilon=_EPSILON)])
        self.stages: nnx.List[Any] = nnx.List(
            [
                _Stage(widths[max(number - 1, 0)], number, architecture, settings)
                for number in range(len(widths))
            ]
        )
        last = _Settings(settings.heads, settings.rank, FLOAT32, settings.init)
        self.head = _Head(widths[-1], embedding_size, last)

    def __call__(self, x: jax.Array) -> jax.Array:
        conv, norm = self.stem
        x = norm(conv(x).astype(jnp.float32))
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def make(model: ModelConfig, *, bn_groups: int | str, init: Initializer) -> "EdgeFace":
    """Makes the network that `model.network` names; it has no BatchNorm for `bn_groups`."""
    return EdgeFace(
        ARCHITECTURES[model.network],
        embedding_size=model.embedding_size,
        dtype=jnp.dtype(model.dtype),
        init=init,
    )


class EdgeFace(nnx.Module):
    """Images in [-1, 1] to embeddings.

    Args:
      architecture: widths, depths, heads and rank.
      embedding_size: D.
      dtype: compute type of convolutions, linear layers and the products of the attention; the
        residual stream, LayerNorm, softmax and the head are float32.
      init: source of the initial weights.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        embedding_size: int,
        dtype: jnp.dtype,
        init: Initializer,
    ):
        settings = _Settings(architecture.heads, architecture.rank, dtype, init)
        self.model = _EdgeNeXt(architecture, embedding_size, settings)

    def __call__(self, x: jax.Array, *, train: bool, keys: jax.Array | None = None) -> jax.Array:
        """Maps (B, 112, 112, 3) in [-1, 1] to (B, D) float32, not normalized; deterministic."""
        return self.model(x)


def _conv_options(settings: _Settings) -> dict[str, Any]:
    """Returns options of a convolution whose stride equals its kernel's size."""
    return {
        "padded": False,
        "std": _STD,
        "bias": True,
        "dtype": settings.dtype,
        "init": settings.init,
    }


def _channelwise(width: int, settings: _Settings, *, kernel: int) -> Conv:
    """Makes a depthwise convolution."""
    options: dict[str, Any] = _conv_options(settings) | {"padded": True}
    return Conv(width, width, kernel=kernel, groups=width, **options)


def _layer_scale(width: int) -> nnx.Param:
    """Makes a factor for each channel of a branch, initialized close to 0."""
    return nnx.Param(np.full((width,), _FIRST_GAMMA, np.float32))


def _scaled(gamma: nnx.Param, x: jax.Array) -> jax.Array:
    """Multiplies a branch by its factors, in float32."""
    return gamma[...].reshape((1,) * (x.ndim - 1) + (-1,)) * x.astype(jnp.float32)
