"""MobileFaceNet as a torch module whose `state_dict` has insightface's names."""

import torch
from torch import nn

from arcface_jax.models.mobilefacenet import ARCHITECTURES, Architecture


class Unit(nn.Module):
    """Convolution - BatchNorm - PReLU, or, if linear, without the PReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        padded: bool = True,
        linear: bool = False,
    ):
        super().__init__()
        padding = kernel // 2 if padded else 0
        self.layers = nn.Sequential(
            nn.Conv2d(
                in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False
            ),
            nn.BatchNorm2d(out_channels),
        )
        if not linear:
            self.layers.append(nn.PReLU(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, in, H, W) to (B, out, H / stride, W / stride)."""
        return self.layers(x)


class DepthWise(nn.Module):
    """1x1 to `width` channels, 3x3 on each of them, 1x1 to the output; added to x if residual."""

    def __init__(self, inputs: int, outputs: int, *, width: int, stride: int, residual=False):
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            Unit(inputs, width),
            Unit(width, width, kernel=3, stride=stride, groups=width),
            Unit(width, outputs, linear=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (n, C, H, W) to (n, C', H', W')."""
        return x + self.layers(x) if self.residual else self.layers(x)


class Residual(nn.Module):
    """Several residual blocks in a row."""

    def __init__(self, channels: int, *, blocks: int, width: int):
        super().__init__()
        block = {"width": width, "stride": 1, "residual": True}
        self.layers = nn.Sequential(
            *(DepthWise(channels, channels, **block) for _ in range(blocks))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (n, C, H, W) to (n, C', H', W')."""
        return self.layers(x)


class Features(nn.Module):
    """A 7x7 convolution of each channel, to the embedding."""

    def __init__(self, embedding_size: int):
        super().__init__()
        self.layers = nn.Sequential(
            Unit(512, 512, kernel=7, groups=512, padded=False, linear=True),
            nn.Flatten(),
            nn.Linear(512, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, 512, 7, 7) to (B, D)."""
        return self.layers(x)


class TorchMobileFaceNet(nn.Module):
    """Images (B, 3, 112, 112) in [-1, 1], RGB, to embeddings (B, D), not normalized."""

    def __init__(self, architecture: Architecture, *, embedding_size: int = 512):
        super().__init__()
        narrow, wide = 64 * architecture.scale, 128 * architecture.scale
        first, second, third, fourth = architecture.blocks
        self.layers = nn.ModuleList(
            [
                Unit(3, narrow, kernel=3, stride=2),
                Unit(narrow, narrow, kernel=3, groups=64)
                if first == 1
                else Residual(narrow, blocks=first, width=128),
                DepthWise(narrow, narrow, width=128, stride=2),
                Residual(narrow, blocks=second, width=128),
                DepthWise(narrow, wide, width=256, stride=2),
                Residual(wide, blocks=third, width=256),
                DepthWise(wide, wide, width=512, stride=2),
                Residual(wide, blocks=fourth, width=256),
            ]
        )
        self.conv_sep = Unit(wide, 512)
        self.features = Features(embedding_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (n, 3, 112, 112) float32 images to (n, D) embeddings, not normalized."""
        for layer in self.layers:
            x = layer(x)
        return self.features(self.conv_sep(x))


def build(network: str, *, embedding_size: int = 512) -> TorchMobileFaceNet:
    """Makes the twin of `arcface_jax.models.registry.build(network)`, without its weights."""
    return TorchMobileFaceNet(ARCHITECTURES[network], embedding_size=embedding_size)
