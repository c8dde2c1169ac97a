"""Inception-v3 for 32 × 32 images (Szegedy et al. 2016), as FORTUNE counts it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Size = int | tuple[int, int]


def _conv(inputs: int, outputs: int, kernel: Size, *, stride: int = 1, padding: Size = 0) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False),
        nn.BatchNorm2d(outputs, eps=0.001),
        nn.ReLU(inplace=True),
    )


def _wide(inputs: int, outputs: int, length: int) -> nn.Sequential:
    return _conv(inputs, outputs, (1, length), padding=(0, length // 2))


def _tall(inputs: int, outputs: int, length: int) -> nn.Sequential:
    return _conv(inputs, outputs, (length, 1), padding=(length // 2, 0))


def _pooled(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), _conv(inputs, outputs, 1))


class Branches(nn.Module):
    """Branches over the same input, their maps one behind the other."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, sum of the branches' channels, H', W')."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def _block_a(inputs: int, pooled: int) -> Branches:
    return Branches(
        _conv(inputs, 64, 1),
        nn.Sequential(_conv(inputs, 48, 1), _conv(48, 64, 5, padding=2)),
        nn.Sequential(_conv(inputs, 64, 1), _conv(64, 96, 3, padding=1), _conv(96, 96, 3, padding=1)),
        _pooled(inputs, pooled),
    )


def _block_b(inputs: int) -> Branches:
    return Branches(
        _conv(inputs, 384, 3, stride=2),
        nn.Sequential(_conv(inputs, 64, 1), _conv(64, 96, 3, padding=1), _conv(96, 96, 3, stride=2)),
        nn.MaxPool2d(3, stride=2),
    )


def _block_c(inputs: int, inner: int) -> Branches:
    return Branches(
        _conv(inputs, 192, 1),
        nn.Sequential(_conv(inputs, inner, 1), _wide(inner, inner, 7), _tall(inner, 192, 7)),
        nn.Sequential(
            *(_conv(inputs, inner, 1), _tall(inner, inner, 7), _wide(inner, inner, 7)),
            *(_tall(inner, inner, 7), _wide(inner, 192, 7)),
        ),
        _pooled(inputs, 192),
    )


def _block_d(inputs: int) -> Branches:
    return Branches(
        nn.Sequential(_conv(inputs, 192, 1), _conv(192, 320, 3, stride=2)),
        nn.Sequential(_conv(inputs, 192, 1), _wide(192, 192, 7), _tall(192, 192, 7), _conv(192, 192, 3, stride=2)),
        nn.MaxPool2d(3, stride=2),
    )


def _block_e(inputs: int) -> Branches:
    def both() -> Branches:
        return Branches(_wide(384, 384, 3), _tall(384, 384, 3))

    return Branches(
        _conv(inputs, 320, 1),
        nn.Sequential(_conv(inputs, 384, 1), both()),
        nn.Sequential(_conv(inputs, 448, 1), _conv(448, 384, 3, padding=1), both()),
        _pooled(inputs, 192),
    )


def inception_v3(num_classes: int = 10) -> nn.Sequential:
    """Inception-v3 whose stem is one 3 × 3 convolution to 192 channels, for 32 × 32 × 3 images.

    21,604,928 weights of Conv and Linear for 10 classes, the count behind FORTUNE's Table II (its 8-bit row counts two
    layers twice). No auxiliary classifier.

    Example:
        >>> sum(p.numel() for p in inception_v3().parameters() if p.dim() > 1)
        21604928
    """
    return nn.Sequential(
        _conv(3, 192, 3, padding=1),
        *(_block_a(192, 32), _block_a(256, 64), _block_a(288, 64), _block_b(288)),
        *(_block_c(768, 128), _block_c(768, 160), _block_c(768, 160), _block_c(768, 192), _block_d(768)),
        *(_block_e(1280), _block_e(2048)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(2048, num_classes)),
    )
