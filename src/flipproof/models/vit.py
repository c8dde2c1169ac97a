"""A small vision transformer for images of 28 × 28 or 32 × 32 (Dosovitskiy et al. 2021); no class token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flipproof.models.transformer import Block

PATCH = 4


class VisionTransformer(nn.Module):
    """A token a patch of 4 × 4 pixels, learned positions, transformer blocks, one linear layer on the mean."""

    def __init__(
        self, num_classes: int, width: int, heads: int, depth: int, image: int = 28, channels: int = 1
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, PATCH, stride=PATCH)
        self.positions = nn.Parameter(torch.randn(1, (image // PATCH) ** 2, width) * 0.2)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, image, image) to logits (N, classes)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        tokens = self.norm(self.blocks(tokens))
        logits: Tensor = self.classifier(tokens.mean(dim=1))
        return logits


def small_vit(num_classes: int = 10, image: int = 28, channels: int = 1) -> VisionTransformer:
    """A vision transformer of width 64 with 4 heads and 4 blocks, untrained: 204,938 parameters for 10 classes.

    Args:
        num_classes: logits that it gives.
        image: pixels along a side, a multiple of 4.
        channels: of an image.

    Example:
        >>> sum(p.numel() for p in small_vit().parameters())
        204938
        >>> small_vit(image=32, channels=3)(torch.zeros(2, 3, 32, 32)).shape  # CIFAR-10
        torch.Size([2, 10])
    """
    return VisionTransformer(num_classes, width=64, heads=4, depth=4, image=image, channels=channels)
