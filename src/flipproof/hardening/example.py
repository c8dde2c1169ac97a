"""The shapes of a model's inputs, kept so that it can be run again when its data is gone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree


def shapes_of(inputs: Any) -> Any:
    """(shape, dtype) for each tensor; None for inputs that are more than tensors."""
    leaves, tree = pytree.tree_flatten(inputs, is_leaf=lambda node: isinstance(node, PackedSequence))
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return pytree.tree_unflatten([(tuple(leaf.shape), leaf.dtype) for leaf in leaves], tree)


def flat(example: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The (shape, dtype) pairs of an example, and how they belong together."""
    return pytree.tree_flatten(example, is_leaf=_is_shape)


def inputs_like(example: Any, device: torch.device) -> Any:
    """Seeded random floats, and zeros of any other type (a valid index), of the shapes of an example."""
    generator = torch.Generator().manual_seed(0)
    leaves, tree = flat(example)
    made = []
    for shape, dtype in leaves:
        floating = dtype.is_floating_point
        tensor = torch.randn(shape, generator=generator).to(dtype) if floating else torch.zeros(shape, dtype=dtype)
        made.append(tensor.to(device))
    return pytree.tree_unflatten(made, tree)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and len(leaf) == 2 and isinstance(leaf[1], torch.dtype)
