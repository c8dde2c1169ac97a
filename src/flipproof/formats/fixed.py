"""Two's-complement fixed point, ProAct's Q15.16 by default (Mousavi et al. 2024, section VI-A)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats._rounding import cast
from flipproof.formats.base import Coding, Format, Linear, word_dtype


@dataclass(frozen=True)
class FixedPoint(Format):
    """Signed fixed point: word = round(x · 2^fraction_bits), two's complement, sign at the top.

    Width is 1 + integer_bits + fraction_bits. Values outside [−2^i, 2^i − 2^−f] saturate, infinities with them; −0.0
    becomes 0; NaN has no word and is refused. Decoding is exact in float64 and then rounded once to the tensor's type,
    so a word of more than 24 significant bits reads as the nearest float32.

    Args:
        integer_bits: bits left of the point, without the sign.
        fraction_bits: bits right of it.
        rounding: "nearest" (ties to even) or "truncate" (toward zero, an integer cast, as ProAct's code does it).

    Raises:
        FormatError: if the width is not 2 to 32 bits, or on NaN.

    Example:
        >>> import flipproof as fp, torch
        >>> q = fp.FixedPoint()
        >>> q.width, q.encode(torch.tensor([1.0, -1.0, 1e9])).words.tolist()
        (32, [65536, -65536, 2147483647])
    """

    integer_bits: int = 15
    fraction_bits: int = 16
    rounding: Literal["nearest", "truncate"] = "nearest"

    def __post_init__(self) -> None:
        if min(self.integer_bits, self.fraction_bits) < 0 or not 2 <= self.width <= 32:
            raise FormatError(
                f"FixedPoint needs 1 + integer_bits + fraction_bits between 2 and 32, "
                f"got 1 + {self.integer_bits} + {self.fraction_bits}"
            )
        if self.rounding not in ("nearest", "truncate"):
            raise FormatError(f"rounding must be 'nearest' or 'truncate', got {self.rounding!r}")

    @property
    def width(self) -> int:
        return 1 + self.integer_bits + self.fraction_bits

    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        if bool(torch.isnan(x).any()):
            raise FormatError(
                f"{self!r} has no word for NaN; {int(torch.isnan(x).sum())} of {x.numel()} values are NaN"
            )
        # float64 holds every product exactly: a float32 has 24 significant bits and the scale is a power of two
        scaled = x.to(torch.float64) * 2.0**self.fraction_bits
        scaled = scaled.round() if self.rounding == "nearest" else scaled.trunc()
        top = 2.0 ** (self.width - 1)
        words = scaled.clamp(-top, top - 1).to(torch.int64)
        if self.width not in (
            16,
            32,
        ):  # narrower than its container, or in an unsigned one: keep the upper bits 0
            words = words & ((1 << self.width) - 1)
        return words.to(word_dtype(self.width))

    def decode_words(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> Tensor:
        blank = 64 - self.width  # shift the sign to bit 63 and back: sign extension
        signed = (words.to(torch.int64) << blank) >> blank
        return cast(signed.to(torch.float64) * 2.0**-self.fraction_bits, dtype)

    def linear(self, coding: Coding) -> Linear:
        # what a word reads as is a whole number of steps or as exact as x was: rounding it anew changes nothing
        step = torch.tensor(2.0**-self.fraction_bits, dtype=torch.float64)
        return Linear.of(step, torch.zeros_like(step), -(2 ** (self.width - 1)), 2 ** (self.width - 1) - 1)
