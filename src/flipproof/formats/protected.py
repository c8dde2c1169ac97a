"""Stored words with redundant bits: FORTUNE's copied most significant bits, and parity.

A protected word keeps the inner format's word in its low bits and its check bits above. Check bits are stored bits:
they are in the fault space and are hit like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats.base import Coding, Format, unsigned, word_dtype


@dataclass(frozen=True)
class Protected(Format):
    """A format around a format: `checks` bits above the inner word."""

    inner: Format

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Format):
            raise FormatError(f"{type(self).__name__} protects the words of a Format, got {self.inner!r}")
        if self.inner.together > 1:
            inside = (
                "can be inside it, not around" if hasattr(self.inner, "inner") else "goes around words that stand alone"
            )
            raise FormatError(f"{self.inner!r} reads blocks of words together; {type(self).__name__} {inside}")
        if self.inner.stored_constants:
            raise FormatError(
                f"{self.inner!r} stores constants of the tensor; {type(self).__name__} can be inside it, not around"
            )
        if self.inner.width + self.checks > 64:
            raise FormatError(f"{self!r} would have {self.inner.width + self.checks} bits a word; at most 64 fit")

    @property
    def checks(self) -> int:
        """Check bits a word."""
        raise NotImplementedError

    def protect_words(self, data: Tensor) -> Tensor:
        """Inner words, as unsigned int64, to whole words."""
        raise NotImplementedError

    def repair_words(self, words: Tensor) -> tuple[Tensor, Tensor | None]:
        """Whole words to (inner words with what could be repaired, which ones are beyond repair or None)."""
        raise NotImplementedError

    @property
    def weights_only(self) -> bool:
        return self.inner.weights_only

    @property
    def width(self) -> int:
        return self.inner.width + self.checks

    def stores(self, dtype: torch.dtype) -> bool:
        return self.inner.stores(dtype)

    def fit(self, x: Tensor) -> Coding:
        return self.inner.fit(x)

    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        data = unsigned(self.inner.encode_values(x, coding), self.inner.width)
        return self.protect_words(data).to(word_dtype(self.width))

    def decode_words(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> Tensor:
        return self.read(words, coding, dtype)[0]

    def heal(self, words: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
        data, lost = self.repair_words(unsigned(words, self.width))
        inner, beyond = self.inner.heal(data.to(word_dtype(self.inner.width)), coding)
        healed = self.protect_words(unsigned(inner, self.inner.width)).to(words.dtype)
        beyond = beyond if lost is None else beyond | lost
        return torch.where(beyond, words, healed), beyond

    def read(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        data, lost = self.repair_words(unsigned(words, self.width))
        values, inside = self.inner.read(data.to(word_dtype(self.inner.width)), coding, dtype)
        if lost is None:
            return values, inside
        return torch.where(lost, torch.zeros_like(values), values), lost if inside is None else lost | inside


@dataclass(frozen=True)
class TripleMSB(Protected):
    """The most significant bits stored several times; the majority counts (Nazari et al. 2024, Step 2).

    With m inner bits, copy j of the k-th protected bit (k = 0 is the most significant) is bit m + k · copies + j. At
    use every protected bit becomes the majority of itself and its copies, so that up to `copies` / 2 faults in each
    group do nothing. With the defaults it is FORTUNE's word: m bits and two copies of the MSB, m + 2 stored bits.

    Args:
        inner: the format that is protected.
        copies: of each protected bit; even, so that there always is a majority.
        protect: how many bits, from the most significant down; or which ones, if others matter more (bit 30 of
            Float32): then the k-th of them is the k-th protected bit.

    Raises:
        FormatError: for an odd number of copies, bits that are not there or named twice, or words beyond 64 bits.

    Example:
        >>> import flipproof as fp, torch
        >>> fortune = fp.TripleMSB(fp.Affine(bits=3))
        >>> stored = fortune.encode(torch.tensor([-1.0, 0.0, 2.5]))
        >>> fortune.width, [f"{word:05b}" for word in stored.words.tolist()]
        (5, ['00000', '00010', '11111'])
        >>> fortune.decode_words(stored.words ^ 0b00100, stored.coding, torch.float32)  # the MSB itself is hit
        tensor([-1.0000,  0.0000,  2.5000])
    """

    copies: int = 2
    protect: int | Sequence[int] = 1

    def __post_init__(self) -> None:
        if isinstance(self.protect, Sequence):
            object.__setattr__(self, "protect", tuple(self.protect))
        named = self.protect if isinstance(self.protect, tuple) else ()
        for name, value in (("copies", self.copies), ("protect", len(named) if named else self.protect)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise FormatError(f"TripleMSB: {name} must be a whole number from 1, got {value!r}")
        if self.copies % 2:
            raise FormatError(f"TripleMSB: an even number of copies gives a majority, got copies={self.copies}")
        if any(not isinstance(bit, int) or isinstance(bit, bool) for bit in named) or len(set(named)) < len(named):
            raise FormatError(f"TripleMSB: protect names bits, each once, got {named}")
        super().__post_init__()
        if not all(0 <= bit < self.inner.width for bit in self._bits):
            raise FormatError(f"TripleMSB: {self.inner!r} has {self.inner.width} bits, got protect={self.protect}")

    @property
    def _bits(self) -> tuple[int, ...]:
        """The protected bits of the inner word."""
        if isinstance(self.protect, int):
            return tuple(self.inner.width - 1 - k for k in range(self.protect))
        return tuple(self.protect)

    @property
    def checks(self) -> int:
        return self.copies * (self.protect if isinstance(self.protect, int) else len(self.protect))

    def protect_words(self, data: Tensor) -> Tensor:
        m = self.inner.width
        words = data.clone()
        for k, place in enumerate(self._bits):
            bit = (data >> place) & 1
            words |= (bit * ((1 << self.copies) - 1)) << (m + k * self.copies)
        return words

    def repair_words(self, words: Tensor) -> tuple[Tensor, Tensor | None]:
        m = self.inner.width
        data = words & ((1 << m) - 1)
        for k, place in enumerate(self._bits):
            votes = (words >> place) & 1
            for j in range(self.copies):
                votes = votes + ((words >> (m + k * self.copies + j)) & 1)
            voted = (votes > self.copies // 2).to(torch.int64)
            data = (data & ~(1 << place)) | (voted << place)
        return data, None


@dataclass(frozen=True)
class Parity(Protected):
    """One even parity bit a word; a word whose parity is odd reads as 0.0.

    Detects every odd number of faults and no even one.

    Args:
        inner: the format that is protected.

    Example:
        >>> import flipproof as fp, torch
        >>> stored = fp.Parity(fp.Float32()).encode(torch.tensor([0.5]))
        >>> stored.decode_at(torch.tensor([0]), stored.words ^ (1 << 30))
        tensor([0.])
    """

    @property
    def checks(self) -> int:
        return 1

    def protect_words(self, data: Tensor) -> Tensor:
        return data | (parity(data) << self.inner.width)

    def repair_words(self, words: Tensor) -> tuple[Tensor, Tensor | None]:
        return words & ((1 << self.inner.width) - 1), parity(words) == 1


def parity(words: Tensor) -> Tensor:
    """1 where an odd number of the 64 bits is set, int64.

    >>> parity(torch.tensor([0, 1, 3, 7, -1])).tolist()
    [0, 1, 0, 1, 0]
    """
    folded = words
    for shift in (32, 16, 8, 4, 2, 1):
        folded = folded ^ (folded >> shift)
    return folded & 1
