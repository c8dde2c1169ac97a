"""CEP: chunks of a word with a parity bit each, in place of the lowest bits (Ahmadilivani et al. 2026)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats.protected import Protected, parity


@dataclass(frozen=True)
class CEP(Protected):
    """Chunked Embedded Parity: a chunk whose parity is wrong reads as zeros; costs no memory, but the lowest bits.

    A word of m bits has n = m / (D + 1) chunks of D bits, the first from the sign down, the others behind it, and n
    parity bits below them. Chunk k (0 is the uppermost) are bits m − (k + 1) · D to m − 1 − k · D, its even parity is
    bit n − 1 − k. With D = 3 and 32 bits, letters are chunks and their parity bits:

    HHHG GGFF FEEE DDDC CCBB BAAA HGFE DCBA

    At use the D bits of a chunk that has an odd number of faults, its parity bit included, read as 0; an even number is
    not seen. The parity bits read as 0, so that a value moves by less than 2^n units in the last place, fault-free. The
    uppermost chunk of a float holds its sign and the top of its exponent: as zeros it makes a small positive number.

    The layout is that of the authors' project FaultForge 0.2.1 (github.com/rezzubs/faultforge), whose
    schemes D3P1, D7P1 and D15P1 for 32 and 16 bits are ``data`` 3, 7 and 15; its project page calls the paper
    (Ahmadilivani et al. 2026, IOLTS, arXiv:2605.07417) the source. Of the paper we read abstract and introduction only.

    Args:
        inner: a format whose width is a multiple of data + parity; published for Float32 and Float16.
        data: bits of a chunk, D.
        parity: parity bits of a chunk; one is what is published, and all there is.

    Raises:
        FormatError: for a width that chunks do not fill, or another number of parity bits.

    Example:
        >>> import flipproof as fp, torch
        >>> stored = fp.CEP(fp.Float32(), data=3).encode(torch.tensor([0.7, -0.7]))
        >>> stored.decode()  # 16 bits of fraction are left
        tensor([ 0.7000, -0.7000])
        >>> stored.format.decode_words(stored.words ^ (1 << 30), (), torch.float32)  # sign, bits 30 and 29 read as 0
        tensor([3.7947e-20, 3.7947e-20])
    """

    data: int = 3
    parity: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.data, int) or isinstance(self.data, bool) or self.data < 1:
            raise FormatError(f"CEP: data is the number of bits of a chunk, from 1, got {self.data!r}")
        if self.parity != 1 or isinstance(self.parity, bool):
            raise FormatError(f"CEP: a chunk has one parity bit, got parity={self.parity!r}")
        super().__post_init__()
        if self.inner.width % (self.data + 1):
            raise FormatError(
                f"CEP: chunks of {self.data} data bits and 1 parity bit do not fill the {self.inner.width} bits of "
                f"{self.inner!r}; data=3, 7 or 15 fill 16 and 32"
            )

    @property
    def checks(self) -> int:
        return 0

    @property
    def _chunks(self) -> list[tuple[int, int]]:
        """(lowest data bit, parity bit) of each chunk."""
        count = self.inner.width // (self.data + 1)
        return [(self.inner.width - (k + 1) * self.data, count - 1 - k) for k in range(count)]

    def protect_words(self, data: Tensor) -> Tensor:
        words = torch.zeros_like(data)
        for lowest, check in self._chunks:
            chunk = (data >> lowest) & ((1 << self.data) - 1)
            words |= (chunk << lowest) | (parity(chunk) << check)
        return words

    def repair_words(self, words: Tensor) -> tuple[Tensor, Tensor | None]:
        data = torch.zeros_like(words)
        for lowest, check in self._chunks:
            chunk = (words >> lowest) & ((1 << self.data) - 1)
            right = parity(chunk) == (words >> check) & 1
            data |= torch.where(right, chunk, 0) << lowest
        return data, None
