"""The contract of a format: how a value is stored as a word of bits."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats.layout import Layout

Coding = tuple[Tensor, ...]
"""What a format keeps of a tensor besides its words, e.g. ``(scale, zero)``: each a scalar or one entry a slice
of axis 0. It is taken to lie in protected memory: faults hit words."""


def word_dtype(width: int) -> torch.dtype:
    """The narrowest torch integer that holds a word: uint8, int16, int32 or int64.

    Words narrower than their container leave its upper bits 0; a word as wide as a signed container uses its sign
    bit as its most significant bit.

    >>> word_dtype(5), word_dtype(32), word_dtype(39)
    (torch.uint8, torch.int32, torch.int64)
    """
    for limit, dtype in ((8, torch.uint8), (16, torch.int16), (32, torch.int32), (64, torch.int64)):
        if 1 <= width <= limit:
            return dtype
    raise FormatError(f"a word must be 1 to 64 bits wide, got {width}")


def unsigned(words: Tensor, width: int) -> Tensor:
    """Words of any container as int64 with everything above `width` 0 (a 64-bit word keeps its sign bit)."""
    wide = words.to(torch.int64)
    return wide if width == 64 else wide & ((1 << width) - 1)


def bit_pattern(values: Tensor) -> Tensor:
    """The bits of floating-point values as integers: −0.0 differs from 0.0, and a NaN equals itself."""
    width = values.element_size() * 8
    return values.contiguous().view(word_dtype(width))


@dataclass(frozen=True)
class Linear:
    """Words that are read by one multiplication, so that a compiled pass can read and write them.

    word = round(x / scale + zero), clamped to [low, high]; value = scale · (word − zero), in float64, rounded once

    Attributes:
        scale: float64, one entry, or one a slice of axis 0.
        zero: the same.
        low: the smallest word that is written; words are two's complement if it is negative.
        high: the largest.
    """

    scale: NDArray[np.float64]
    zero: NDArray[np.float64]
    low: int
    high: int

    @classmethod
    def of(cls, scale: Tensor, zero: Tensor, low: int, high: int) -> Linear:
        """With constants of a coding: scalars, or one entry a slice.

        >>> import torch
        >>> Linear.of(torch.tensor(0.5), torch.tensor(3.0), 0, 7).zero
        array([3.])
        """
        scales, zeros = (c.double().reshape(-1).contiguous().numpy() for c in (scale, zero.expand_as(scale)))
        return cls(scales, zeros, low, high)


@dataclass(frozen=True)
class Format(ABC):
    """How a value is stored as a word of `width` bits; bit 0 is the least significant.

    A new format is a frozen dataclass with `width`, `encode_values` and `decode_words`, and `fit` if it has to look
    at the whole tensor first (a scale). Formats wrap: a protected format holds an `inner` one and calls the same
    three methods. `flipproof.testing.FormatContract` is the suite it has to pass.

    Whether encoding happens on a whole tensor or on a few of its elements, the same two methods run, so a campaign
    that re-decodes only touched words and one that decodes everything agree bit by bit.

    A code over blocks sets `together`: its two methods then take whole blocks of so many consecutive words, row-major
    (what is left over at the end of a tensor belongs to its last block, which is longer), and the values of a block
    depend on all its words. Where its words are not equally wide it says so in `layout`; `width` is then the widest.

    A format that keeps constants of the tensor in stored words, where faults hit them, sets `stored_constants`: so many
    of the first entries of its coding are written to words behind those of the values, and read back from them.
    """

    @property
    def together(self) -> int:
        """How many consecutive words are decoded together; 1 where each word stands alone."""
        return 1

    @property
    def weights_only(self) -> bool:
        """True where the format, given alone, stores only the weights of layers; the rest keeps its own type."""
        return False

    @property
    @abstractmethod
    def width(self) -> int:
        """Stored bits a value, check bits included; of the widest word, where they differ."""

    def layout(self, values: int) -> Layout:
        """Which bits of so many words are stored, one behind the other."""
        return Layout.even(values, self.width)

    @property
    def stored_constants(self) -> int:
        """How many entries of the coding, from the first, are stored words themselves; the rest is protected."""
        return 0

    def constant_words(self, shape: tuple[int, ...]) -> int:
        """How many words hold constants of a tensor of this shape, behind those of its values."""
        return 0

    def write_constants(self, coding: Coding) -> Tensor:
        """The words that hold the stored part of a coding, in one dimension.

        Entry by entry, each as often as there are copies of it, its slices innermost.
        """
        raise NotImplementedError

    def read_constants(self, words: Tensor, rest: Coding) -> Coding:
        """The whole coding, as these words say and the protected `rest` of it."""
        raise NotImplementedError

    def heal_constants(self, words: Tensor, rest: Coding) -> Tensor:
        """The words of `write_constants` as they were written, as far as their redundancy says."""
        return words

    def stored_bits(self, shape: tuple[int, ...]) -> int:
        """Stored bits of a tensor of this shape in all.

        >>> import flipproof as fp
        >>> fp.Affine(bits=5).stored_bits((8, 4)), fp.RangeChecked(fp.Float16()).stored_bits((8, 4))
        (160, 608)
        """
        return self.layout(math.prod(shape) + self.constant_words(shape)).bits

    def fit(self, x: Tensor) -> Coding:
        """What has to be known of the whole tensor to encode it; nothing by default."""
        return ()

    @abstractmethod
    def encode_values(self, x: Tensor, coding: Coding) -> Tensor:
        """Values to words, element by element; `coding` broadcasts against `x`."""

    @abstractmethod
    def decode_words(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> Tensor:
        """Words to values of `dtype`, element by element; `coding` broadcasts against `words`."""

    def read(self, words: Tensor, coding: Coding, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(`decode_words`, which words were found to be beyond repair and read as a stated value; None for never)."""
        return self.decode_words(words, coding, dtype), None

    def heal(self, words: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
        """Words as they were written, as far as their redundancy says, and which ones are beyond repair.

        Healed words read as the same values, bit by bit, and are clean: to heal them again changes nothing. A word
        beyond repair stays as it is. Without redundancy nothing is known, and every word stays.

        >>> import flipproof as fp, torch
        >>> healed, lost = fp.SECDED(fp.Affine(bits=8)).heal(torch.tensor([0b1, 0b11], dtype=torch.int16), ())
        >>> healed.tolist(), lost.tolist()
        ([0, 3], [False, True])
        """
        return words, torch.zeros_like(words, dtype=torch.bool)

    def left_shift(self, dtype: torch.dtype) -> int | None:
        """By how many places a word is shifted to be the bit pattern of its value in `dtype`; None if it is not."""
        return 0 if self.is_native(dtype) else None

    def linear(self, coding: Coding) -> Linear | None:
        """How words are read where that is one multiplication; None where it is not."""
        return None

    def is_native(self, dtype: torch.dtype) -> bool:
        """True if a tensor of `dtype` already holds exactly these words in its memory."""
        return False

    def stores(self, dtype: torch.dtype) -> bool:
        """Whether tensors of this type are stored in it: floating-point ones; codes store what their `inner` does.

        >>> import flipproof as fp, torch
        >>> code = fp.BCH(fp.formats.Integer(8), t=1)
        >>> fp.Float16().stores(torch.float32), code.stores(torch.int8), code.stores(torch.float32)
        (True, True, False)
        """
        return dtype.is_floating_point

    def encode(self, x: Tensor) -> Stored:
        """Store a tensor: a floating-point one, or what `stores` says.

        Args:
            x: values, any shape, also empty.

        Returns:
            The stored tensor: `.words` has the shape of `x` and one integer element a value.

        Raises:
            FormatError: if `x` is of a type that the format does not store, or holds values it has no word for.

        Example:
            >>> import flipproof as fp, torch
            >>> stored = fp.Float32().encode(torch.tensor([1.0, -2.0]))
            >>> [f"{word & 0xFFFFFFFF:08x}" for word in stored.words.tolist()]
            ['3f800000', 'c0000000']
            >>> stored.decode()
            tensor([ 1., -2.])
        """
        if not self.stores(x.dtype):
            what = (
                "floating-point values"
                if self.stores(torch.float32)
                else "integers of its own sign alone, of its width or wider"
            )
            raise FormatError(f"{self!r} stores {what}, got a tensor of {x.dtype}")
        x = x.detach()
        coding = self.fit(x)
        return Stored(self, self.encode_values(x, dense(coding, x.shape)), coding, x.dtype)


@dataclass(frozen=True)
class Stored:
    """A tensor as a format keeps it.

    Attributes:
        format: the format that wrote it.
        words: integer tensor of the tensor's shape, one element a value.
        coding: the format's per-tensor (or per-channel) constants.
        dtype: of the decoded values.
    """

    format: Format
    words: Tensor
    coding: Coding
    dtype: torch.dtype

    def decode(self) -> Tensor:
        """The values that these words stand for."""
        return self.format.decode_words(self.words, dense(self.coding, self.words.shape), self.dtype)

    def decode_at(self, index: Tensor, words: Tensor) -> Tensor:
        """The values that `words` would stand for at the flat positions `index`, everything else left aside.

        Args:
            index: flat (row-major) positions, int64, shape (n,).
            words: the words there, shape (n,), of the dtype of `.words`.
        """
        if self.format.together > 1:
            changed = self.words.reshape(-1).clone()
            changed[index] = words
            every = blocks(index, self.format.together, changed.numel())
            values = self.format.decode_words(changed[every], sparse(self.coding, self.words.shape, every), self.dtype)
            return values[torch.searchsorted(every, index)]
        return self.format.decode_words(words, sparse(self.coding, self.words.shape, index), self.dtype)


def blocks(index: Tensor, together: int, total: int) -> Tensor:
    """Flat positions, ascending, of all words that are decoded together with those at `index`.

    >>> blocks(torch.tensor([5, 0]), together=2, total=7).tolist()  # the last block holds 4, 5 and 6
    [0, 1, 4, 5, 6]
    """
    if together == 1:
        return index
    if total <= together:  # one block, maybe a shorter one
        return torch.arange(total if index.numel() else 0, device=index.device)
    last = max(total // together - 1, 0)
    first = torch.unique((index // together).clamp(max=last))
    every: Tensor = (first[:, None] * together + torch.arange(together, device=index.device)).reshape(-1)
    if bool((first == last).any()):
        every = torch.cat([every, torch.arange((last + 1) * together, total, device=index.device)])
    return every


def dense(coding: Coding, shape: torch.Size) -> Coding:
    """Coding shaped to broadcast against a whole tensor of `shape`."""
    return tuple(c if c.dim() == 0 else c.reshape(-1, *[1] * (len(shape) - 1)) for c in coding)


def sparse(coding: Coding, shape: torch.Size, index: Tensor) -> Coding:
    """Coding of the elements at flat positions `index` of a tensor of `shape`."""
    if all(c.dim() == 0 for c in coding):
        return coding
    slice_size = max(shape.numel() // max(shape[0], 1), 1)
    return tuple(c if c.dim() == 0 else c[index // slice_size] for c in coding)
