"""Floats: IEEE-754 binary64, binary32 and binary16, bfloat16 and two of 8 bits, as torch has them, and any split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats._rounding import cast
from flipproof.formats._split import Specials, Split
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
            exact = torch.float64 if self.storage == torch.float64 else torch.float32
            return cast(_SPLITS[self.storage].decode(words, exact), dtype)
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


@dataclass(frozen=True)
class Float(Format):
    """A binary float of any split: a sign, `exponent` bits of exponent and `mantissa` bits of fraction.

    value = ± (1 + fraction / 2^m) · 2^(exponent − bias), bias = 2^(e − 1) − 1; exponent 0 holds the subnormals,
    ± fraction / 2^m · 2^(1 − bias)

    Rounding is to nearest, ties to even, once, from float64 too; without a fraction no number but 0 is even, and ties
    go up, as IEEE 754-2019 has it. ``Float(5, 10)`` is `Float16`, ``Float(8, 7)``
    `BFloat16`, ``Float(8, 23)`` `Float32`, ``Float(5, 2)`` `Float8E5M2` and ``Float(4, 3, "nan")`` `Float8E4M3`, bit by
    bit; ``Float(8, 10)`` is NVIDIA's TF32 in 19 bits.

    Args:
        exponent: e, 1 to 11 bits.
        mantissa: m, bits of the fraction, from 0; 1 + e + m are at most 32.
        specials: how the largest exponent is read. "ieee": fraction 0 is an infinity and any other NaN, and what is too
            large becomes infinite (without a fraction there is no NaN). "nan": all ones are NaN and the rest numbers,
            as in OCP's E4M3. "none": all are numbers, as in OCP's 6- and 4-bit floats. With these two, what is too
            large becomes the largest value, infinities too.
        subnormals: False for hardware without them: what has exponent 0 reads as ±0, and values nearer to 0 than to the
            smallest normal number, or as near, are stored as 0.

    Raises:
        FormatError: for other splits, one that has no finite value but 0, and for a NaN that has no word.

    Source: Mahmoud et al. 2022 (GoldenEye), where formats of any split are emulated.

    Example:
        >>> import flipproof as fp, torch
        >>> small = fp.Float(exponent=4, mantissa=3)
        >>> small.encode(torch.tensor([0.3, 240.0, 250.0])).decode().tolist()  # the largest exponent is taken
        [0.3125, 240.0, inf]
        >>> fp.Float(2, 1, "none").decode_words(torch.arange(8, dtype=torch.uint8), (), torch.float32).tolist()
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        >>> fp.SECDED(small).width
        13
    """

    exponent: int
    mantissa: int
    specials: Specials = "ieee"
    subnormals: bool = True

    def __post_init__(self) -> None:
        for name, value, low, high in (("exponent", self.exponent, 1, 11), ("mantissa", self.mantissa, 0, 30)):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise FormatError(f"Float takes {low} to {high} bits of {name}, got {name}={value!r}")
        if self.specials not in get_args(Specials):
            raise FormatError(f"Float: specials is 'ieee', 'nan' or 'none', got {self.specials!r}")
        if not isinstance(self.subnormals, bool):
            raise FormatError(f"Float: subnormals is True or False, got {self.subnormals!r}")
        if self.width > 32:
            raise FormatError(f"Float has at most 32 bits, got 1 + {self.exponent} + {self.mantissa}")
        if self.exponent == 11 and self.specials != "ieee":
            raise FormatError(f"{self!r} has numbers beyond float64, in which words are read; take specials='ieee'")
        if not self._split.largest:
            raise FormatError(f"{self!r} has no finite value but 0")

    @property
    def width(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def _split(self) -> Split:
        return Split(self.exponent, self.mantissa, self.specials, self.subnormals)

    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        if self.is_native(x.dtype):  # its very bits, NaN payloads included
            return x.clone(memory_format=torch.contiguous_format).view(word_dtype(self.width))
        if not self._split.has_nan and bool(torch.isnan(x).any()):
            raise FormatError(
                f"{self!r} has no word for NaN; {int(torch.isnan(x).sum())} of {x.numel()} values are NaN"
            )
        return self._split.encode(x).to(word_dtype(self.width))

    def decode_words(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> Tensor:
        shift = None if torch.compiler.is_compiling() else self.left_shift(dtype)
        if shift is not None:
            whole = word_dtype(8 * dtype.itemsize)
            return (unsigned(words, self.width) << shift).to(whole).view(dtype)
        single = dtype != torch.float64 and self.exponent <= 8 and self.mantissa <= 23
        return cast(self._split.decode(words, torch.float32 if single else torch.float64), dtype)

    def is_native(self, dtype: torch.dtype) -> bool:
        return _SPLITS.get(dtype) == self._split

    def left_shift(self, dtype: torch.dtype) -> int | None:
        native = _SPLITS.get(dtype)
        if native is None or replace(self._split, mantissa=native.mantissa) != native:
            return None
        places = native.mantissa - self.mantissa
        return places if places == 0 or (places > 0 and self.specials == "ieee") else None


_SPLITS = {
    torch.float64: Split(11, 52),
    torch.float32: Split(8, 23),
    torch.float16: Split(5, 10),
    torch.bfloat16: Split(8, 7),
    torch.float8_e4m3fn: Split(4, 3, "nan"),
    torch.float8_e5m2: Split(5, 2),
}
