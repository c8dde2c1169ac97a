"""Symmetric integer quantisation in two's complement, as int8 deployments store weights (Wu et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats._rounding import cast
from flipproof.formats.base import Coding, Format, Linear, word_dtype


@dataclass(frozen=True)
class Symmetric(Format):
    """Signed m-bit words, zero is word 0, and the largest magnitude is the largest word.

    s = max|x| / L, L = 2^(m−1) − 1, word = round(x / s) in two's complement, value = s · word

    Ties round to even; words are clamped to ±L. All in float64, then rounded once to the tensor's type. The word
    −2^(m−1) is never written; a fault can make it, and it then reads as −s · 2^(m−1). With ``axis=None`` there is one
    scale a tensor, with ``axis=0`` one an output channel (Wu et al. 2020 call it scale quantization). Zeros alone get s
    = 1 / L. −0.0 reads as +0.0. NaN and infinities have no word and are refused.

    The scale is taken to be protected: faults hit the words only. Given alone to `assess`, the format stores the
    weights of every layer, as `Affine` does; ``{"*": Symmetric(8)}`` stores biases and norms this way too.

    Args:
        bits: 2 to 8.
        axis: None for one scale a tensor, 0 for one an output channel.
        largest: L, if words are to be smaller than they might be: with 63 of 127 `InPlaceECC` clamps nothing, at the
            price of one bit of precision.

    Raises:
        FormatError: for other bits, axes or largest words, on NaN or infinite values, and on magnitudes that float64
            cannot divide.

    Example:
        >>> import flipproof as fp, torch
        >>> stored = fp.Symmetric(bits=4).encode(torch.tensor([-3.5, -0.5, 0.0, 1.0]))
        >>> [f"{word:04b}" for word in stored.words.tolist()], stored.decode().tolist()
        (['1001', '1111', '0000', '0010'], [-3.5, -0.5, 0.0, 1.0])
    """

    bits: int = 8
    axis: Literal[0] | None = None
    largest: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 8:
            raise FormatError(f"Symmetric stores 2 to 8 bits a value, got bits={self.bits!r}")
        if self.axis not in (None, 0) or isinstance(self.axis, bool):
            raise FormatError(
                f"Symmetric has one scale a tensor (axis=None) or an output channel (axis=0), got {self.axis!r}"
            )

        top = int(2 ** (self.bits - 1)) - 1
        given = self.largest
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= top):
            raise FormatError(f"Symmetric: the largest word of {self.bits} bits is 1 to {top}, got largest={given!r}")

    @property
    def weights_only(self) -> bool:
        return True

    @property
    def width(self) -> int:
        return self.bits

    @property
    def _largest(self) -> int:
        return self.largest or int(2 ** (self.bits - 1)) - 1

    def fit(self, x: Tensor) -> Coding:
        if not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise FormatError(f"{self!r} has no word for NaN or infinity; {bad} of {x.numel()} values are not finite")
        if x.numel() == 0:
            return (torch.ones((), dtype=torch.float64, device=x.device),)
        per_channel = self.axis == 0 and x.dim() > 0
        rows = x.to(torch.float64).reshape(x.shape[0] if per_channel else 1, -1)
        top = rows.abs().amax(dim=1)
        scale = torch.where(top > 0, top, torch.ones_like(top)) / self._largest
        if not bool((scale > 0).all()):
            raise FormatError(f"{self!r}: a largest magnitude of {float(top.max())} has no scale in float64")
        return (scale if per_channel else scale[0],)

    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        words = (x.to(torch.float64) / coding[0]).round().clamp(-self._largest, self._largest).to(torch.int64)
        return (words & ((1 << self.bits) - 1)).to(word_dtype(self.width))

    def decode_words(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> Tensor:
        blank = 64 - self.bits  # shift the sign to bit 63 and back: sign extension
        signed = (words.to(torch.int64) << blank) >> blank
        return cast(coding[0] * signed.to(torch.float64), dtype)

    def linear(self, coding: Coding) -> Linear:
        return Linear.of(coding[0], torch.zeros_like(coding[0]), -self._largest, self._largest)
