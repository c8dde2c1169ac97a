"""Spaces of what a model computes, as it is on given batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from flipproof._hooks import check_hooks_run
from flipproof.errors import DataError
from flipproof.running.data import Batches, Output, call, pick
from flipproof.running.snapshots import Snapshot
from flipproof.spaces.contract import Forwards, Space, Where
from flipproof.spaces.neurons import NeuronSpace
from flipproof.spaces.sites import Neurons
from flipproof.spaces.tensors import FormatChoice


def neuron_space(
    model: nn.Module, batches: Batches, where: Neurons, format: FormatChoice, output: Output = None
) -> NeuronSpace:
    """The space of a model's neurons on these batches; `output` picks what tells how many samples were answered.

    Raises:
        DataError: if the model rejects a batch.
        ModelError: if the model is compiled.
    """
    check_hooks_run(model)
    state = Snapshot(model)
    try:
        more = grown(model, batches.inputs[0], batches.sizes[0], output)
        return NeuronSpace(model, _forwards(model, batches), where=where, format=format, grown=more)
    finally:
        state.verify()


def own_space(model: nn.Module, batches: Batches, where: Where, format: FormatChoice) -> Space:
    """The space that `where` makes of a model; what it wrote to the model is put back.

    Raises:
        DataError: if the model rejects a batch.
    """
    state = Snapshot(model)
    try:
        return where.space(model, format, _forwards(model, batches))
    finally:
        state.verify()


def _forwards(model: nn.Module, batches: Batches) -> Forwards:
    def run(i: int) -> None:
        try:
            call(model, batches.inputs[i])
        except (RuntimeError, TypeError, ValueError) as error:
            raise DataError(f"the model rejects batch {i}: {type(error).__name__}: {error}") from error

    return [(partial(run, i), size) for i, size in enumerate(batches.sizes)]


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
