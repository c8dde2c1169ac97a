"""What compiled passes over words share: when they may run, and looking values up instead of computing them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flipproof._kernels import kernel
from flipproof.formats.base import Coding, Format, word_dtype

_WIDEST_TABLE = 16
_SMALLEST = 4096
"""Words below which nobody waits for a computation."""


def in_reach(words: Tensor) -> bool:
    """True where a compiled pass may read the memory: a plain tensor on the CPU, nobody tracing."""
    return type(words) is Tensor and words.device.type == "cpu" and not torch.compiler.is_compiling()


def unsigned_array(words: Tensor) -> NDArray[Any]:
    """Flat words as an unsigned array over the same memory; a copy only where memory has gaps."""
    array = words.detach().contiguous().numpy()
    return array.view(f"u{array.itemsize}")


def by_table(format: Format, words: Tensor, coding: Coding, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`format.read`, by a table of all its words where that is quicker: narrow words, many of them, on the CPU."""
    reads = in_reach(words) and words.is_contiguous() and format.together == 1
    values = table_of(format, words.numel(), coding, dtype) if reads else None
    if values is None:
        return format.read(words, coding, dtype)
    out = torch.empty(words.shape)
    flat = unsigned_array(words.reshape(-1))
    _gather(flat, values, words.numel() // len(values), out.view(-1).numpy())
    return out, None


def table_of(format: Format, count: int, coding: Coding, dtype: torch.dtype) -> NDArray[np.float32] | None:
    """What each word reads as, a row for each entry of the coding; None where `count` words are read without sooner."""
    rows = max((c.numel() for c in coding), default=1)
    entries = rows << format.width if format.width <= _WIDEST_TABLE else 0
    if not entries or count < max(_SMALLEST, 4 * entries) or dtype != torch.float32:
        return None
    every = torch.arange(1 << format.width).to(word_dtype(format.width))
    shaped = tuple(c.reshape(-1, 1) if c.dim() else c for c in coding)
    values, lost = format.read(every.expand(rows, -1), shaped, dtype)
    if lost is not None:
        return None
    table: NDArray[np.float32] = values.contiguous().numpy()
    return table


@kernel()
def _gather(words: Any, table: Any, slice_size: int, out: Any) -> None:
    for row in range(table.shape[0]):
        values = table[row]
        for v in range(row * slice_size, (row + 1) * slice_size):
            out[v] = values[words[v]]
