"""scikit-learn's handwritten digits: 1,797 images of 8 × 8, embedded in the package, nothing to download."""

from __future__ import annotations

from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor


def digits(split: Literal["train", "test"] = "test", *, batch_size: int = 180) -> list[tuple[Tensor, Tensor]]:
    """Batches of the digits: every fifth image is test data (360 of them), the others train.

    Images are float32 (N, 1, 8, 8) in [0, 1]; targets int64 (N,) in 0…9.

    Args:
        split: "train" or "test".
        batch_size: images a batch.

    Example:
        >>> sum(len(targets) for _, targets in digits("test")), sum(len(targets) for _, targets in digits("train"))
        (360, 1437)
    """
    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(loaded.target, dtype=torch.int64)
    chosen = (torch.arange(len(labels)) % 5 == 0) == (split == "test")
    return list(zip(torch.split(images[chosen], batch_size), torch.split(labels[chosen], batch_size), strict=True))
