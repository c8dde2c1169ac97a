"""Dropping masked rows on the way: where each sample has a fault of its own, many are gone behind the next ReLU.

At a cut behind the faulted layer the rows of all live values are compared with the golden ones, bit by bit; rows that
are equal take the golden outputs, the others go on in a smaller batch. A batch of another size may be computed by
another kernel, with other roundings. So a size is used only after golden rows, run from that cut in a batch of that
size, gave the golden outputs of the whole batch bit by bit; records are the same either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flipproof.campaigns.live import copied, rows_of, same
from flipproof.campaigns.suffix import Suffixes
from flipproof.outcomes import bit_pattern

_STEPS = 8
"""Sizes are multiples of this share of the batch: each has to be proven at each cut."""


def resume_rows(suffixes: Suffixes, cut: int, batch: int, size: int, change: Callable[[Any], Any]) -> Any:
    """What the model returns on a batch of `size` samples if the output of the layer right before a cut is changed."""
    live = copied(suffixes.cache(cut, batch))
    place = suffixes.place(cut)
    live[place] = change(live[place])
    look = suffixes.next_use(cut)
    if look is None:
        return suffixes.graph(cut)(*live)
    live = suffixes.step(cut, look)(*live)
    golden = suffixes.step(cut, look)(*copied(suffixes.cache(cut, batch)))
    changed = _changed(live, golden, size)
    if changed is None:
        return suffixes.graph(look)(*live)
    if not changed.numel():
        return copied(suffixes.golden(batch))
    kept = next(
        (s for s in _sizes(size) if changed.numel() <= s and _proven(suffixes, look, batch, s, size, golden)), size
    )
    if kept == size:
        return suffixes.graph(look)(*live)
    equal = torch.ones(size, dtype=torch.bool)
    equal[changed] = False
    rows = torch.cat([changed, equal.nonzero()[: kept - changed.numel(), 0]])  # golden rows fill it up
    return _merged(suffixes.golden(batch), suffixes.graph(look)(*rows_of(live, rows, size)), rows, size)


def _sizes(size: int) -> list[int]:
    return sorted({size * k // _STEPS for k in range(1, _STEPS)} - {0})


def _changed(live: list[Any], golden: list[Any], size: int) -> Tensor | None:
    """Rows that differ from the golden ones; None if that cannot be told row by row."""
    differing = torch.zeros(size, dtype=torch.bool)
    for here, there in zip(pytree.tree_leaves(live), pytree.tree_leaves(golden), strict=True):
        if not isinstance(there, Tensor) or there.dim() == 0 or there.shape[0] != size:
            if not same(here, there):
                return None
            continue
        if not isinstance(here, Tensor) or here.dtype != there.dtype or here.shape != there.shape or here.is_complex():
            return None
        if here.is_floating_point():
            here, there = bit_pattern(here), bit_pattern(there)
        differing |= (here != there).reshape(size, -1).any(dim=1).cpu()
    return differing.nonzero()[:, 0]


def _proven(suffixes: Suffixes, cut: int, batch: int, kept: int, size: int, live: list[Any]) -> bool:
    """Whether golden rows in a batch of `kept` give the golden outputs of the whole batch, in other places too."""
    golden = suffixes.golden(batch)
    key = (cut, kept, size)
    if key not in suffixes.row_wise:
        rows = torch.arange(size).flip(0)[:kept]
        try:
            found = suffixes.graph(cut)(*rows_of(copied(live), rows, size))
            suffixes.row_wise[key] = same(_merged(golden, found, rows, size), golden)
        except Exception:  # whatever refuses a smaller batch is run with the whole one
            suffixes.row_wise[key] = False
    return suffixes.row_wise[key]


def _merged(golden: Any, found: Any, rows: Tensor, size: int) -> Any:
    """Golden outputs with these rows replaced.

    Raises:
        ValueError: if something that is returned has not one row a sample.
    """

    def put(there: Any, here: Any) -> Any:
        if isinstance(there, Tensor) and there.dim() and there.shape[0] == size:
            whole = there.clone()
            whole[rows.to(there.device)] = here
            return whole
        if not same(there, here):
            raise ValueError("an output that is not one row a sample depends on the batch")
        return there

    return pytree.tree_map(put, golden, found)
