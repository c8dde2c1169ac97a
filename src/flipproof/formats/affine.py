"""Affine (asymmetric) integer quantisation, as FORTUNE quantises (Nazari et al. 2024, Eqs. 1–4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats._rounding import cast
from flipproof.formats.base import Coding, Format, Linear, word_dtype


@dataclass(frozen=True)
class Affine(Format):
    """Unsigned m-bit words between the smallest and the largest value.

    s = (max − min) / (2^m − 1), z = −min / s, word = round(x / s + z), value = s · (word − z)

    Ties round to even; words are clamped to [0, 2^m − 1]. All in float64, then rounded once to the tensor's type. With
    ``axis=None`` s and z are per tensor and z stays real (the paper's text); with ``axis=0`` they are per output
    channel and z is rounded to an integer (the authors' code), which can cost half a step at both ends. A constant
    tensor (or channel) has no spread: s is then |c| / (2^m − 1), 1 / (2^m − 1) for c = 0, and its word 0 reads as
    exactly c. −0.0 reads as +0.0 or whatever value is nearest. NaN and infinities have no word and are refused.

    Scale and zero point are taken to be protected: faults hit the words only, as in the paper. Given alone to
    `assess`, the format stores the weights of every layer (what is called a weight and has two dimensions or more); the
    rest stays in the fault space in its own type. ``{"*": Affine(8)}`` stores biases and norms this way too.

    Args:
        bits: 2 to 8.
        axis: None for one scale a tensor, 0 for one an output channel.

    Raises:
        FormatError: for other bits or axes, on NaN or infinite values, and on a range that float64 cannot divide.

    Example:
        >>> import flipproof as fp, torch
        >>> stored = fp.Affine(bits=3).encode(torch.tensor([-1.0, 0.0, 2.5]))
        >>> stored.words.tolist(), stored.decode().tolist()
        ([0, 2, 7], [-1.0, 0.0, 2.5])
    """

    bits: int = 8
    axis: Literal[0] | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FormatError(f"Affine stores 2 to 8 bits a value, got bits={self.bits!r}")
        if self.axis not in (None, 0):
            raise FormatError(
                f"Affine has one scale a tensor (axis=None) or an output channel (axis=0), got {self.axis!r}"
            )

    @property
    def weights_only(self) -> bool:
        return True

    @property
    def width(self) -> int:
        return self.bits

    def fit(self, x: Tensor) -> Coding:
        if not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise FormatError(f"{self!r} has no word for NaN or infinity; {bad} of {x.numel()} values are not finite")
        if x.numel() == 0:
            one = torch.ones((), dtype=torch.float64, device=x.device)
            return (one, torch.zeros_like(one))
        per_channel = self.axis == 0 and x.dim() > 0
        rows = x.to(torch.float64).reshape(x.shape[0] if per_channel else 1, -1)
        low, high = rows.amin(dim=1), rows.amax(dim=1)
        spread = torch.where(high > low, high - low, torch.where(low != 0, low.abs(), torch.ones_like(low)))
        scale = spread / (2**self.bits - 1)
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise FormatError(
                f"{self!r}: values from {float(low.min())} to {float(high.max())} have no scale in float64"
            )
        zero = -low / scale
        if per_channel:
            # a constant channel keeps its real zero point: rounding it would move the only value there is
            zero = torch.where(high > low, zero.round(), zero)
            return (scale, zero)
        return (scale[0], zero[0])

    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        scale, zero = coding
        words = (x.to(torch.float64) / scale + zero).round().clamp(0, 2**self.bits - 1)
        return words.to(word_dtype(self.width))

    def decode_words(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> Tensor:
        scale, zero = coding
        return cast(scale * (words.to(torch.float64) - zero), dtype)

    def linear(self, coding: Coding) -> Linear:
        return Linear.of(coding[0], coding[1], 0, 2**self.bits - 1)
