"""The vision transformers as torch modules whose `state_dict` has insightface's names.

For inference: without stochastic depth and masking, which only training uses.
"""

import torch
from torch import nn

from arcface_jax.models.vit import ARCHITECTURES, TOKENS, Architecture


class Attention(nn.Module):
    """Self-attention of eight heads."""

    def __init__(self, width: int, heads: int = 8):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, tokens, width) to the same shape."""
        shape = x.shape
        parts = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Named, because `torch.fx` (convert/torch_layers.py) does not trace `*parts`.
        queries, keys, values = parts.unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values)
        return self.proj(mixed.transpose(1, 2).reshape(shape))


class Mlp(nn.Module):
    """Two layers with ReLU6 between them."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, tokens, width) to the same shape."""
        return self.fc2(nn.functional.relu6(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width), Mlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, tokens, width) to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Squares of 9 x 9 pixels to tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, 9, stride=9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, 3, 112, 112) to (B, tokens, width)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TorchVisionTransformer(nn.Module):
    """Images (B, 3, 112, 112) in [-1, 1], RGB, to embeddings (B, D), not normalized."""

    def __init__(self, architecture: Architecture, *, embedding_size: int = 512):
        super().__init__()
        width = architecture.width
        self.patch_embed = PatchEmbed(width)
        self.pos_embed = nn.Parameter(torch.zeros(1, TOKENS, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(architecture.depth))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(TOKENS * width, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size, eps=2e-5),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (n, 3, 112, 112) float32 images to (n, D) embeddings, not normalized."""
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.feature(self.norm(x).flatten(1))


def build(network: str, *, embedding_size: int = 512) -> TorchVisionTransformer:
    """Makes the twin of `arcface_jax.models.registry.build(network)`, without its weights."""
    return TorchVisionTransformer(ARCHITECTURES[network], embedding_size=embedding_size)
