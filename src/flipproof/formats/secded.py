"""SECDED: the extended Hamming code that protects most real memories, per word or over a block of words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats.base import Format
from flipproof.formats.layout import Layout
from flipproof.formats.protected import Protected, parity


@dataclass(frozen=True)
class SECDED(Protected):
    """Extended Hamming code: corrects one fault a code word, detects two (single error correct, double error detect).

    D data bits get r check bits with 2^r ≥ D + r + 1, and one bit of overall parity: (39, 32) for Float32, (13, 8) for
    8-bit words. A code word with two faults reads as 0.0. Three faults and more may be taken for one and miscorrected,
    as in any SECDED memory.

    With `block`, as many consecutive words as fit into that many data bits share one code word: server memory's
    (72, 64) is ``SECDED(Affine(bits=8), block=64)``, 9 bits a weight, not 13. A detected double fault then reads as 0.0
    in all words of the block. Words left over at the end of a tensor belong to its last block, which is longer. The
    check bits lie above the inner words, ⌈check bits / words⌉ in each of the first ones, and none in those behind: (39,
    32) over four 8-bit words stores words of 10, 10, 10 and 9 bits, 9.75 a value, and `width` is 10.

    Args:
        inner: the format that is protected.
        block: data bits that share a code word; None codes each word by itself.

    Raises:
        FormatError: for words beyond 64 bits, a block that is smaller than a word, or a tensor smaller than a block.

    Example:
        >>> import flipproof as fp, torch
        >>> code = fp.SECDED(fp.Float32())
        >>> stored = code.encode(torch.tensor([0.5]))
        >>> code.width, stored.decode_at(torch.tensor([0]), stored.words ^ (1 << 30))
        (39, tensor([0.5000]))
        >>> stored.decode_at(torch.tensor([0]), stored.words ^ (1 << 30) ^ 1)  # two faults
        tensor([0.])
        >>> server = fp.SECDED(fp.Affine(bits=8), block=64)
        >>> server.width, server.layout(values=800).bits / 800
        (9, 9.0)
        >>> fp.SECDED(fp.Affine(bits=4), block=64).layout(values=800).bits / 800
        4.5
    """

    block: int | None = None

    def __post_init__(self) -> None:
        given = self.block
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
            raise FormatError(f"SECDED: block is a number of data bits or None, got {given!r}")
        if given is not None and isinstance(self.inner, Format) and given < self.inner.width:
            raise FormatError(
                f"SECDED: a block of {given} bits holds no word of {self.inner!r} ({self.inner.width} bits)"
            )
        super().__post_init__()

    @property
    def together(self) -> int:
        return 1 if self.block is None else self.block // self.inner.width

    @property
    def checks(self) -> int:
        return -(-_code(self.inner.width, self.together).checks // self.together)

    def layout(self, values: int) -> Layout:
        """The words with exactly the check bits that there are: none is rounded up to a bit a word."""
        if self.block is None:
            return super().layout(values)
        whole, over = divmod(values, self.together)
        if over:  # the last block takes them; a tensor smaller than a block, which is refused later, is one by itself
            whole = max(whole - 1, 0)
        return Layout(self._widths(self.together), whole, self._widths(values - whole * self.together))

    def _widths(self, words: int) -> tuple[int, ...]:
        """Stored bits of each word of a block of so many."""
        if not words:
            return ()
        checks = _code(self.inner.width, words).checks
        return tuple(self.inner.width + min(max(checks - j * self.checks, 0), self.checks) for j in range(words))

    def protect_words(self, data: Tensor) -> Tensor:
        return self._by_block(data, self._protect)

    def repair_words(self, words: Tensor) -> tuple[Tensor, Tensor | None]:
        repaired = self._by_block(words, self._repair)
        return repaired & ((1 << self.inner.width) - 1), repaired < 0

    def _by_block(self, words: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows of `together` words through `work`; what is left over at the end makes the last row longer."""
        flat, over = words.reshape(-1), words.numel() % self.together
        if 0 < flat.numel() < self.together:
            raise FormatError(
                f"a tensor of {flat.numel()} values is smaller than a block of {self.together} words of "
                f"{self!r}; store it with block=None (format= takes a mapping {{pattern: Format}}) or leave it out"
            )
        whole = flat.numel() if not over else flat.numel() - over - self.together
        rows = [work(flat[:whole].reshape(-1, self.together)).reshape(-1)]
        if over:
            rows.append(work(flat[whole:].reshape(1, -1)).reshape(-1))
        return torch.cat(rows).reshape(words.shape)

    def _place(self, check: int) -> tuple[int, int]:
        """Where a check bit of a code word is stored: (word of the block, bit of that word)."""
        return check // self.checks, self.inner.width + check % self.checks

    def _protect(self, data: Tensor) -> Tensor:
        code = _code(self.inner.width, data.shape[1])
        words = data.clone()
        for i, masks in enumerate(code.covered):
            word, bit = self._place(i)
            words[:, word] |= _parity(data, masks) << bit
        word, bit = self._place(code.checks - 1)
        words[:, word] |= _parity(words) << bit
        return words

    def _repair(self, words: Tensor) -> Tensor:
        """Rows of whole words to inner words; -1 in all of a row that is beyond repair."""
        code = _code(self.inner.width, words.shape[1])
        data = words & ((1 << self.inner.width) - 1)
        odd = _parity(data)
        syndrome = torch.zeros_like(odd)
        for i in range(code.checks):
            word, bit = self._place(i)
            check = (words[:, word] >> bit) & 1
            odd = odd ^ check
            if i < code.checks - 1:
                syndrome |= (_parity(data, code.covered[i]) ^ check) << i
        single = odd == 1
        unknown, flip, which = (torch.tensor(t, device=words.device)[syndrome] for t in code[2:])
        lost = torch.where(single, unknown == 1, syndrome != 0)
        here = (torch.arange(words.shape[1], device=words.device) == which[:, None]) & single[:, None]
        return torch.where(lost[:, None], -1, torch.where(here, data ^ flip[:, None], data))


class _Code(NamedTuple):
    """The code word of a block.

    Attributes:
        checks: check bits, the overall parity included.
        covered: data bits under each check bit, as a mask for each word of the block.
        unknown: by syndrome, 1 if no bit has it.
        flip: the bit to repair, as a mask.
        which: the word it is in.
    """

    checks: int
    covered: list[list[int]]
    unknown: list[int]
    flip: list[int]
    which: list[int]


@lru_cache
def _code(width: int, words: int) -> _Code:
    data, r = width * words, 1
    while 2**r < data + r + 1:
        r += 1
    places = [place for place in range(1, 2**r) if place & (place - 1)][:data]  # powers of two are the check bits
    covered = [[0] * words for _ in range(r)]
    unknown, flip, which = [1] * 2**r, [0] * 2**r, [0] * 2**r
    unknown[0] = 0
    for i in range(r):
        unknown[1 << i] = 0
    for bit, place in enumerate(places):
        unknown[place], flip[place], which[place] = 0, 1 << (bit % width), bit // width
        for i in range(r):
            covered[i][bit // width] |= (place >> i & 1) << (bit % width)
    return _Code(r + 1, covered, unknown, flip, which)


def _parity(rows: Tensor, masks: list[int] | None = None) -> Tensor:
    """Of all bits of each row, or of those under a mask for each of its words."""
    folded = torch.zeros_like(rows[:, 0])
    for k in range(rows.shape[1]):
        folded = folded ^ (rows[:, k] if masks is None else rows[:, k] & masks[k])
    return parity(folded)
