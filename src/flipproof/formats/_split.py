"""The bits of a binary float: how many are exponent and how many fraction, and what the largest exponent says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flipproof.formats.base import unsigned

Specials = Literal["ieee", "nan", "none"]
"""What the largest exponent holds: infinities and NaN; numbers, and one NaN a sign; numbers alone."""


@dataclass(frozen=True)
class Split:
    """A sign, then the exponent, then the fraction, the most significant bit first.

    value = ± (1 + fraction / 2^m) · 2^(exponent − bias), bias = 2^(e − 1) − 1; exponent 0 holds the subnormals,
    ± fraction / 2^m · 2^(1 − bias)

    Attributes:
        exponent: e, bits of the exponent, at most 11.
        mantissa: m, bits of the fraction; at most 52.
        specials: see `Specials`.
        subnormals: False if everything with exponent 0 reads as ±0.

    Example:
        >>> half = Split(5, 10)
        >>> half.width, hex(half.encode(torch.tensor([1.5])).item()), half.decode(torch.tensor([0x3E00])).item()
        (16, '0x3e00', 1.5)
    """

    exponent: int
    mantissa: int
    specials: Specials = "ieee"
    subnormals: bool = True

    @property
    def width(self) -> int:
        """Bits in all."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is taken from the exponent field."""
        return int(2 ** (self.exponent - 1)) - 1

    @property
    def largest(self) -> int:
        """The word of the largest finite value; 0 where there is none but 0."""
        ones = (1 << (self.exponent + self.mantissa)) - 1
        word = {"none": ones, "nan": ones - 1, "ieee": self._infinity - 1}[self.specials]
        return word if self.subnormals or word >= 1 << self.mantissa else 0

    @property
    def has_nan(self) -> bool:
        """Whether a word is NaN."""
        return self.specials == "nan" or (self.specials == "ieee" and self.mantissa > 0)

    @property
    def _infinity(self) -> int:
        """All ones in the exponent, zeros in the fraction."""
        return ((1 << self.exponent) - 1) << self.mantissa

    def encode(self, x: Tensor) -> Tensor:
        """Values to words, int64: to nearest, ties to even, in one step whatever the type of `x`.

        What is larger than the largest value becomes infinite with "ieee" and the largest value otherwise; a NaN needs
        a word.
        """
        m = self.mantissa
        pattern = x.to(torch.float64).contiguous().view(torch.int64)
        magnitude = pattern & ((1 << 63) - 1)
        field, fraction = magnitude >> 52, magnitude & ((1 << 52) - 1)
        significand = fraction | ((field > 0).to(torch.int64) << 52)
        above = field.clamp(min=1) - 1023 - (1 - self.bias)  # exponents above the smallest normal one
        shift = (52 - m - above.clamp(max=0)).clamp(max=62)  # a significand has 53 bits: nothing is left of it sooner
        word = significand >> shift
        cut = significand & ((1 << shift) - 1)
        half = (1 << shift) >> 1
        word = word + ((cut > half) | ((cut == half) & (half > 0) & (word & 1 == 1))).to(torch.int64)
        word = word + (above.clamp(min=0) << m)  # a carry walks into the exponent by itself
        if not self.subnormals:
            smallest = 1 << m
            nearer = x.to(torch.float64).abs() > math.ldexp(1.0, -self.bias)  # than half the smallest normal value
            word = torch.where(word < smallest, nearer.to(torch.int64) * smallest, word)
        word = word.clamp(max=self._infinity if self.specials == "ieee" else self.largest)
        if self.has_nan:
            quiet = (fraction >> (52 - m)) | (1 << m >> 1)  # as much of its payload as fits
            nan = self._infinity | quiet if self.specials == "ieee" else torch.full_like(word, self.largest + 1)
            word = torch.where(magnitude > 0x7FF << 52, nan, word)
        return word | ((pattern < 0).to(torch.int64) << (self.width - 1))

    def decode(self, words: Tensor, exact: torch.dtype = torch.float64) -> Tensor:
        """Words of any integer type to values of `exact`, which has to hold them all; a NaN is some NaN.

        No memory is read as another type and nothing is shifted, for which exporters have no operator.
        """
        m = self.mantissa
        # subnormals have the unit of the smallest normal number and no hidden bit
        numbers = (1 << self.exponent) - (self.specials == "ieee")
        units = [math.ldexp(1.0, max(e, 1) - self.bias - m) for e in range(numbers)] + [math.inf]
        hidden = [0.0] + [math.ldexp(1.0, m)] * numbers
        if not self.subnormals:
            units[0] = 0.0
        magnitude = unsigned(words, self.width - 1)
        fraction, field = magnitude & ((1 << m) - 1), magnitude // (1 << m)
        value = fraction.to(exact) + torch.tensor(hidden, dtype=exact, device=words.device)[field]
        value = value * torch.tensor(units, dtype=exact, device=words.device)[field]
        if self.has_nan:
            nan = magnitude > (self._infinity if self.specials == "ieee" else self.largest)
            value = torch.where(nan, torch.full_like(value, math.nan), value)
        negative = (
            words.to(torch.int64) < 0 if self.width == 64 else unsigned(words, self.width) >= 1 << (self.width - 1)
        )
        return value * (1 - 2 * negative.to(exact))  # a product, not a choice: onnxruntime's loses the sign of 0
