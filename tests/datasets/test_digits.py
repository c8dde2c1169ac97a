from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from flipproof.datasets import digits


def test_train_and_test_are_all_of_scikit_learns_digits_once():
    raw = load_digits()
    parts = {split: digits(split, batch_size=100) for split in ("train", "test")}
    images = {split: torch.cat([x for x, _ in batches]) for split, batches in parts.items()}
    labels = {split: torch.cat([y for _, y in batches]) for split, batches in parts.items()}
    assert all(len(x) <= 100 for batches in parts.values() for x, _ in batches)
    np.testing.assert_array_equal(images["test"][:, 0].numpy() * 16, raw.images[::5])
    np.testing.assert_array_equal(labels["test"].numpy(), raw.target[::5])
    rest = np.delete(np.arange(1797), np.arange(0, 1797, 5))
    np.testing.assert_array_equal(images["train"][:, 0].numpy() * 16, raw.images[rest])
    np.testing.assert_array_equal(labels["train"].numpy(), raw.target[rest])


def test_types_and_ranges():
    x, y = digits()[0]
    assert (x.dtype, y.dtype, tuple(x.shape[1:])) == (torch.float32, torch.int64, (1, 8, 8))
    assert 0 <= x.min() < x.max() <= 1
    assert set(torch.cat([y for _, y in digits()]).tolist()) == set(range(10))
