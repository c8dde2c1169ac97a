"""Where each bit of a tensor's words lies in the stream of its stored bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Whole = NDArray[np.int64]
"""Whole numbers: positions in the stream, values, bits."""


@dataclass(frozen=True)
class Layout:
    """The words of a tensor one behind the other, without a gap; words of a block may differ in width.

    Word v lies at bits `first(v)` to `first(v) + width(v) − 1` of the stream, its bit 0 first. The widths repeat from
    block to block; what is left over at the end of the tensor may be a block of another kind.

    Attributes:
        block: stored bits of each word of a block; one entry where all words are equally wide.
        blocks: how many blocks there are.
        tail: stored bits of each word behind them.

    Example:
        >>> shared = Layout(block=(5, 5, 4, 4), blocks=2, tail=(5, 5, 4, 4, 4))  # two check bits a block
        >>> shared.values, shared.bits, shared.widest
        (13, 58, 5)
        >>> [part.tolist() for part in shared.locate(np.array([4, 18, 57]))]  # (values, bits)
        [[0, 4, 12], [4, 0, 3]]
        >>> Layout.even(values=3, width=5).bits
        15
    """

    block: tuple[int, ...]
    blocks: int
    tail: tuple[int, ...] = ()

    @classmethod
    def even(cls, values: int, width: int) -> Layout:
        """Every word of the same width."""
        return cls((width,), values)

    @property
    def values(self) -> int:
        """Words in all."""
        return len(self.block) * self.blocks + len(self.tail)

    @cached_property
    def bits(self) -> int:
        """Stored bits in all: exactly so many."""
        return self._body + sum(self.tail)

    @cached_property
    def widest(self) -> int:
        """Stored bits of the widest word, of a block or behind them."""
        return max(*self.block, *self.tail, 0)

    @property
    def is_even(self) -> bool:
        """Whether bit b of word v is simply bit v · width + b."""
        return len(self.block) == 1 and not self.tail

    @cached_property
    def starts(self) -> tuple[Whole, Whole]:
        """First bit of each word within a block, and within the tail; each with the end behind them."""
        return np.cumsum([0, *self.block], dtype=np.int64), np.cumsum([0, *self.tail], dtype=np.int64)

    @cached_property
    def _body(self) -> int:
        return sum(self.block) * self.blocks

    def locate(self, positions: Whole) -> tuple[Whole, Whole]:
        """The word each of these bits belongs to, and which of its bits it is."""
        if self.is_even:
            value, bit = np.divmod(positions, self.block[0])
            return value, bit
        starts, ends = self.starts
        if self.blocks:
            block, inside = np.divmod(positions, starts[-1])
            word = np.searchsorted(starts, inside, side="right") - 1
            value, bit = block * len(self.block) + word, inside - starts[word]
        else:
            value, bit = np.zeros_like(positions), np.zeros_like(positions)
        if self.tail:
            last = positions >= self._body
            inside = positions[last] - self._body
            word = np.searchsorted(ends, inside, side="right") - 1
            value[last], bit[last] = len(self.block) * self.blocks + word, inside - ends[word]
        return value, bit

    def first(self, values: Whole) -> Whole:
        """The position of bit 0 of each of these words."""
        starts, ends = self.starts
        block, word = np.divmod(values, len(self.block))
        found: Whole = block * starts[-1] + starts[word]
        if self.tail:
            inside = values - len(self.block) * self.blocks
            found = np.where(inside >= 0, self._body + ends[inside.clip(0)], found)
        return found

    def width(self, values: Whole) -> Whole:
        """Stored bits of each of these words."""
        widths: Whole = np.array(self.block, np.int64)[values % len(self.block)]
        if self.tail:
            inside = values - len(self.block) * self.blocks
            widths = np.where(inside >= 0, np.array(self.tail, np.int64)[inside.clip(0)], widths)
        return widths
