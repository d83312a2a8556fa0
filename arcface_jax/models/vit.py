"""Vision transformers without a class token, as insightface's arcface_torch builds them.

All blocks are equal, so they are one stack of parameters, `blocks.0-11.attn.qkv.kernel` with a
leading axis over the blocks, and the network is a scan over it: tracing and compiling take the time
of one block. Names are otherwise insightface's `state_dict` names. Source: Dosovitskiy et al., "An
Image is Worth 16x16 Words" (ICLR 2021); stochastic depth: Huang et al. (ECCV 2016); masking: He et
al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from arcface_jax.config import ModelConfig
from arcface_jax.models import stacks
from arcface_jax.models.layers import BatchNorm, Initializer, LayerNorm, Linear

_IMAGE, _PATCH, _HEADS, _MLP_RATIO = 112, 9, 8, 4
_SIDE = _IMAGE // _PATCH
TOKENS = _SIDE**2
# insightface truncates this normal distribution at -2 and 2, a hundred deviations away: no effect.
_STD = 0.02
# Whatever nonzero mask ratio a network's name states, insightface masks a tenth of the tokens.
_KEPT = int(TOKENS * 0.9)


@dataclass(frozen=True)
class Architecture:
    """Parameters of a transformer architecture."""

    width: int
    depth: int
    drop_path: float
    """Probability of skipping the last block for a sample; it rises linearly from 0 at the
    first."""
    masked: bool
    """Whether to hide a tenth of the tokens from the blocks in training."""
    remat: bool = False
    """Whether to recompute the blocks in the backward pass, to save memory."""


ARCHITECTURES = {
    "vit_t": Architecture(256, 12, 0.1, masked=True),
    "vit_t_dp005_mask0": Architecture(256, 12, 0.05, masked=False),
    "vit_s": Architecture(512, 12, 0.1, masked=True),
    "vit_s_dp005_mask_0": Architecture(512, 12, 0.05, masked=False),
    "vit_b": Architecture(512, 24, 0.1, masked=True, remat=True),
    "vit_b_dp005_mask_005": Architecture(512, 24, 0.05, masked=True, remat=True),
    "vit_l_dp005_mask_005": Architecture(768, 24, 0.05, masked=True, remat=True),
    "vit_h": Architecture(1024, 48, 0.1, masked=False, remat=True),
}


class _Attention(nnx.Module):
    """Self-attention with eight heads and float32 softmax.

    Products are float32, or, if `fused` on GPUs, in the compute type.
    """

    def __init__(self, width: int, *, dtype: jnp.dtype, fused: bool, init: Initializer):
        draw = partial(init.normal, std=_STD)
        self.qkv = Linear(width, 3 * width, bias="none", kernel=draw, dtype=dtype, init=init)
        self.proj = Linear(width, width, bias="zero", kernel=draw, dtype=dtype, init=init)
        self.fused = fused

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, _HEADS, width // _HEADS)
        mixed = attend_fused(qkv) if self.fused else attend(qkv)
        return self.proj(mixed.reshape(batch, tokens, width))


def attend(qkv: jax.Array) -> jax.Array:
    """Computes attention in float32.

    Args:
      qkv: (B, tokens, 3, heads, head width), queries, keys and values.

    Returns:
      (B, tokens, heads, head width) float32.
    """
    qkv = qkv.astype(jnp.float32)
    query, key, value = (qkv[:, :, part] for part in range(3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * qkv.shape[-1] ** -0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), value)


def attend_fused(qkv: jax.Array, *, implementation: Literal["cudnn", "xla"] = "cudnn") -> jax.Array:
    """Computes attention in the operands' type, float16 or bfloat16, by cuDNN; stores no scores.

    cuDNN requires multiples of eight tokens, so padding is added and masked.
    """
    batch, tokens = qkv.shape[:2]
    parts, lengths = [qkv[:, :, part] for part in range(3)], {}
    if tokens % 8:
        # Padded after splitting, or XLA reads all three for each of them.
        padding = ((0, 0), (0, -tokens % 8), (0, 0), (0, 0))
        parts = [jnp.pad(part, padding) for part in parts]
        names = ("query_seq_lengths", "key_value_seq_lengths")
        lengths = dict.fromkeys(names, jnp.full((batch,), tokens, jnp.int32))
    query, key, value = parts
    mixed = jax.nn.dot_product_attention(
        query, key, value, implementation=implementation, **lengths
    )
    return mixed[:, :tokens]


def can_fuse(width: int, *, dtype: jnp.dtype, gpu: float) -> bool:
    """Returns whether cuDNN supports this attention on GPUs of that compute capability."""
    head = width // _HEADS
    return gpu >= 8 and dtype.itemsize == 2 and head <= 128 and head % 8 == 0


class _Mlp(nnx.Module):
    """Two layers with ReLU6 between them."""

    def __init__(self, width: int, *, dtype: jnp.dtype, init: Initializer):
        draw = partial(init.normal, std=_STD)
        options: dict[str, Any] = {"bias": "zero", "kernel": draw, "dtype": dtype, "init": init}
        self.fc1 = Linear(width, _MLP_RATIO * width, **options)
        self.fc2 = Linear(_MLP_RATIO * width, width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.relu6(self.fc1(x)))


class _Block(nnx.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), each skipped for some samples."""

    def __init__(self, width: int, *, dtype: jnp.dtype, fused: bool, init: Initializer):
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn = _Attention(width, dtype=dtype, fused=fused, init=init)
        self.mlp = _Mlp(width, dtype=dtype, init=init)

    def __call__(self, x: jax.Array, factors: jax.Array) -> jax.Array:
        """Applies the block to x (B, tokens, width); factors (2, B) float32 are 0 for skipped
        branches.
        """
        x = _add(x, factors[0], self.attn(self.norm1(x)))
        return _add(x, factors[1], self.mlp(self.norm2(x)))


def _add(x: jax.Array, factors: jax.Array, branch: jax.Array) -> jax.Array:
    """Adds a branch in float32, rounded to the type of x."""
    return (x + factors[:, None, None] * branch.astype(jnp.float32)).astype(x.dtype)


class _Projection(nnx.Module):
    """The convolution of `_PatchEmbed`: with bias, and a stride equal to its kernel."""

    def __init__(self, width: int, *, init: Initializer):
        bound = (3 * _PATCH**2) ** -0.5  # torch's default for convolutions
        self.kernel = nnx.Param(init.uniform((_PATCH, _PATCH, 3, width), bound=bound))
        self.bias = nnx.Param(init.uniform((width,), bound=bound))

    def __call__(self, x: jax.Array) -> jax.Array:
        # A convolution without overlap is a product with each patch's pixels.
        batch, seen = len(x), _SIDE * _PATCH
        x = x[:, :seen, :seen].reshape(batch, _SIDE, _PATCH, _SIDE, _PATCH, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, TOKENS, 3 * _PATCH**2)
        return x @ self.kernel[...].reshape(3 * _PATCH**2, -1) + self.bias[...][None, None]


class _PatchEmbed(nnx.Module):
    """Maps patches of 9 x 9 pixels to tokens; ignores the last four rows and columns."""

    def __init__(self, width: int, *, init: Initializer):
        self.proj = _Projection(width, init=init)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.proj(x)


def make(
    model: ModelConfig, *, bn_groups: int | str, init: Initializer, gpu: float = 0
) -> "VisionTransformer":
    """Makes the network that `model.network` names; on GPUs its attention is fused."""
    return VisionTransformer(
        ARCHITECTURES[model.network],
        embedding_size=model.embedding_size,
        bn_groups=bn_groups,
        dtype=jnp.dtype(model.dtype),
        gpu=gpu,
        init=init,
    )


class VisionTransformer(nnx.Module):
    """Images in [-1, 1] to embeddings.

    Args:
      architecture: width, depth, and random skipping in training.
      embedding_size: D.
      bn_groups: slices of a training batch with separate BatchNorm statistics.
      dtype: compute type of the blocks' linear layers. Attention, unless fused, everything outside
        the blocks, and the tokens between blocks are float32; except that on GPUs, where blocks are
        memory-bound, bfloat16 blocks exchange bfloat16 tokens.
      gpu: compute capability of the NVIDIA GPUs that run it, or 0.
      init: source of the initial weights.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        embedding_size: int,
        bn_groups: int | str,
        dtype: jnp.dtype,
        gpu: float = 0,
        init: Initializer,
    ):
        width, depth = architecture.width, architecture.depth
        self.architecture = architecture
        self.patch_embed = _PatchEmbed(width, init=init)
        self.pos_embed = nnx.Param(init.normal((1, TOKENS, width), std=_STD))
        self.mask_token = nnx.Param(init.normal((1, 1, width), std=_STD))
        fused = can_fuse(width, dtype=dtype, gpu=gpu)
        self.tokens = dtype if fused and dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)
        block = partial(_Block, width, dtype=dtype, fused=fused)
        self.blocks = nnx.Dict({stacks.name(0, (depth,)): stacks.make(block, (depth,), init)})
        self.norm = LayerNorm(width)
        draw = partial(init.normal, std=_STD)
        linear = partial(Linear, bias="none", kernel=draw, init=init)
        norm = partial(BatchNorm, groups=bn_groups, epsilon=2e-5)
        self.feature: nnx.List[Any] = nnx.List(
            [
                linear(TOKENS * width, width),
                norm(width),
                linear(width, embedding_size),
                norm(embedding_size),
            ]
        )

    def __call__(self, x: jax.Array, *, train: bool, keys: jax.Array | None = None) -> jax.Array:
        """Maps (B, 112, 112, 3) in [-1, 1] to (B, D) float32, not normalized.

        In training an image's key determines its hidden tokens and skipped branches.
        """
        batch = len(x)
        x = self.patch_embed(x.astype(jnp.float32)) + self.pos_embed[...]
        factors = jnp.ones((self.architecture.depth, 2, batch), jnp.float32)
        kept = None
        if train:
            assert keys is not None, "training this network needs random keys: pass keys"
            mask_keys, path_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
            factors = self._draw_paths(path_keys)
            if self.architecture.masked:
                kept = jax.vmap(_draw_kept_tokens)(mask_keys)
                x = jnp.take_along_axis(x, kept[:, :, None], axis=1)
        (stack,) = self.blocks.values()
        remat = train and self.architecture.remat
        x = stacks.apply(stack, x.astype(self.tokens), _Block.__call__, factors, remat=remat)
        x = self.norm(x.astype(jnp.float32))
        if kept is not None:
            hidden = jnp.broadcast_to(self.mask_token[...], (batch, TOKENS, x.shape[-1]))
            x = hidden.at[jnp.arange(batch)[:, None], kept].set(x)
        reduce, first_norm, project, last_norm = self.feature
        x = first_norm(reduce(x.reshape(batch, -1)), train=train)
        return last_norm(project(x), train=train)

    def _draw_paths(self, keys: jax.Array) -> jax.Array:
        """Draws (depth, 2, B) float32: 0 for skipped branches, and 1 / probability for the
        others.
        """
        depth = self.architecture.depth
        stays = 1 - jnp.linspace(0, self.architecture.drop_path, depth)[:, None]
        draw = partial(jax.random.bernoulli, p=stays, shape=(depth, 2))
        return jax.vmap(draw, out_axes=2)(keys) / stays[:, :, None]


def _draw_kept_tokens(key: jax.Array) -> jax.Array:
    """Draws (kept,) int32 tokens in random order."""
    return jnp.argsort(jax.random.uniform(key, (TOKENS,)))[:_KEPT]
