"""Scalar references for the formats in exact arithmetic: nothing here uses a cast of torch or NumPy."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from math import copysign, floor, isinf, isnan, trunc

import torch


@dataclass(frozen=True)
class Minifloat:
    """A binary float of any size. `fn`: no infinities, the all-ones pattern alone is NaN, saturating (OCP E4M3)."""

    exponent: int
    fraction: int
    fn: bool = False

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def sign(self) -> int:
        return 1 << (self.exponent + self.fraction)

    @property
    def largest(self) -> Fraction:
        top = 2**self.exponent - 1 - (0 if self.fn else 1)
        steps = 2 ** (self.fraction + 1) - (2 if self.fn else 1)
        return steps * Fraction(2) ** (top - self.bias - self.fraction)

    def encode(self, x: float) -> int | None:
        """Round to nearest, ties to even. None stands for NaN, whose payload is nobody's promise."""
        if isnan(x):
            return None
        sign = self.sign if copysign(1, x) < 0 else 0
        infinity = (2**self.exponent - 1) << self.fraction
        if isinf(x):
            return sign | (infinity | (2**self.fraction - 2) if self.fn else infinity)
        size = abs(Fraction(x))
        if size == 0:
            return sign
        power = 1 - self.bias  # subnormals share the exponent of the smallest normals
        while size >= Fraction(2) ** (power + 1):
            power += 1
        step = Fraction(2) ** (power - self.fraction)
        steps = round(size / step)  # Fraction rounds half to even
        if steps * step > self.largest:
            return sign | (infinity | (2**self.fraction - 2) if self.fn else infinity)
        # carries walk into the exponent by themselves: the next pattern is the next value
        return sign | ((power - 1 + self.bias) << self.fraction) + steps

    def decode(self, word: int) -> float:
        sign = -1.0 if word & self.sign else 1.0
        exponent = (word >> self.fraction) & (2**self.exponent - 1)
        fraction = word & (2**self.fraction - 1)
        if exponent == 2**self.exponent - 1 and not self.fn:
            return float("nan") if fraction else sign * float("inf")
        if self.fn and word & ~self.sign == self.sign - 1:
            return float("nan")
        steps = fraction + (2**self.fraction if exponent else 0)
        return sign * float(steps * Fraction(2) ** (max(exponent, 1) - self.bias - self.fraction))


class Struct:
    """binary16 and binary32 as Python's own `struct` packs them."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.word = {"e": "H", "f": "I"}[code]
        self.infinity = {"e": 0x7C00, "f": 0x7F800000}[code]

    def encode(self, x: float) -> int | None:
        if isnan(x):
            return None
        try:
            return int(struct.unpack(f"<{self.word}", struct.pack(f"<{self.code}", x))[0])
        except OverflowError:  # finite, but rounds beyond the largest
            return self.infinity | (self.infinity + (self.infinity & -self.infinity) if x < 0 else 0)

    def decode(self, word: int) -> float:
        return float(struct.unpack(f"<{self.code}", struct.pack(f"<{self.word}", word))[0])


def fixed_encode(x: float, integer_bits: int, fraction_bits: int, rounding: str) -> int:
    """Two's complement word of the width, saturating."""
    width = 1 + integer_bits + fraction_bits
    low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    if isinf(x):
        scaled = high if x > 0 else low
    else:
        exact = Fraction(x) * 2**fraction_bits
        scaled = round(exact) if rounding == "nearest" else trunc(exact)
    return min(max(scaled, low), high) % 2**width


def fixed_decode(word: int, integer_bits: int, fraction_bits: int) -> Fraction:
    width = 1 + integer_bits + fraction_bits
    signed = word - 2**width if word >> (width - 1) else word
    return Fraction(signed, 2**fraction_bits)


def affine_encode(values: list[float], bits: int, *, whole_zero: bool) -> tuple[list[Fraction], Fraction, Fraction]:
    """FORTUNE's Eqs. 1–3 before rounding: x / s + z for each value, and s and z, all exact."""
    exact = [Fraction(v) for v in values]
    low, high = min(exact), max(exact)
    spread = high - low or abs(low) or Fraction(1)
    scale = spread / (2**bits - 1)
    zero = -low / scale
    if whole_zero and high > low:
        zero = Fraction(round(zero))
    return [v / scale + zero for v in exact], scale, zero


def near_tie(x: Fraction, tolerance: Fraction = Fraction(1, 10**6)) -> bool:
    """Whether x lies so close to half way between integers that float64 may round it to either."""
    return abs(x - floor(x) - Fraction(1, 2)) < tolerance


def words_of(words: torch.Tensor) -> list[int]:
    """Words as unsigned Python integers."""
    return [word & ((1 << words.element_size() * 8) - 1) for word in words.reshape(-1).tolist()]


def float32_of(pattern: int) -> float:
    """The value of a binary32 pattern."""
    return float(struct.unpack("<f", struct.pack("<I", pattern))[0])


def float32_tensor(patterns: list[int]) -> torch.Tensor:
    """float32 values from bit patterns, NaN payloads and all."""
    signed = [p - 2**32 if p >> 31 else p for p in patterns]
    return torch.tensor(signed, dtype=torch.int64).to(torch.int32).view(torch.float32)
