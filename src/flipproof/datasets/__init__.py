"""Data sets, as lists of `(inputs, targets)` batches."""

from flipproof.datasets.digits import digits

__all__ = ["digits"]
