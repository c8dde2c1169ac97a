"""Data sets, as lists of `(inputs, targets)` batches."""

from flipproof.datasets.digits import digits
from flipproof.datasets.vision import cifar10, cifar100, fashion_mnist, mnist

__all__ = ["cifar10", "cifar100", "digits", "fashion_mnist", "mnist"]
