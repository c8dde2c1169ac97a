"""Opportunistic parity: the least significant bit of a word is its parity (Burel et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats.protected import Protected, parity


@dataclass(frozen=True)
class LSBParity(Protected):
    """Bit 0 makes the parity of the word even; a word whose parity is odd reads as 0.0. It costs no memory.

    bit 0 = bit 1 ⊕ … ⊕ bit m − 1

    Detects every odd number of faults in a word and no even one, as `Parity` does, which pays a bit for it. Bit 0
    reads as 0, so that a value moves by at most one unit in the last place, fault-free.

    Burel et al. 2021 call it opportunistic parity, for bfloat16 and float32. Of the paper we read the abstract: errors
    in the weights are detected and masked at no cost of storage. Masked is taken to mean 0.0. That bit 0 reads as 0,
    not as stored, is ours: −inf, whose parity is odd in float32, would else read as NaN. FaultForge 0.2.1
    (github.com/rezzubs/faultforge) has the same for float16 as scheme D15P1 of its CEP.

    Args:
        inner: the format that is protected, of two bits or more.

    Raises:
        FormatError: if the inner words have one bit.

    Example:
        >>> import flipproof as fp, torch
        >>> stored = fp.LSBParity(fp.Float32()).encode(torch.tensor([0.5, 1.5]))
        >>> [word & 1 for word in stored.words.tolist()]  # 0.5 has six ones, 1.5 has eight
        [0, 0]
        >>> stored.format.decode_words(stored.words ^ (1 << 30), (), torch.float32)
        tensor([0., 0.])
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner.width < 2:
            raise FormatError(f"LSBParity: words of one bit have none to spare, got {self.inner!r}")

    @property
    def checks(self) -> int:
        return 0

    def protect_words(self, data: Tensor) -> Tensor:
        kept = data & ~1
        return kept | parity(kept)

    def repair_words(self, words: Tensor) -> tuple[Tensor, Tensor | None]:
        return words & ~1, parity(words) == 1
