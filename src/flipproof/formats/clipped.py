"""Weight bit clipping: stored bits that are forced to a value on every read (Parchekani et al. 2024, III-B)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flipproof.errors import FlipproofWarning, FormatError
from flipproof.formats.base import Coding, Format, dense, word_dtype


@dataclass(frozen=True)
class BitClipped(Format):
    """The words of another format, some of whose bits read as a constant whatever memory holds.

    value = inner.decode((word AND NOT zeros) OR ones)

    Memory holds the inner format's words as they are, so all their bits can be hit; a fault in a clipped bit changes
    nothing. It costs no memory. Where the clipped bits are constant over the weights (`bit_profile` says so), decoded
    values are bit-identical to the inner format's. Where they are not, weights change: encoding warns of it, and the
    golden run shows what it does.

    Args:
        inner: the format that is clipped.
        zeros: bits that read as 0; bit 0 is the least significant.
        ones: bits that read as 1.

    Raises:
        FormatError: if a bit is not one of the inner format's, is named twice, or none is named.

    Example:
        >>> import flipproof as fp, torch
        >>> wbc = fp.BitClipped(fp.Float32(), zeros=(30,))
        >>> words = wbc.encode(torch.tensor([0.5])).words ^ (1 << 30)  # the critical bit flips
        >>> wbc.decode_words(words, (), torch.float32)
        tensor([0.5000])
    """

    inner: Format
    zeros: Sequence[int] = ()
    ones: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Format):
            raise FormatError(f"BitClipped clips the words of a Format, got {self.inner!r}")
        if self.inner.together > 1 or self.inner.stored_constants:
            raise FormatError(
                f"BitClipped clips words that stand alone; {self.inner!r} has others: put it inside, if it can"
            )
        for name in ("zeros", "ones"):
            given = getattr(self, name)
            bits = [given] if isinstance(given, int) else list(given)
            wrong = [b for b in bits if not isinstance(b, int) or isinstance(b, bool) or not 0 <= b < self.width]
            if wrong:
                raise FormatError(f"BitClipped: {self.inner!r} has bits 0 to {self.width - 1}, got {name}={given!r}")
            object.__setattr__(self, name, tuple(sorted(bits)))
        named = (*self.zeros, *self.ones)
        if not named or len(set(named)) != len(named):
            raise FormatError(
                f"BitClipped takes at least one bit, and each once, got zeros={self.zeros}, ones={self.ones}"
            )

    @property
    def weights_only(self) -> bool:
        return self.inner.weights_only

    @property
    def width(self) -> int:
        return self.inner.width

    @property
    def masks(self) -> tuple[int, int]:
        """(bits that are kept, bits that are set), as numbers of the words' own integer type.

        >>> import flipproof as fp
        >>> [hex(mask) for mask in fp.BitClipped(fp.BFloat16(), zeros=(14,), ones=(0,)).masks]
        ['-0x4001', '0x1']
        """
        keep = ~sum(1 << bit for bit in self.zeros)
        force = sum(1 << bit for bit in self.ones)
        dtype = word_dtype(self.width)
        return _as_number(keep, dtype), _as_number(force, dtype)

    def fit(self, x: Tensor) -> Coding:
        coding = self.inner.fit(x)
        words = self.inner.encode_values(x, dense(coding, x.shape))
        keep, force = self.masks
        if changed := int((((words & keep) | force) != words).sum()):
            warnings.warn(
                f"{self!r} clips bits that are not constant: {changed:,} of {x.numel():,} values of a tensor of shape "
                f"{tuple(x.shape)} change without any fault. fp.bit_profile shows which bits are constant",
                FlipproofWarning,
                stacklevel=2,
            )
        return coding

    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        return self.inner.encode_values(x, coding)

    def decode_words(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> Tensor:
        return self.read(words, coding, dtype)[0]

    def read(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        keep, force = self.masks
        return self.inner.read((words & keep) | force, coding, dtype)

    def heal(self, words: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
        """A clipped bit is written as it is read: what it was is known only where it is constant over the weights."""
        keep, force = self.masks
        healed, lost = self.inner.heal((words & keep) | force, coding)
        return torch.where(lost, words, healed), lost


def _as_number(mask: int, dtype: torch.dtype) -> int:
    """A bit mask as the number that `dtype` calls it: two's complement where that is signed."""
    info = torch.iinfo(dtype)
    mask &= (1 << info.bits) - 1
    return mask - (1 << info.bits) if mask > info.max else mask
