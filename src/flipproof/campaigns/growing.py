"""Running a batch with one sample more: what grows with it counts samples, whatever else has the same size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from flipproof.campaigns.batches import Output, call, pick


def grown(model: nn.Module, inputs: Any, size: int, output: Output) -> list[Callable[[], bool]]:
    """Functions that run a batch with its first sample twice.

    Inputs may count samples along another axis than the first (time first), and time may be as long as the batch: there
    is a function for each choice. It says whether the model then gave one answer more; what raises was no choice.
    """
    leaves, tree = pytree.tree_flatten(inputs, is_leaf=lambda node: isinstance(node, PackedSequence))
    choices = dict.fromkeys(tuple(_axis(leaf, size, preferred) for leaf in leaves) for preferred in (0, 1, 2))
    return [_run(model, leaves, tree, axes, size, output) for axes in choices if any(a is not None for a in axes)]


def _axis(leaf: Any, size: int, preferred: int) -> int | None:
    """The axis of this size, the preferred one if there are several."""
    if not isinstance(leaf, Tensor):
        return None
    fitting = [axis for axis, length in enumerate(leaf.shape) if length == size]
    return preferred if preferred in fitting else next(iter(fitting), None)


def _run(
    model: nn.Module, leaves: list[Any], tree: Any, axes: tuple[int | None, ...], size: int, output: Output
) -> Callable[[], bool]:
    def run() -> bool:
        rows = torch.tensor([*range(size), 0])
        more = [
            leaf if axis is None else leaf.index_select(axis, rows.to(leaf.device))
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        try:
            picked = pick(call(model, pytree.tree_unflatten(more, tree)), output)
        except Exception:  # a model made for one size of batch may refuse another in any way
            return False
        return picked.dim() > 0 and picked.shape[0] == size + 1

    return run
