"""EdgeFace as a torch module whose `state_dict` has the published one's names."""

import torch
from torch import nn

from arcface_jax.models.edgeface import (
    ARCHITECTURES,
    Architecture,
    low_rank,
    positions,
    slice_widths,
)

_KERNELS, _SLICES, _SIDES = (3, 5, 7, 9), (0, 2, 3, 4), (28, 14, 7, 3)
_EPSILON = 1e-6


class LowRank(nn.Module):
    """A linear layer as the product of two."""

    def __init__(self, inputs: int, outputs: int, ratio: float):
        super().__init__()
        rank = low_rank(inputs, outputs, ratio)
        self.linear1 = nn.Linear(inputs, rank, bias=False)
        self.linear2 = nn.Linear(rank, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (..., inputs) to (..., outputs)."""
        return self.linear2(self.linear1(x))


class Mlp(nn.Module):
    """Two layers with GELU between them."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        self.fc1 = LowRank(width, 4 * width, ratio)
        self.fc2 = LowRank(4 * width, width, ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (..., width) to the same shape."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class ChannelAttention(nn.Module):
    """Attention in which the channels of a head look at each other."""

    def __init__(self, width: int, heads: int, ratio: float):
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = LowRank(width, 3 * width, ratio)
        self.proj = LowRank(width, width, ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, tokens, width) to the same shape."""
        parts = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 4, 1)
        queries, keys, values = parts.unbind(0)
        queries, keys = (nn.functional.normalize(part, dim=-1) for part in (queries, keys))
        scores = queries @ keys.transpose(-2, -1) * self.temperature
        mixed = scores.softmax(-1) @ values
        return self.proj(mixed.permute(0, 3, 1, 2).flatten(2))


class ConvBlock(nn.Module):
    """x + gamma * mlp(norm(convolution of each channel))."""

    def __init__(self, width: int, ratio: float, *, kernel: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=_EPSILON)
        self.mlp = Mlp(width, ratio)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, width, H, W) to the same shape."""
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
        return x + (self.gamma * y).permute(0, 3, 1, 2)


class Positions(nn.Module):
    """A linear map of the tokens' sines and cosines."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.token_projection = nn.Conv2d(64, width, 1)
        self.side = side

    def forward(self, like: torch.Tensor) -> torch.Tensor:
        """Returns (1, width, side, side) on the device and of the type of `like`."""
        table = torch.as_tensor(positions(self.side).transpose(2, 0, 1)[None].copy())
        return self.token_projection(table.to(like))


class AttentionBlock(nn.Module):
    """Convolutions of slices of the channels, one added to the next, then attention and mlp."""

    def __init__(
        self, width: int, heads: int, ratio: float, *, slices: int, positions: Positions | None
    ):
        super().__init__()
        self.widths = slice_widths(width, slices)
        self.convs = nn.ModuleList(
            nn.Conv2d(each, each, 3, padding=1, groups=each) for each in self.widths[:-1]
        )
        self.pos_embd = positions
        self.norm_xca = nn.LayerNorm(width, eps=_EPSILON)
        self.gamma_xca = nn.Parameter(torch.zeros(width))
        self.xca = ChannelAttention(width, heads, ratio)
        self.norm = nn.LayerNorm(width, eps=_EPSILON)
        self.mlp = Mlp(width, ratio)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, width, H, W) to the same shape."""
        slices = x.split(self.widths, 1)
        mixed: list[torch.Tensor] = []
        for number, conv in enumerate(self.convs):
            mixed.append(conv(slices[number] + mixed[-1] if mixed else slices[number]))
        y = torch.cat([*mixed, slices[len(mixed)]], 1)
        if self.pos_embd is not None:
            y = y + self.pos_embd(y)
        y = y.flatten(2).transpose(1, 2)
        y = y + self.gamma_xca * self.xca(self.norm_xca(y))
        y = self.gamma * self.mlp(self.norm(y))
        return x + y.transpose(1, 2).reshape(x.shape)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm of the channels of (B, channels, H, W)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalizes the channels of (B, channels, H, W)."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks at half the resolution; the first stage keeps it."""

    def __init__(self, number: int, architecture: Architecture):
        super().__init__()
        widths, ratio, slices = architecture.widths, architecture.rank, _SLICES[number]
        width = widths[number]
        self.downsample = nn.Sequential()
        if number:
            self.downsample.append(ChannelNorm(widths[number - 1], eps=_EPSILON))
            self.downsample.append(nn.Conv2d(widths[number - 1], width, 2, stride=2))
        self.blocks = nn.Sequential(
            *(
                ConvBlock(width, ratio, kernel=_KERNELS[number])
                for _ in range(architecture.depths[number] - bool(slices))
            )
        )
        if slices:
            places = Positions(width, _SIDES[number]) if number == 1 else None
            last = AttentionBlock(width, architecture.heads, ratio, slices=slices, positions=places)
            self.blocks.append(last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, channels, H, W) to (B, width, H / 2, W / 2); the first stage keeps H and W."""
        return self.blocks(self.downsample(x))


class Head(nn.Module):
    """LayerNorm of the mean over all places, and a linear layer."""

    def __init__(self, width: int, embedding_size: int, ratio: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=_EPSILON)
        self.fc = LowRank(width, embedding_size, ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, width, H, W) to (B, D)."""
        return self.fc(self.norm(x.mean((2, 3))))


class EdgeNeXt(nn.Module):
    """Stem, four stages, head."""

    def __init__(self, architecture: Architecture, embedding_size: int):
        super().__init__()
        widths = architecture.widths
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0], eps=_EPSILON)
        )
        self.stages = nn.Sequential(*(Stage(number, architecture) for number in range(4)))
        self.head = Head(widths[-1], embedding_size, architecture.rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, 3, 112, 112) to (B, D)."""
        return self.head(self.stages(self.stem(x)))


class TorchEdgeFace(nn.Module):
    """Images (B, 3, 112, 112) in [-1, 1], RGB, to embeddings (B, D), not normalized."""

    def __init__(self, architecture: Architecture, *, embedding_size: int = 512):
        super().__init__()
        self.model = EdgeNeXt(architecture, embedding_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, 3, 112, 112) in [-1, 1] to (B, D)."""
        return self.model(x)


def build(network: str, *, embedding_size: int = 512) -> TorchEdgeFace:
    """Makes the twin of `arcface_jax.models.registry.build(network)`, without its weights."""
    return TorchEdgeFace(ARCHITECTURES[network], embedding_size=embedding_size)
