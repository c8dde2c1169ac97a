"""A small vision transformer for 28 × 28 images (Dosovitskiy et al. 2021); no class token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flipproof.models.transformer import Block

IMAGE, PATCH = 28, 4


class VisionTransformer(nn.Module):
    """49 tokens, one a patch of 4 × 4 pixels, learned positions, transformer blocks, one linear layer on the mean."""

    def __init__(self, num_classes: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.positions = nn.Parameter(torch.randn(1, (IMAGE // PATCH) ** 2, width) * 0.2)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 28, 28) to logits (N, classes)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        tokens = self.norm(self.blocks(tokens))
        logits: Tensor = self.classifier(tokens.mean(dim=1))
        return logits


def small_vit(num_classes: int = 10) -> VisionTransformer:
    """A vision transformer of width 64 with 4 heads and 4 blocks, untrained: 204,938 parameters for 10 classes.

    Example:
        >>> sum(p.numel() for p in small_vit().parameters())
        204938
    """
    return VisionTransformer(num_classes, width=64, heads=4, depth=4)
