"""Values that are live at a cut of a graph: copied, compared bit by bit, weighed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flipproof._tensors import copy_alike, same_bits

PLAIN = (int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device)


def separate(live: list[Any]) -> bool:
    """Whether these are tensors with memory of their own, and plain values."""
    leaves = pytree.tree_leaves(live)
    if not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
        return False
    storages = [leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel()]
    return len(set(storages)) == len(storages)


Copies = dict[int, tuple[int, Tensor, Tensor]]
"""Identity of a tensor → (version copied, copy, the tensor itself, so that its identity stays taken)."""


def copied(value: Any, known: Copies | None = None) -> Any:
    """Copies of all tensors in `value`; through `known`, one copy serves all cuts until the original changes."""

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if known is None:
            return copy_alike(leaf)
        entry = known.get(id(leaf))
        if entry is None or entry[0] != leaf._version:
            entry = known[id(leaf)] = (leaf._version, copy_alike(leaf), leaf)
        return entry[1]

    return pytree.tree_map(copy, value)


def rows_of(value: Any, rows: Tensor, size: int) -> Any:
    """These samples of all tensors of a batch of `size` in `value`; anything else as it is."""

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size:
            return leaf.index_select(0, rows.to(leaf.device))
        return leaf

    return pytree.tree_map(take, value)


def same(left: Any, right: Any) -> bool:
    """Whether both hold the same bits: −0.0 is not 0.0, a NaN is itself, and what is not known to be equal is not."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.dtype != right.dtype or left.shape != right.shape or left.is_complex():
            return False
        plain = left.is_floating_point() and left.device == right.device
        return same_bits(left, right) if plain else torch.equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return isinstance(left, PLAIN) and bool(left == right)


def bytes_of(values: list[Any]) -> int:
    """Bytes of all tensors in these values."""
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))
