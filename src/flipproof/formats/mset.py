"""MSET: the most significant exponent bit stored three times within the word (Ahmadilivani et al. 2026)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats.base import Coding, Format
from flipproof.formats.floating import BFloat16, Float16, Float32, Float64
from flipproof.formats.protected import Protected


@dataclass(frozen=True)
class MSET(Protected):
    """Most Significant Exponent bit Triplication: costs no memory, and the two lowest bits of the fraction.

    With m bits a word, bit m − 2 is the most significant bit of the exponent (bit 30 of Float32). It overwrites bits 1
    and 0, and at use it becomes the majority of the three:

    bit m − 2 = [bit m − 2 + bit 1 + bit 0 ≥ 2]

    One fault in these three bits does nothing to bit m − 2; two are taken for its value. No other bit is protected.
    Bits 1 and 0 are read as memory holds them, so that a value moves by at most 3 units in the last place, fault-free:
    from 2 on the two bits are 1, below they are 0. NaN stays NaN; an infinity would become one and is refused.

    The paper that brought it (Ahmadilivani et al. 2026, DATE) is known to us by title and by the description in its
    authors' project FaultForge 0.2.1 (github.com/rezzubs/faultforge, docs/experiments/encoded_memory.md), which it is
    held to: float32 and float16, copies in bits 0 and 1, which are not cleared on a read. The same rule for bfloat16
    and float64 is ours; 8-bit floats have no two bits to spare.

    Args:
        inner: a floating-point format of 16 bits or more.

    Raises:
        FormatError: for another inner format, and on infinite values.

    Example:
        >>> import flipproof as fp, torch
        >>> stored = fp.MSET(fp.Float32()).encode(torch.tensor([0.5, 2.0]))
        >>> [f"{word:032b}"[-2:] for word in stored.words.tolist()], stored.format.width
        (['00', '11'], 32)
        >>> stored.format.decode_words(stored.words ^ (1 << 30), (), torch.float32)  # the critical bit of both
        tensor([0.5000, 2.0000])
    """

    def __post_init__(self) -> None:
        if isinstance(self.inner, Format) and not isinstance(self.inner, (BFloat16, Float16, Float32, Float64)):
            raise FormatError(
                f"MSET copies an exponent bit over two fraction bits and takes Float32, Float16, BFloat16 or Float64, "
                f"got {self.inner!r}"
            )
        super().__post_init__()

    @property
    def checks(self) -> int:
        return 0

    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        # 3 in the lowest bits of an infinity's fraction makes it a NaN
        held = self.inner.decode_words(self.inner.encode_values(x, coding), coding, torch.float64)
        if infinite := int(torch.isinf(held).sum()):
            raise FormatError(
                f"{self!r} would read an infinity as NaN; {infinite} of {x.numel()} values are inf in {self.inner!r}"
            )
        return super().encode_values(x, coding)

    def protect_words(self, data: Tensor) -> Tensor:
        return (data & ~3) | (((data >> self._bit) & 1) * 3)

    def repair_words(self, words: Tensor) -> tuple[Tensor, Tensor | None]:
        votes = ((words >> self._bit) & 1) + ((words >> 1) & 1) + (words & 1)
        voted = (votes >= 2).to(torch.int64)
        return (words & ~(1 << self._bit)) | (voted << self._bit), None

    @property
    def _bit(self) -> int:
        return self.inner.width - 2
