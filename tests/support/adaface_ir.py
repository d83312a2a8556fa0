"""The IR networks of AdaFace in torch, with its names and its BGR input, to test the import by.

Written after the description in Kim et al., "AdaFace" (CVPR 2022) and its published module names.
"""

import torch
from torch import nn


class Unit(nn.Module):
    """BatchNorm - convolution - BatchNorm - PReLU - convolution - BatchNorm, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        same = inputs == outputs
        projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.shortcut_layer = (
            nn.MaxPool2d(1, stride) if same else nn.Sequential(projection, nn.BatchNorm2d(outputs))
        )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut_layer(x) + self.res_layer(x)


class AdaFaceIR(nn.Module):
    """(B, 3, 112, 112) BGR in [-1, 1] to (B, D), not normalized."""

    def __init__(self, blocks: tuple[int, ...], widths: tuple[int, ...], embedding_size: int):
        super().__init__()
        stem = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.input_layer = nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.PReLU(widths[0]))
        units, channels = [], widths[0]
        for count, width in zip(blocks, widths, strict=True):
            for number in range(count):
                units.append(Unit(channels, width, 1 if number else 2))
                channels = width
        self.body = nn.Sequential(*units)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(channels * 49, embedding_size),
            nn.BatchNorm1d(embedding_size, affine=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output_layer(self.body(self.input_layer(x)))


def with_statistics(module: nn.Module, images: torch.Tensor) -> nn.Module:
    """The module in evaluation mode, its BatchNorm statistics those of one training pass."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = 1.0
    with torch.no_grad():
        module.train()(images)
    return module.eval()
