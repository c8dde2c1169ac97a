"""The CIFAR ResNets of He et al. 2016, section 4.2, 6n+2 layers with shortcuts that have no parameters (option A).

Module names follow the widely used checkpoints for them (`conv1`, `layer1.0.conv1`, …, `linear`), so that
`flipproof.models.load_weights` reads those.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class PlainShortcutBlock(nn.Module):
    """Two 3 × 3 convolutions; the shortcut subsamples and pads channels with zeros (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """A stem, three stages of 16, 32 and 64 channels, global average pooling and one linear layer."""

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            layers: list[nn.Module] = []
            for index in range(blocks):
                layers.append(PlainShortcutBlock(inputs, width, 2 if index == 0 and stage > 1 else 1))
                inputs = width
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) to logits (N, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 4):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def resnet20(num_classes: int = 10) -> CifarResNet:
    """ResNet-20: 269,722 parameters for 10 classes.

    Example:
        >>> sum(p.numel() for p in resnet20().parameters())
        269722
    """
    return CifarResNet(3, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """ResNet-56: 853,018 parameters for 10 classes.

    Example:
        >>> sum(p.numel() for p in resnet56().parameters())
        853018
    """
    return CifarResNet(9, num_classes)
