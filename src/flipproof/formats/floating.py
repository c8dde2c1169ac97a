"""IEEE-754 binary64, binary32 and binary16, bfloat16 and the two 8-bit floats, as torch stores them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flipproof.formats._rounding import cast
from flipproof.formats.base import Coding, Format, unsigned, word_dtype


@dataclass(frozen=True)
class _Floating(Format):
    """A float type of torch: a word is the value's bit pattern.

    Rounding is to nearest, ties to even, and happens once, from float64 too (torch's own casts pass through float32 and
    round twice). NaN, infinities, subnormals and −0.0 have words and come back as they were; a tensor that already has
    this type keeps its very bits, NaN payloads included.
    """

    storage: ClassVar[torch.dtype]

    @property
    def width(self) -> int:
        return self.storage.itemsize * 8

    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        return cast(x, self.storage).contiguous().view(word_dtype(self.width))

    def decode_words(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_compiling():
            return cast(_by_arithmetic(words, self.storage), dtype)
        return cast(words.contiguous().view(self.storage), dtype)

    def is_native(self, dtype: torch.dtype) -> bool:
        return dtype == self.storage


@dataclass(frozen=True)
class Float64(_Floating):
    """IEEE-754 binary64: bit 63 sign, 62…52 exponent, 51…0 fraction. It is the own format of float64 models.

    Example:
        >>> import torch
        >>> Float64().encode(torch.tensor([-0.0], dtype=torch.float64)).words.tolist()  # the sign alone
        [-9223372036854775808]
    """

    storage: ClassVar[torch.dtype] = torch.float64


@dataclass(frozen=True)
class Float32(_Floating):
    """IEEE-754 binary32: bit 31 sign, 30…23 exponent, 22…0 fraction.

    Example:
        >>> import flipproof as fp, torch
        >>> stored = fp.Float32().encode(torch.tensor([0.5]))
        >>> fp.Float32().decode_words(stored.words ^ (1 << 30), (), torch.float32)  # the critical bit
        tensor([1.7014e+38])
    """

    storage: ClassVar[torch.dtype] = torch.float32


@dataclass(frozen=True)
class Float16(_Floating):
    """IEEE-754 binary16: bit 15 sign, 14…10 exponent, 9…0 fraction. Values from 65520 up become infinite.

    Example:
        >>> import flipproof as fp, torch
        >>> fp.Float16().encode(torch.tensor([1.0, 65519.0, 65520.0])).decode()
        tensor([1.0000e+00, 6.5504e+04,        inf])
    """

    storage: ClassVar[torch.dtype] = torch.float16


@dataclass(frozen=True)
class BFloat16(_Floating):
    """bfloat16: the upper half of a binary32, rounded: bit 15 sign, 14…7 exponent, 6…0 fraction.

    Example:
        >>> import flipproof as fp, torch
        >>> fp.BFloat16().encode(torch.tensor([3.14159])).decode()
        tensor([3.1406])
    """

    storage: ClassVar[torch.dtype] = torch.bfloat16


@dataclass(frozen=True)
class Float8E4M3(_Floating):
    """OCP 8-bit float E4M3FN: bit 7 sign, 6…3 exponent, 2…0 fraction; no infinities, one NaN a sign, largest 448.

    Larger values saturate, infinite ones too (the conversion that OCP calls saturating; torch's own cast gives NaN in
    some releases and 448 in others).

    Example:
        >>> import flipproof as fp, torch
        >>> fp.Float8E4M3().encode(torch.tensor([0.3, 448.0])).decode().tolist()
        [0.3125, 448.0]
    """

    storage: ClassVar[torch.dtype] = torch.float8_e4m3fn

    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        return super().encode_values(x if x.dtype == self.storage else x.clamp(-448, 448), coding)


@dataclass(frozen=True)
class Float8E5M2(_Floating):
    """OCP 8-bit float E5M2: bit 7 sign, 6…2 exponent, 1…0 fraction; infinities and NaN as in IEEE-754.

    Example:
        >>> import flipproof as fp, torch
        >>> fp.Float8E5M2().encode(torch.tensor([0.3, 57344.0])).decode().tolist()
        [0.3125, 57344.0]
    """

    storage: ClassVar[torch.dtype] = torch.float8_e5m2


def _by_arithmetic(words: Tensor, storage: torch.dtype) -> Tensor:
    """The values of bit patterns without reading memory as another type, for which ONNX has no operator; exactly.

    ± (f + h) · 2^(e − bias − fraction bits), h the hidden bit, in float32, or float64 for Float64. A NaN is some NaN.
    """
    width = storage.itemsize * 8
    if width == 8:
        every = torch.arange(256, dtype=torch.uint8).view(storage).to(torch.float32)
        return every.to(words.device)[unsigned(words, 8)]
    fraction = round(-math.log2(torch.finfo(storage).eps))
    exponents = 1 << (width - 1 - fraction)
    bias = exponents // 2 - 1
    exact = torch.float64 if storage == torch.float64 else torch.float32
    # subnormals have the unit of the smallest normal number and no hidden bit
    units = [2.0 ** (max(e, 1) - bias - fraction) for e in range(exponents - 1)]
    unit = torch.tensor([*units, math.inf], dtype=exact, device=words.device)
    hidden = torch.tensor([0.0] + [2.0**fraction] * (exponents - 1), dtype=exact, device=words.device)
    wide = unsigned(words, width - 1)
    low = wide & ((1 << fraction) - 1)
    exponent = wide // (1 << fraction)
    magnitude = (low.to(exact) + hidden[exponent]) * unit[exponent]
    nan = (exponent == exponents - 1) & (low != 0)
    magnitude = torch.where(nan, torch.full_like(magnitude, math.nan), magnitude)
    negative = words.to(torch.int64) < 0 if width == 64 else unsigned(words, width) >= 1 << (width - 1)
    return torch.where(negative, -magnitude, magnitude)
