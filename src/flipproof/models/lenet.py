"""LeNet-5 (LeCun et al. 1998) with ReLU, as DeepVigor counts it: 6,508 hidden neurons."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class LeNet5(nn.Module):
    """conv 6 – pool – conv 16 – pool – conv 120 – 84 – classes: three convolutions, two pools, two linear layers.

    28 × 28 images are padded by 2 on each side in the first convolution, so that 28 × 28 and 32 × 32 images give the
    same maps from there on.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=(32 - image_size) // 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.conv3 = nn.Conv2d(16, 120, 5)
        self.fc1 = nn.Linear(120, 84)
        self.fc2 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_channels, image_size, image_size) to logits (N, classes)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x)).flatten(1)
        logits: Tensor = self.fc2(F.relu(self.fc1(x)))
        return logits


def lenet5(num_classes: int = 10, *, in_channels: int = 1, image_size: int = 28) -> LeNet5:
    """LeNet-5 for MNIST (28 × 28 × 1); `lenet5(in_channels=3, image_size=32)` for CIFAR-10.

    Raises:
        ValueError: if the images are neither 28 nor 32 pixels wide.

    Example:
        >>> sum(p.numel() for p in lenet5().parameters())
        61706
    """
    if image_size not in (28, 32):
        raise ValueError(f"lenet5 takes images of 28 × 28 or 32 × 32, got image_size={image_size}")
    return LeNet5(num_classes, in_channels, image_size)
