"""AlexNet (Krizhevsky et al. 2012) in the two forms that the papers count."""

from __future__ import annotations

from torch import Tensor, nn


class AlexNet(nn.Module):
    """Convolutions, then linear layers."""

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes)."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def alexnet(num_classes: int = 10, *, batch_norm: bool = False) -> AlexNet:
    """AlexNet for 32 × 32 × 3 images, as ProAct counts it: 23,272,266 parameters and 7 ReLU for 10 classes.

    Args:
        num_classes: outputs.
        batch_norm: normalise after the first two convolutions, as DeepVigor's does.

    Example:
        >>> sum(p.numel() for p in alexnet().parameters())
        23272266
    """
    features = nn.Sequential(
        *(nn.Conv2d(3, 64, 3, stride=2, padding=1), *_norm(64, batch_norm), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 192, 3, padding=2), *_norm(192, batch_norm), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    )
    return AlexNet(features, _classifier(256 * 2 * 2, num_classes))


def alexnet_227(num_classes: int = 10) -> AlexNet:
    """AlexNet for 227 × 227 × 1 images, as FORTUNE counts it: 58,289,504 weights of Conv and Linear for 10 classes.

    Example:
        >>> sum(p.numel() for p in alexnet_227().parameters() if p.dim() > 1)
        58289504
    """
    features = nn.Sequential(
        *(nn.Conv2d(1, 96, 11, stride=4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(96, 256, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(384, 384, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
    )
    return AlexNet(features, _classifier(256 * 6 * 6, num_classes))


def _norm(channels: int, wanted: bool) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels)] if wanted else []


def _classifier(inputs: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Dropout(), nn.Linear(inputs, 4096), nn.ReLU(inplace=True)),
        *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(inplace=True)),
        nn.Linear(4096, num_classes),
    )
