"""Whole numbers as they lie in memory: what quantised checkpoints keep their weights in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats.base import Coding, Format, word_dtype


@dataclass(frozen=True)
class Integer(Format):
    """Two's complement (or unsigned) integers of torch: a word is the value's bit pattern.

    It is the own format of integer tensors, which a fault space takes as they are; it stores no floating-point values.

    Args:
        bits: 8, 16, 32 or 64.
        signed: whether the top bit counts −2^(bits−1).

    Raises:
        FormatError: for another width, or a tensor of another type. A tensor of a wider type is stored as long as all
            of its values fit: a zero point of an int8 layer that torch.ao keeps as int64.

    Example:
        >>> import torch
        >>> stored = Integer(8).encode(torch.tensor([-1, 5], dtype=torch.int8))
        >>> stored.words.tolist(), Integer(8).decode_words(stored.words ^ 128, (), torch.int8).tolist()
        ([255, 5], [127, -123])
    """

    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in (8, 16, 32, 64):
            raise FormatError(f"Integer stores 8, 16, 32 or 64 bits a value, got bits={self.bits!r}")

    @classmethod
    def of(cls, dtype: torch.dtype) -> Integer:
        """The format that a tensor of this type is already in.

        Raises:
            FormatError: if it is no integer type.
        """
        if dtype not in _TYPES:
            raise FormatError(f"{dtype} is no integer type that a Format stores; these are {list(_TYPES)}")
        return cls(*_TYPES[dtype])

    @property
    def width(self) -> int:
        return self.bits

    def is_native(self, dtype: torch.dtype) -> bool:
        return _TYPES.get(dtype) == (self.bits, self.signed)

    def stores(self, dtype: torch.dtype) -> bool:
        bits, signed = _TYPES.get(dtype, (0, self.signed))
        return self.signed == signed and self.bits <= bits

    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        own = x.clone(memory_format=torch.contiguous_format)
        if not self.is_native(x.dtype):
            narrow = own.to(self._dtype)
            if not torch.equal(narrow.to(x.dtype), own):
                wide = own.reshape(-1)[int((narrow.to(x.dtype) != own).reshape(-1).nonzero()[0, 0])]
                raise FormatError(f"{self!r} does not hold {int(wide)}, which a tensor of {x.dtype} has")
            own = narrow
        return own.view(word_dtype(self.bits))

    def decode_words(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> Tensor:
        return words.clone(memory_format=torch.contiguous_format).view(self._dtype).to(dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return next(dtype for dtype, held in _TYPES.items() if held == (self.bits, self.signed))


_TYPES: dict[torch.dtype, tuple[int, bool]] = {
    torch.int8: (8, True),
    torch.int16: (16, True),
    torch.int32: (32, True),
    torch.int64: (64, True),
    torch.uint8: (8, False),
    torch.uint16: (16, False),
    torch.uint32: (32, False),
    torch.uint64: (64, False),
}
INTEGERS = tuple(_TYPES)
"""The integer types of torch; a Boolean is none."""
