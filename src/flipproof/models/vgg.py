"""VGG (Simonyan and Zisserman 2015) for 32 × 32 images, with the linear layers that the papers count."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

POOL = 0
VGG11 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
VGG16 = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512, POOL)


class VGG(nn.Module):
    """3 × 3 convolutions with five pools, then linear layers."""

    def __init__(
        self, widths: Sequence[int], hidden: Sequence[int], num_classes: int, batch_norm: bool, in_channels: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = in_channels
        for width in widths:
            if width == POOL:
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(nn.Conv2d(inputs, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width)] if batch_norm else []
            layers.append(nn.ReLU(inplace=True))
            inputs = width
        self.features = nn.Sequential(*layers)
        linear: list[nn.Module] = []
        for width in hidden:
            linear += [nn.Linear(inputs, width), nn.ReLU(inplace=True), nn.Dropout()]
            inputs = width
        self.classifier = nn.Sequential(*linear, nn.Linear(inputs, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, 32, 32) to logits (N, classes)."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def vgg11(
    num_classes: int = 10, *, batch_norm: bool = False, width: float = 1.0, hidden: Sequence[int] = (4096, 4096)
) -> VGG:
    """VGG-11 as FORTUNE counts it: 28,133,056 weights of Conv and Linear for 10 classes (512-4096-4096-10).

    Args:
        num_classes: outputs.
        batch_norm: normalise after every convolution.
        width: scales the channels of every convolution; 0.25 trains on two cores in minutes.
        hidden: widths of the linear layers before the last.

    Example:
        >>> sum(p.numel() for p in vgg11().parameters() if p.dim() > 1)
        28133056
    """
    return VGG(_scaled(VGG11, width), hidden, num_classes, batch_norm, 3)


def vgg16(num_classes: int = 10, *, batch_norm: bool = False, width: float = 1.0, hidden: Sequence[int] = ()) -> VGG:
    """VGG-16 as ProAct counts it: 14,719,818 parameters and 13 ReLU for 10 classes, one linear layer.

    `vgg16(100, batch_norm=True, hidden=(512,))` has DeepVigor's two linear layers (the paper gives no width).
    Arguments as for `vgg11`.

    Example:
        >>> sum(p.numel() for p in vgg16().parameters())
        14719818
    """
    return VGG(_scaled(VGG16, width), hidden, num_classes, batch_norm, 3)


def _scaled(widths: Sequence[int], by: float) -> list[int]:
    return [max(1, round(width * by)) if width != POOL else POOL for width in widths]
