"""IResNet, the residual network of ArcFace, as insightface's arcface_torch builds it.

Module names, and so the dotted names of parameters and statistics, are insightface's `state_dict`
names. In the large networks the equal blocks of a stage are stacks (`models/stacks.py`):
`layer3.1-29.conv1.kernel` has a leading axis over the blocks, and the stage is a scan over them.
Source: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition" (CVPR 2019),
and Duta et al., "Improved Residual Networks for Image and Video Recognition" (ICPR 2020).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from arcface_jax.config import ModelConfig
from arcface_jax.models import stacks
from arcface_jax.models.layers import BatchNorm, Conv, Initializer, Linear, PReLU


@dataclass(frozen=True)
class Architecture:
    """Parameters of an IResNet architecture."""

    blocks: tuple[int, int, int, int]
    """Blocks in each of the four stages."""
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    """Channels of each stage; the stem has the first stage's."""
    stem_stride: int = 1
    strides: tuple[int, int, int, int] = (2, 2, 2, 2)
    """Stride of each stage's first block; 112 pixels become 7 in every network here."""
    blocks_are: Literal["unrolled", "scanned", "nested"] = "unrolled"
    """Whether the equal blocks of a stage, all but its first, are a scan, or a nested scan."""
    remat: bool = False
    """Whether to recompute scanned blocks in the backward pass, to save memory."""
    shortcut: Literal["projected", "subsampled"] = "projected"
    """What a stage's first block adds: a convolution of its input, or, if the channels stay the
    same, every other pixel of it."""
    last_bias: bool = True
    """Whether to train a bias of the last BatchNorm, whose scale is fixed at 1."""


ARCHITECTURES = {
    # Not from insightface; for tests, the demo and CPUs: 5.5 M parameters, 0.08 GMAC.
    "r_tiny": Architecture((1, 1, 1, 1), (24, 48, 96, 192), stem_stride=2, strides=(2, 2, 2, 1)),
    "r18": Architecture((2, 2, 2, 2)),
    "r34": Architecture((3, 4, 6, 3)),
    "r50": Architecture((3, 4, 14, 3)),
    "r100": Architecture((3, 13, 30, 3), blocks_are="scanned"),
    "r200": Architecture((6, 26, 60, 6), blocks_are="scanned"),
    "r2060": Architecture((3, 128, 896, 3), blocks_are="nested", remat=True),
    # The IR networks of AdaFace and CVLface (Kim et al., CVPR 2022), under insightface's names.
    "adaface_ir18": Architecture((2, 2, 2, 2), shortcut="subsampled", last_bias=False),
    "adaface_ir50": Architecture((3, 4, 14, 3), shortcut="subsampled", last_bias=False),
    "adaface_ir101": Architecture(
        (3, 13, 30, 3), blocks_are="scanned", shortcut="subsampled", last_bias=False
    ),
}

LAST_SIZE = 7
_STAGES = ("layer1", "layer2", "layer3", "layer4")


class Block(nnx.Module):
    """bn1 - conv1 - bn2 - prelu - conv2(stride) - bn3, added to the (downsampled) input."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stride: int,
        down_sample: bool,
        bn_groups: int | str,
        dtype: jnp.dtype,
        init: Initializer,
    ):
        self.bn1 = BatchNorm(in_channels, groups=bn_groups)
        self.conv1 = Conv(in_channels, channels, kernel=3, dtype=dtype, init=init)
        self.bn2 = BatchNorm(channels, groups=bn_groups)
        self.prelu = PReLU(channels)
        self.conv2 = Conv(
            channels,
            channels,
            kernel=3,
            stride=stride,
            dtype=dtype,
            init=init,
        )
        self.bn3 = BatchNorm(channels, groups=bn_groups)
        self.stride = stride
        self.downsample: nnx.List[Any] = nnx.List()
        if down_sample:
            conv = Conv(
                in_channels,
                channels,
                kernel=1,
                stride=stride,
                dtype=dtype,
                init=init,
            )
            self.downsample = nnx.List([conv, BatchNorm(channels, groups=bn_groups)])

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = self.conv1(self.bn1(x, train=train))
        y = self.conv2(self.bn2(y, train=train, activation=self.prelu))
        y = self.bn3(y, train=train)
        if self.downsample:
            conv, bn = self.downsample
            x = bn(conv(x), train=train)
        elif self.stride > 1:
            x = x[:, :: self.stride, :: self.stride]
        return y + x


def make(
    model: ModelConfig,
    *,
    bn_groups: int | str,
    init: Initializer,
    stacked: bool = True,
    gpu: float = 0,
) -> "IResNet":
    """Makes the network that `model.network` names.

    If not `stacked`, each block has its own arrays. On GPUs stacks are applied block by block.
    """
    architecture = ARCHITECTURES[model.network]
    if not stacked:
        architecture = replace(architecture, blocks_are="unrolled")
    return IResNet(
        architecture,
        embedding_size=model.embedding_size,
        bn_groups=bn_groups,
        dtype=jnp.dtype(model.dtype),
        unrolled=gpu > 0,
        init=init,
    )


class IResNet(nnx.Module):
    """Images in [-1, 1] to embeddings.

    Args:
      architecture: blocks, widths and strides.
      embedding_size: D.
      bn_groups: slices of a training batch with separate BatchNorm statistics.
      dtype: compute type of the convolutional part; the last two layers are float32.
      unrolled: whether to apply stacks without rematerialization block by block, for GPUs: a loop
        compiles in a third of the time, but takes more than twice the memory there.
      init: source of the initial weights.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        embedding_size: int,
        bn_groups: int | str,
        dtype: jnp.dtype,
        unrolled: bool,
        init: Initializer,
    ):
        channels = architecture.widths[0]
        self.architecture, self.dtype = architecture, dtype
        self.unrolled = unrolled and not architecture.remat
        self.conv1 = Conv(
            3,
            channels,
            kernel=3,
            stride=architecture.stem_stride,
            dtype=dtype,
            init=init,
        )
        self.bn1 = BatchNorm(channels, groups=bn_groups)
        self.prelu = PReLU(channels)
        block = partial(Block, bn_groups=bn_groups, dtype=dtype)
        stages = zip(architecture.blocks, architecture.widths, architecture.strides, strict=True)
        for name, (blocks, width, stride) in zip(_STAGES, stages, strict=True):
            projected = architecture.shortcut == "projected" or channels != width
            first = block(channels, width, stride=stride, down_sample=projected, init=init)
            equal = partial(block, width, width, stride=1, down_sample=False)
            rest = {
                stacks.name(number, lead): stacks.make(equal, lead, init)
                for number, lead in _stacks(architecture, blocks)
            }
            setattr(self, name, nnx.Dict({"0": first, **rest}))
            channels = width
        self.bn2 = BatchNorm(channels, groups=bn_groups)
        self.fc = Linear(channels * LAST_SIZE**2, embedding_size, init=init)
        self.features = BatchNorm(
            embedding_size,
            groups=bn_groups,
            train_scale=False,
            train_bias=architecture.last_bias,
        )

    def __call__(self, x: jax.Array, *, train: bool, keys: jax.Array | None = None) -> jax.Array:
        """Maps (B, 112, 112, 3) in [-1, 1] to (B, D) float32, not normalized; deterministic."""
        x = self.conv1(x.astype(self.dtype))
        x = self.bn1(x, train=train, activation=self.prelu)
        for name, blocks in zip(_STAGES, self.architecture.blocks, strict=True):
            stage = getattr(self, name)
            x = stage["0"](x, train=train)
            for number, lead in _stacks(self.architecture, blocks):
                x = self._apply(stage[stacks.name(number, lead)], x, axes=len(lead), train=train)
        x = self.bn2(x, train=train)
        # insightface flattens channels first; with the same order, fc needs no permutation on
        # export.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return self.features(self.fc(x), train=train)

    def _apply(self, blocks: Any, x: jax.Array, *, axes: int, train: bool) -> jax.Array:
        if axes == 0:
            return blocks(x, train=train)
        remat = train and self.architecture.remat

        def one(block: Block, x: jax.Array, _: None) -> jax.Array:
            return block(x, train=train)

        return stacks.apply(blocks, x, one, axes=axes, remat=remat, unrolled=self.unrolled)


def _stacks(architecture: Architecture, blocks: int) -> list[tuple[int, tuple[int, ...]]]:
    """Returns number and leading axes of the stacks after a stage's first block."""
    if architecture.blocks_are == "unrolled":
        return [(number, ()) for number in range(1, blocks)]
    return stacks.plan(1, blocks - 1, nested=architecture.blocks_are == "nested")
