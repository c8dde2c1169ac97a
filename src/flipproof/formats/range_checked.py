"""Values checked when they are read: what no weight of the tensor was, is no weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats.base import Coding, Format, unsigned


@dataclass(frozen=True)
class RangeChecked(Format):
    """Words of another format; a value outside the range that the tensor had when it was stored reads as 0.0.

    value = v if low ≤ v ≤ high else 0, v = inner.decode(word), low and high the least and the largest stored value

    NaN is outside any range. The bounds are stored words like any other and hit by faults like any other: `copies` of
    each, behind the words of the values, and what counts is the majority of each bit. They cost 2 · copies words a
    tensor, or a channel (slice of axis 0). A fault that leaves a value in its range is not noticed.

    Args:
        inner: the format whose values are checked; its words stand alone.
        per: "tensor", or "channel" for bounds of each output channel.
        copies: of each bound, an odd number.

    Raises:
        FormatError: for a format that codes blocks of words, other `per`, an even number of copies, for NaN, or for
            bounds of a tensor whose format has a scale a channel: no word of one channel holds those of another.

    Example:
        >>> import flipproof as fp, torch
        >>> stored = fp.RangeChecked(fp.Float32()).encode(torch.tensor([0.5, -0.25]))
        >>> stored.decode_at(torch.tensor([0]), stored.words[:1] ^ (1 << 30))  # 1.7e38 was no weight
        tensor([0.])
        >>> fp.RangeChecked(fp.FixedPoint(), per="channel").constant_words((64, 3, 3))
        384
    """

    inner: Format
    per: Literal["tensor", "channel"] = "tensor"
    copies: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Format):
            raise FormatError(f"RangeChecked checks the values of a Format, got {self.inner!r}")
        if self.inner.together > 1 or self.inner.stored_constants:
            raise FormatError(f"RangeChecked checks values whose words stand alone; {self.inner!r} has others")
        if self.per not in ("tensor", "channel"):
            raise FormatError(f"RangeChecked: per is 'tensor' or 'channel', got {self.per!r}")
        whole = isinstance(self.copies, int) and not isinstance(self.copies, bool)
        if not whole or self.copies < 1 or self.copies % 2 == 0:
            raise FormatError(f"RangeChecked: an odd number of copies has a majority, got copies={self.copies!r}")

    @property
    def weights_only(self) -> bool:
        return self.inner.weights_only

    @property
    def width(self) -> int:
        return self.inner.width

    @property
    def stored_constants(self) -> int:
        return 2

    def _rows(self, shape: tuple[int, ...]) -> int:
        return shape[0] if self.per == "channel" and shape else 1

    def constant_words(self, shape: tuple[int, ...]) -> int:
        return 2 * self.copies * self._rows(shape)

    def fit(self, x: Tensor) -> Coding:
        inner = self.inner.fit(x)
        if bool(torch.isnan(x).any()):
            raise FormatError(f"{self!r} has no range that NaN is in; {int(torch.isnan(x).sum())} values are NaN")
        rows = self._rows(tuple(x.shape))
        if self.per == "tensor" and any(c.numel() > 1 for c in inner):
            raise FormatError(
                f"{self!r}: bounds of a tensor are words of one scale, but {self.inner!r} has a scale a channel; take "
                f"per='channel'"
            )
        if not x.numel():
            zeros = torch.zeros(rows if rows != 1 else (), dtype=torch.float64, device=x.device)
            return (zeros, zeros, *inner)
        shaped = tuple(c if c.dim() == 0 else c.reshape(-1, *[1] * (x.dim() - 1)) for c in inner)
        values = self.inner.decode_words(self.inner.encode_values(x, shaped), shaped, torch.float64)
        if rows == 1:
            return (values.min(), values.max(), *inner)
        values = values.reshape(rows, -1)
        return (values.amin(dim=1), values.amax(dim=1), *inner)

    def write_constants(self, coding: Coding) -> Tensor:
        low, high, *inner = coding
        # a tensor of a single channel: its bounds are scalars, its scales may not be
        rest = tuple(c if c.dim() == 0 or low.dim() else c[0] for c in inner)
        words = [self.inner.encode_values(bound, rest).reshape(-1) for bound in (low, high)]
        return torch.cat([*words[:1] * self.copies, *words[1:] * self.copies])

    def read_constants(self, words: Tensor, rest: Coding) -> Coding:
        voted = [_majority(words.reshape(2, self.copies, -1)[k], self.inner.width) for k in (0, 1)]
        scalar = words.numel() == 2 * self.copies
        inner = tuple(c[0] if scalar and c.dim() else c for c in rest)
        bounds = [self.inner.decode_words(w.reshape(()) if scalar else w, inner, torch.float64) for w in voted]
        return (*bounds, *rest)

    def heal_constants(self, words: Tensor, rest: Coding) -> Tensor:
        voted = [_majority(words.reshape(2, self.copies, -1)[k], self.inner.width) for k in (0, 1)]
        scalar = words.numel() == 2 * self.copies
        inner = tuple(c[0] if scalar and c.dim() else c for c in rest)
        healed = [self.inner.heal(w, inner)[0] for w in voted]
        return torch.cat([*healed[:1] * self.copies, *healed[1:] * self.copies])

    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        return self.inner.encode_values(x, coding[2:])

    def decode_words(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> Tensor:
        return self.read(words, coding, dtype)[0]

    def read(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        low, high, *inner = coding
        values, lost = self.inner.read(words, tuple(inner), torch.float64)
        outside = ~((values >= low) & (values <= high))
        kept = self.inner.decode_words(words, tuple(inner), dtype)
        outside = outside if lost is None else outside | lost
        return torch.where(outside, torch.zeros_like(kept), kept), outside

    def heal(self, words: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
        """What the inner format repairs, if it comes out in range; a value outside is known to be wrong and no more."""
        low, high, *inner = coding
        healed, lost = self.inner.heal(words, tuple(inner))
        values, unread = self.inner.read(words, tuple(inner), torch.float64)
        lost = lost | ~((values >= low) & (values <= high))
        lost = lost if unread is None else lost | unread
        return torch.where(lost, words, healed), lost


def _majority(copies: Tensor, width: int) -> Tensor:
    """Bit by bit, of words of shape (copies, n)."""
    votes = unsigned(copies, width)
    word = torch.zeros_like(votes[0])
    for bit in range(width):
        ones = ((votes >> bit) & 1).sum(dim=0)
        word = word | ((ones > len(votes) // 2).to(torch.int64) << bit)
    return word.to(copies.dtype)
