"""Words without their low bits, which makes room for check bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats.base import Coding, Format, unsigned, word_dtype


@dataclass(frozen=True)
class Rounded(Format):
    """The upper `bits` of another format's words; the dropped low ones read as 0.

    word = ⌊inner word / 2^d⌋ or the one above it, d = inner.width − bits: whichever reads as a value nearer to the one
    that the inner format stores, the even word where both are as near (by float64, in which `Affine` may break a tie)

    ``Rounded(Float32(), 26)`` has 17 bits of fraction, ``Rounded(Float16(), 11)`` five, ``Rounded(FixedPoint(15, 16),
    26)`` is the Q15.10 of the same values. Where the word above is none, or reads as an infinity, the largest finite
    value stays: rounding never overflows. Infinities stay themselves where a word of so few bits reads as one, and
    become the largest value of their sign elsewhere; a NaN stays some NaN.

    Args:
        inner: the format whose words are shortened; each word stands alone.
        bits: how many of its upper bits are kept, at least 1.

    Raises:
        FormatError: for other bits, for a format that codes blocks or has redundant bits of its own, and where a NaN
            has no word left.

    Example:
        >>> import flipproof as fp, torch
        >>> fp.Rounded(fp.Float16(), bits=11).encode(torch.tensor([0.3, 65504.0])).decode().tolist()
        [0.296875, 64512.0]
    """

    inner: Format
    bits: int

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Format):
            raise FormatError(f"Rounded shortens the words of a Format, got {self.inner!r}")
        if self.inner.together > 1 and not hasattr(self.inner, "inner"):
            raise FormatError(f"Rounded shortens words that stand alone; {self.inner!r} reads blocks of words together")
        if self.inner.together > 1 or self.inner.stored_constants or hasattr(self.inner, "checks"):
            raise FormatError(
                f"Rounded drops low bits of words that stand for values; {self.inner!r} holds check bits. Put Rounded "
                f"inside it"
            )
        whole = isinstance(self.bits, int) and not isinstance(self.bits, bool)
        if not whole or not 1 <= self.bits <= self.inner.width:
            raise FormatError(f"Rounded keeps 1 to {self.inner.width} bits of {self.inner!r}, got bits={self.bits!r}")

    @property
    def weights_only(self) -> bool:
        return self.inner.weights_only

    @property
    def width(self) -> int:
        return self.bits

    @property
    def dropped(self) -> int:
        """How many low bits are not stored."""
        return self.inner.width - self.bits

    def fit(self, x: Tensor) -> Coding:
        return self.inner.fit(x)

    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        full = unsigned(self.inner.encode_values(x, coding), self.inner.width)
        if not self.dropped:
            return full.to(word_dtype(self.width))
        below = self._upper(full)
        above = (below + 1) & ((1 << self.bits) - 1)
        exact, down, up = (self._inner(words, coding) for words in (full, below << self.dropped, above << self.dropped))
        # an infinity or a NaN above is never nearer than a finite value below
        nearer = (up - exact).abs() < (exact - down).abs()
        tie = ((up - exact).abs() == (exact - down).abs()) & (below & 1 == 1)
        words = torch.where((nearer | tie) & torch.isfinite(up) & torch.isfinite(exact), above, below)
        if bool(torch.isnan(exact).any()):
            words = torch.where(torch.isnan(exact) & ~torch.isnan(down), above, words)
            lost = torch.isnan(exact) & ~torch.isnan(self._inner(words << self.dropped, coding))
            if bool(lost.any()):
                raise FormatError(f"{self!r} has no word for NaN; {int(lost.sum())} of {x.numel()} values are NaN")
        return words.to(word_dtype(self.width))

    def decode_words(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> Tensor:
        whole = word_dtype(self.inner.width)
        if torch.compiler.is_compiling():  # a product instead of a shift, which exporters know of unsigned types alone
            return self.inner.decode_words((unsigned(words, self.width) * (1 << self.dropped)).to(whole), coding, dtype)
        if words.dtype != whole:  # a signed container may have the word's highest bit as its sign
            words = unsigned(words, self.width).to(whole)
        return self.inner.decode_words(words << self.dropped, coding, dtype)

    def left_shift(self, dtype: torch.dtype) -> int | None:
        inner = self.inner.left_shift(dtype)
        return None if inner is None else inner + self.dropped

    def _upper(self, full: Tensor) -> Tensor:
        """The kept bits; a 64-bit word has its sign bit at the top of an int64."""
        return (full >> self.dropped) & ((1 << self.bits) - 1)

    def _inner(self, words: Tensor, coding: Coding) -> Tensor:
        return self.inner.decode_words(words.to(word_dtype(self.inner.width)), coding, torch.float64)
