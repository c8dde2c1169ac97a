"""Blocks of values that share a scale, which is stored beside them and can be hit; and block floating point."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats._rounding import cast
from flipproof.formats.base import Coding, Format, unsigned, word_dtype
from flipproof.formats.layout import Layout


@dataclass(frozen=True)
class SharedScale(Format):
    """Consecutive values, row-major, in blocks; each block stores its scale once.

    The scale lies above the first word of its block, which is wider than the others by as much: bit `element_bits` of
    that word is the lowest one of the scale. No bit is stored that is not read, and all are hit. What is left over at
    the end of a tensor, or a tensor smaller than a block, is a shorter block with a scale of its own.

    A subclass gives `together`, the values of a block, and says how elements and scales are read and written.
    """

    @property
    def element_bits(self) -> int:
        """Stored bits a value, without its share of the scale."""
        raise NotImplementedError

    @property
    def scale_bits(self) -> int:
        """Stored bits of the scale of a block."""
        raise NotImplementedError

    def scales_of(self, largest: Tensor) -> Tensor:
        """The word of the scale of each block, int64, of the largest magnitude in it, float64."""
        raise NotImplementedError

    def factors(self) -> Tensor:
        """What each word of a scale multiplies elements by, float64."""
        raise NotImplementedError

    def write_elements(self, x: Tensor) -> Tensor:
        """Values ÷ the factor of their block, float64, to words, int64; too large ones become the largest."""
        raise NotImplementedError

    def read_elements(self, words: Tensor) -> Tensor:
        """The inverse, float64."""
        raise NotImplementedError

    @property
    def weights_only(self) -> bool:
        return True

    @property
    def width(self) -> int:
        return self.element_bits + self.scale_bits

    def layout(self, values: int) -> Layout:
        """The words of whole blocks, and those of a shorter one behind them."""
        whole, over = divmod(values, self.together)
        return Layout(self._widths(self.together), whole, self._widths(over))

    def _widths(self, words: int) -> tuple[int, ...]:
        return (self.width, *[self.element_bits] * (words - 1)) if words else ()

    def fit(self, x: Tensor) -> Coding:
        if not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise FormatError(f"{self!r} has no scale for NaN or infinity; {bad} of {x.numel()} values are not finite")
        return ()

    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        rows = self._rows(x.to(torch.float64))
        scales = self.scales_of(rows.abs().amax(dim=1)) if rows.numel() else rows.new_zeros(0, dtype=torch.int64)
        words = self.write_elements(rows / self.factors().to(x.device)[scales].unsqueeze(1))
        words[:, 0] |= scales << self.element_bits
        return words.reshape(-1)[: x.numel()].reshape(x.shape).to(word_dtype(self.width))

    def decode_words(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> Tensor:
        rows = self._rows(unsigned(words, self.width))
        elements = self.read_elements(rows & ((1 << self.element_bits) - 1))
        # division instead of a shift: every exporter knows it
        factors = self.factors().to(words.device)[rows[:, :1] // (1 << self.element_bits)]
        return cast((elements * factors).reshape(-1)[: words.numel()].reshape(words.shape), dtype)

    def _rows(self, x: Tensor) -> Tensor:
        """A row a block, the last one filled up with zeros."""
        blank = -x.numel() % self.together
        return torch.nn.functional.pad(x.reshape(-1), (0, blank)).reshape(-1, self.together)


@dataclass(frozen=True)
class BlockFloat(SharedScale):
    """Block floating point: a sign and a magnitude a value, and one exponent for a block of consecutive values.

    value = ± magnitude · 2^(E − bias − m + 1), E the exponent of the block, bias = 2^(e − 1) − 1

    E is the exponent of the largest value of the block (2^(E − bias) ≤ max|x| < 2^(E − bias + 1)), as far as e bits
    reach; magnitudes are rounded to nearest, ties to even, to at most 2^m − 1. There is no hidden bit: values far below
    the largest one of their block lose theirs, down to 0. With e = 8 and blocks of 16 it is Microsoft's MSFP;
    MSFP12 is ``BlockFloat(8, 3, 16)``.

    The exponent is stored once a block, above its first word, and hit like any other bits: one fault in it moves every
    value of the block by a power of two. What is left over at the end of a tensor is a shorter block. Blocks run over
    the values in memory order, across rows where these are no multiple of the block. Given alone to `assess`, the
    format stores the weights of every layer, as `Affine` does.

    Args:
        exponent: e, bits of the shared exponent, 1 to 10.
        mantissa: m, bits of each magnitude, 1 to 23.
        block: how many values share an exponent, 2 to 1024.

    Raises:
        FormatError: for other numbers, and on NaN or infinite values.

    Sources: Drumond et al. 2018; Rouhani et al. 2020 (MSFP); Mahmoud et al. 2022, who hit shared exponents too.

    Example:
        >>> import flipproof as fp, torch
        >>> stored = fp.BlockFloat(exponent=8, mantissa=3, block=4).encode(torch.tensor([1.0, -0.6, 0.3, 0.05]))
        >>> [f"{word:04b}" for word in stored.words.tolist()], stored.decode().tolist()  # 127 is 2^0
        (['11111110100', '1010', '0001', '0000'], [1.0, -0.5, 0.25, 0.0])
        >>> stored.decode_at(torch.tensor([2]), stored.words[2:3]).tolist()
        [0.25]
        >>> stored.format.layout(values=4).bits  # four words of four bits and an exponent
        24
    """

    exponent: int
    mantissa: int
    block: int

    def __post_init__(self) -> None:
        bounds = (
            ("exponent", self.exponent, 1, 10),
            ("mantissa", self.mantissa, 1, 23),
            ("block", self.block, 2, 1024),
        )
        for name, value, low, high in bounds:
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise FormatError(f"BlockFloat: {name} is a whole number from {low} to {high}, got {name}={value!r}")

    @property
    def together(self) -> int:
        return self.block

    @property
    def element_bits(self) -> int:
        return 1 + self.mantissa

    @property
    def scale_bits(self) -> int:
        return self.exponent

    @property
    def _bias(self) -> int:
        return int(2 ** (self.exponent - 1)) - 1

    def scales_of(self, largest: Tensor) -> Tensor:
        return (exponents(largest) + self._bias).clamp(0, (1 << self.exponent) - 1)

    def factors(self) -> Tensor:
        lowest = 1 - self._bias - self.mantissa
        steps = [math.ldexp(1.0, word + lowest) for word in range(1 << self.exponent)]
        return torch.tensor(steps, dtype=torch.float64)

    def write_elements(self, x: Tensor) -> Tensor:
        magnitude = x.abs().round().clamp(max=(1 << self.mantissa) - 1).to(torch.int64)
        return magnitude | (torch.signbit(x).to(torch.int64) << self.mantissa)

    def read_elements(self, words: Tensor) -> Tensor:
        magnitude = (words & ((1 << self.mantissa) - 1)).to(torch.float64)
        negative = (words >= 1 << self.mantissa).to(torch.float64)
        return magnitude * (1 - 2 * negative)  # a product, not a choice: onnxruntime's loses the sign of 0


def exponents(x: Tensor) -> Tensor:
    """⌊log2⌋ of float64 values from 0, exactly; −1100 for 0.

    >>> exponents(torch.tensor([1.0, 7.9, 0.25, 0.0], dtype=torch.float64)).tolist()
    [0, 2, -2, -1100]
    """
    return torch.where(x > 0, torch.frexp(x).exponent.to(torch.int64) - 1, -1100)
