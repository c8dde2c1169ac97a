"""Microscaling: 8-, 6- and 4-bit elements that share a power of two (OCP MX specification 1.0)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats._split import Split
from flipproof.formats.shared_scale import SharedScale, exponents

Name = Literal["MXFP8E4M3", "MXFP8E5M2", "MXFP6E3M2", "MXFP6E2M3", "MXFP4", "MXINT8"]
"""The concrete MX formats, by their elements."""

_FLOATS = {
    "MXFP8E4M3": Split(4, 3, "nan"),
    "MXFP8E5M2": Split(5, 2),
    "MXFP6E3M2": Split(3, 2, "none"),
    "MXFP6E2M3": Split(2, 3, "none"),
    "MXFP4": Split(2, 1, "none"),
}


@dataclass(frozen=True)
class MX(SharedScale):
    """Blocks of 32 consecutive values that share a scale, as the OCP Microscaling formats store them.

    value = 2^(X − 127) · element, X the block's scale: an E8M0 word of 8 bits, of which 0xFF is NaN

    A scale of NaN makes the whole block NaN. Elements are floats of 8 bits (E4M3 without infinities, E5M2 with them), 6
    bits (E3M2, E2M3) or 4 bits (E2M1), these without NaN and infinities, or two's-complement INT8 in units of 1/64. As
    the specification converts (section 6.3): the scale is the largest power of two that is not above max|x|, ÷ the
    largest power of two of the element; x ÷ scale is rounded to nearest, ties to even, and what is too large becomes
    the largest element. It leaves some things open; here, a block of zeros has X = 0 (2^−127), a scale that is too
    small or too large the nearest one there is, INT8 never writes −128 (which reads as −2), and NaN and infinities are
    refused.

    The scale is stored once a block, above its first word, and hit like any other bits. What is left over at the end of
    a tensor is a shorter block. Blocks run over the values in memory order: along the last dimension, as kernels take
    them, where that is a multiple of 32. Given alone to `assess`, the format stores the weights of every layer, as
    `Affine` does.

    Args:
        name: which; "MXFP4" is E2M1.

    Raises:
        FormatError: for another name, and on NaN or infinite values.

    Source: OCP 2023, sections 5 (formats) and 6.3 (conversion).

    Example:
        >>> import flipproof as fp, torch
        >>> stored = fp.MX("MXFP4").encode(torch.tensor([0.1, -0.7, 3.0]))
        >>> [f"{word:04b}" for word in stored.words.tolist()], stored.decode().tolist()  # 126 is a half
        (['11111100000', '1011', '0111'], [0.0, -0.75, 3.0])
        >>> stored.format.layout(values=320).bits / 320
        4.25
        >>> fp.MX("MXINT8").encode(torch.tensor([1.0, -0.26])).decode().tolist()
        [1.0, -0.265625]
    """

    name: Name

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            raise FormatError(f"MX takes one of {', '.join(get_args(Name))}, got {self.name!r}")

    @property
    def together(self) -> int:
        return 32

    @property
    def element_bits(self) -> int:
        return _FLOATS[self.name].width if self.name in _FLOATS else 8

    @property
    def scale_bits(self) -> int:
        return 8

    @property
    def _highest(self) -> int:
        """The exponent of the largest power of two among the elements."""
        if self.name not in _FLOATS:
            return 0
        split = _FLOATS[self.name]
        return (split.largest >> split.mantissa) - split.bias

    def scales_of(self, largest: Tensor) -> Tensor:
        return (exponents(largest) - self._highest + 127).clamp(0, 254)

    def factors(self) -> Tensor:
        return torch.tensor([math.ldexp(1.0, word - 127) for word in range(255)] + [math.nan], dtype=torch.float64)

    def write_elements(self, x: Tensor) -> Tensor:
        if self.name not in _FLOATS:
            return (x * 64).round().clamp(-127, 127).to(torch.int64) & 255
        split = _FLOATS[self.name]
        top = float(split.decode(torch.tensor(split.largest)))
        return split.encode(x.clamp(-top, top))

    def read_elements(self, words: Tensor) -> Tensor:
        if self.name in _FLOATS:
            return _FLOATS[self.name].decode(words)
        return torch.where(words >= 128, words - 256, words).to(torch.float64) / 64
