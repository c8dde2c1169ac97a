"""Sign vote: the upper bits of a fixed-point number repeat its sign, and their majority says what it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats.base import Coding, Format, unsigned, word_dtype
from flipproof.formats.fixed import FixedPoint
from flipproof.formats.protected import Protected


@dataclass(frozen=True)
class SignVote(Protected):
    """The top v bits of a fixed-point word are set to what most of them are; costs no memory.

    With m bits a word, a value in [−2^(m−v), 2^(m−v) − 1] units has v equal bits at the top: its sign, v times. At use

    bits m − v … m − 1 = [more than half of the top u bits are 1], u = v for odd v, else v − 1

    so that up to (u − 1) / 2 faults among these u do nothing, and none in the others of the v. (An even number of votes
    could be a draw: the lowest bit then has none, but is set as well, since it is known.) The lower m − v bits are not
    protected.

    With ``bits=None`` v is fitted to each tensor: the most that all its values allow, at least 1 (nothing is set). It
    is one more constant of the tensor's coding and **taken to lie in protected memory, as a scale is**. No value
    changes. With `bits` given nothing has to be kept, and values beyond ±2^(m−v) units saturate, which the golden run
    shows.

    Ours: we know of no publication. That trained weights in Q15.16 leave the upper integer bits to the sign is seen on
    any of them.

    Args:
        inner: the fixed-point format.
        bits: how many bits repeat the sign, v; None takes the most a tensor allows.

    Raises:
        FormatError: for another inner format, and bits that it has not.

    Example:
        >>> import flipproof as fp, torch
        >>> stored = fp.SignVote(fp.FixedPoint()).encode(torch.tensor([0.5, -0.75, 1.0]))
        >>> int(stored.coding[0])  # 1.0 is bit 16: bits 17 to 31 are free
        15
        >>> stored.format.decode_words(stored.words ^ (0b1111111 << 20), stored.coding, torch.float32)  # seven faults
        tensor([ 0.5000, -0.7500,  1.0000])
        >>> fp.SignVote(fp.FixedPoint(), bits=17).encode(torch.tensor([0.25, -0.75, 1.0])).decode()
        tensor([ 0.2500, -0.5000,  0.5000])
    """

    bits: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.inner, Format) and not isinstance(self.inner, FixedPoint):
            raise FormatError(f"SignVote repairs the sign of fixed point and takes a FixedPoint, got {self.inner!r}")
        super().__post_init__()
        given = self.bits
        if given is not None and (
            not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= self.inner.width
        ):
            raise FormatError(
                f"SignVote: bits is None or how many of the {self.inner.width} bits of {self.inner!r} are alike, "
                f"got {given!r}"
            )

    @property
    def checks(self) -> int:
        return 0

    def fit(self, x: Tensor) -> Coding:
        coding = self.inner.fit(x)
        if self.bits is not None:
            return coding
        signed = self._signed(self.inner.encode_values(x, coding))
        # x XOR sign is the magnitude, and the bits above it are free
        largest = int((signed ^ (signed >> 63)).max()) if x.numel() else 0
        return (*coding, torch.tensor(self.inner.width - largest.bit_length(), device=x.device))

    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        inner, alike = self._split(coding, x.device)
        limit = torch.ones_like(alike) << (self.inner.width - alike)
        signed = self._signed(self.inner.encode_values(x, inner)).clamp(-limit, limit - 1)
        return unsigned(signed, self.width).to(word_dtype(self.width))

    def read(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        inner, alike = self._split(coding, words.device)
        data = self._voted(unsigned(words, self.width), alike)
        return self.inner.read(data.to(word_dtype(self.inner.width)), inner, dtype)

    def heal(self, words: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
        """The upper bits as they were voted."""
        _, alike = self._split(coding, words.device)
        data = self._voted(unsigned(words, self.width), alike)
        return data.to(words.dtype), torch.zeros_like(words, dtype=torch.bool)

    def protect_words(self, data: Tensor) -> Tensor:
        alike = self._given(data)
        limit = torch.ones_like(alike) << (self.inner.width - alike)
        return unsigned(self._signed(data).clamp(-limit, limit - 1), self.width)

    def repair_words(self, words: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._voted(words, self._given(words)), None

    def _voted(self, words: Tensor, alike: Tensor) -> Tensor:
        votes = alike - 1 + alike % 2
        ones = torch.zeros_like(words)
        for bit in range(self.inner.width):
            ones += ((words >> bit) & 1) * (bit >= self.inner.width - votes)
        sign = torch.where(ones > votes // 2, -1, 0)
        below = (torch.ones_like(alike) << (self.inner.width - alike)) - 1
        return unsigned((words & below) | (sign & ~below), self.width)

    def _split(self, coding: Coding, device: torch.device) -> tuple[Coding, Tensor]:
        """The inner format's constants, and how many bits repeat the sign."""
        if self.bits is None:
            return coding[:-1], coding[-1].to(torch.int64)
        return coding, torch.tensor(self.bits, device=device)

    def _given(self, words: Tensor) -> Tensor:
        if self.bits is None:
            raise FormatError(f"{self!r} fits its bits to a tensor: decode_words takes their number, or bits= says it")
        return torch.tensor(self.bits, device=words.device)

    def _signed(self, words: Tensor) -> Tensor:
        blank = 64 - self.inner.width  # shift the sign to bit 63 and back: sign extension
        return (words.to(torch.int64) << blank) >> blank
