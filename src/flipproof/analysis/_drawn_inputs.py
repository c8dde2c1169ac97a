"""A random part of the inputs, in random order: what an estimate draws from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flipproof.faults.sampling import TrialGenerator
from flipproof.running.data import Batches
from flipproof.running.values import rows_of

BATCH = 128
"""Inputs of a batch made of drawn ones."""


def drawn(batches: Batches, most: int, seed: int) -> tuple[Batches, Tensor]:
    """A random part of the inputs, so that nothing is computed about the others, and a random order of them.

    Inputs that are tensors of one shape are put into batches of `BATCH` in the order drawn. Batches of other kinds are
    thinned out where every tensor in them holds one row a sample, and else stay whole.

    Args:
        batches: all there are.
        most: how many inputs are wanted at most.
        seed: of the draw.

    Returns:
        The batches, and int64 positions in them in random order; with the first n, n inputs are drawn without
        replacement.
    """
    order = _shuffled(batches.samples, seed)
    if not all(map(_one_row_a_sample, batches.inputs, batches.sizes)):
        return batches, order[:most]
    order = order[:most]
    parts: list[Any] = []
    chosen: list[Tensor] = []
    for i, inputs in enumerate(batches.inputs):
        part = batches.part(i)
        mine = order[(order >= part.start) & (order < part.stop)]
        if mine.numel():
            parts.append(rows_of(inputs, mine - part.start, batches.sizes[i]))
            chosen.append(mine)
    together = torch.cat(chosen)
    place = torch.empty(batches.samples, dtype=torch.int64)
    place[together] = torch.arange(order.numel())
    try:
        whole = pytree.tree_map(lambda *leaves: torch.cat(leaves), *parts)
    except (ValueError, RuntimeError):  # batches of different shapes stay apart
        sizes = tuple(mine.numel() for mine in chosen)
        return Batches(tuple(parts), sizes, batches.targets[together]), place[order]
    rows = torch.split(order, BATCH)
    inputs = tuple(rows_of(whole, place[some], order.numel()) for some in rows)
    return Batches(inputs, tuple(map(len, rows)), batches.targets[order]), torch.arange(order.numel())


def _shuffled(count: int, seed: int) -> Tensor:
    keys = TrialGenerator(seed, "inputs", 0).below(2**62, count)
    return torch.from_numpy(keys).argsort(stable=True)


def _one_row_a_sample(inputs: Any, size: int) -> bool:
    leaves = pytree.tree_leaves(inputs)
    return all(isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size for leaf in leaves)
