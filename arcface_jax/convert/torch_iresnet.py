"""IResNet as a torch module whose `state_dict` has insightface's names."""

import torch
from torch import nn

from arcface_jax.models.iresnet import ARCHITECTURES, LAST_SIZE, Architecture


class Block(nn.Module):
    """The residual block of `arcface_jax.models.iresnet.Block`, channels first."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, down_sample: bool):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample, self.stride = None, stride
        if down_sample:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, in, H, W) to (B, out, H / stride, W / stride)."""
        y = self.conv1(self.bn1(x))
        y = self.conv2(self.prelu(self.bn2(y)))
        if self.downsample is None:
            return self.bn3(y) + x[:, :, :: self.stride, :: self.stride]
        return self.bn3(y) + self.downsample(x)


class TorchIResNet(nn.Module):
    """Images (B, 3, 112, 112) in [-1, 1], RGB, to embeddings (B, D), not normalized."""

    def __init__(self, architecture: Architecture, *, embedding_size: int = 512):
        super().__init__()
        channels = architecture.widths[0]
        self.conv1 = nn.Conv2d(3, channels, 3, architecture.stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        stages = zip(architecture.blocks, architecture.widths, architecture.strides, strict=True)
        for number, (blocks, width, stride) in enumerate(stages, start=1):
            projected = architecture.shortcut == "projected" or channels != width
            first = Block(channels, width, stride=stride, down_sample=projected)
            rest = [Block(width, width, stride=1, down_sample=False) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
            channels = width
        self.bn2 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels * LAST_SIZE**2, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad_(False)
        self.features.bias.requires_grad_(architecture.last_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (n, 3, 112, 112) float32 images to (n, D) embeddings, not normalized."""
        x = self.prelu(self.bn1(self.conv1(x)))
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return self.features(self.fc(self.bn2(x).flatten(1)))


def build(network: str, *, embedding_size: int = 512) -> TorchIResNet:
    """Makes the twin of `arcface_jax.models.registry.build(network)`, without its weights."""
    return TorchIResNet(ARCHITECTURES[network], embedding_size=embedding_size)
