"""A small CNN for scikit-learn's 8 × 8 digits: trained in seconds, big enough to behave like a network."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class DigitsCNN(nn.Module):
    """conv 16 – conv 32 – max pool – 64 – classes, ReLU between; 38,282 parameters for 10 classes."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 4 * 4, 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) to logits (N, classes)."""
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits


def digits_cnn(num_classes: int = 10) -> DigitsCNN:
    """The CNN of `flipproof demo`, untrained.

    Example:
        >>> sum(p.numel() for p in digits_cnn().parameters())
        38282
    """
    return DigitsCNN(num_classes)
