"""Words as a stream of bits, without a gap, and the parametrisation that keeps a parameter that way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flipproof._kernels import kernel
from flipproof.formats._compiled import by_table, in_reach
from flipproof.formats.base import Coding, Format, dense, word_dtype
from flipproof.formats.layout import Layout, Whole

_AT_ONCE = 1 << 20
"""Words that tensor operations unpack at once: some 200 MB."""

TABLE_WIDTH = 10
"""Up to this width a word is looked up in a table of all values it can stand for."""


def pack(words: Tensor, width: int | Layout) -> Tensor:
    """Words as uint8: bit b of word v is bit v · width + b of the stream, the lowest bit of a byte first.

    A `Layout` says it where words are not equally wide: then only the bits that it counts are stored.

    Example:
        >>> pack(torch.tensor([0b101, 0b011, 0b110], dtype=torch.uint8), 3).tolist()  # 110 011 101, from the right
        [157, 1]
    """
    flat = words.detach().reshape(-1).cpu().contiguous().numpy()
    layout = _layout(width, flat.size)
    out = np.zeros(math.ceil(layout.bits / 8), np.uint8)
    for words_, base, starts in _pieces(layout, flat.view(f"u{flat.itemsize}")):
        _pack(words_, base, starts, out)
    return torch.from_numpy(out).to(words.device)


def unpack(packed: Tensor, width: int | Layout, shape: tuple[int, ...]) -> Tensor:
    """The words of a stream, in the integer type that the width takes.

    Raises:
        ValueError: if the stream has another length than that many words need.
    """
    count = math.prod(shape)
    layout = _layout(width, count)
    if packed.numel() != math.ceil(layout.bits / 8):
        raise ValueError(
            f"{count} words of {layout.widest} bits, {layout.bits} in all, fill {math.ceil(layout.bits / 8)} bytes, "
            f"got {packed.numel()}"
        )
    if in_reach(packed):
        dtype, stream = word_dtype(layout.widest), packed.contiguous().numpy()
        if layout.is_even and layout.widest == 8 * dtype.itemsize:  # the bytes are the words
            found = stream.view(f"u{dtype.itemsize}")
        else:
            found = np.empty(count, f"u{dtype.itemsize}")
            for words, base, starts in _pieces(layout, found):
                _unpack(stream, base, starts, words)
        signed = found if dtype == torch.uint8 else found.view(f"i{dtype.itemsize}")
        return torch.from_numpy(signed).reshape(shape)
    if not torch.compiler.is_compiling():
        return _gathered(packed, layout).to(word_dtype(layout.widest)).reshape(shape)
    widest = layout.widest
    # division and remainder instead of shifts: every exporter knows them
    powers = torch.tensor([1 << place for place in range(8)], device=packed.device)
    bits = (packed.to(torch.int64).unsqueeze(-1) // powers % 2).reshape(-1)
    weights = torch.tensor([1 << place if place < 63 else -(1 << 63) for place in range(widest)], device=packed.device)
    if layout.is_even:
        bits = bits[: layout.bits].reshape(count, widest)
    else:  # a narrower word reads 0 where it has no bit: that is what lies behind the stream's end
        values = np.arange(count, dtype=np.int64)
        places = layout.first(values)[:, None] + np.arange(widest)
        places[np.arange(widest) >= layout.width(values)[:, None]] = bits.numel()
        bits = torch.cat([bits, bits.new_zeros(1)])[torch.from_numpy(places).to(packed.device)]
    return (bits * weights).sum(dim=-1).to(word_dtype(widest)).reshape(shape)


def _gathered(packed: Tensor, layout: Layout) -> Tensor:
    """The words as int64 by tensor operations on any device: the bytes that hold them, shifted together."""
    found = torch.zeros(layout.values, dtype=torch.int64, device=packed.device)
    last, first = packed.numel() - 1, 0
    for piece, base, starts in _pieces(layout, np.empty(layout.values, np.bool_)):
        begins = torch.from_numpy(starts).to(packed.device)
        for done in range(0, piece.size, _AT_ONCE):
            within = torch.arange(done, min(done + _AT_ONCE, piece.size), device=packed.device)
            block, j = within // (starts.size - 1), within % (starts.size - 1)
            position = base + block * begins[-1] + begins[j]
            width = begins[j + 1] - begins[j]
            place, shift = position >> 3, position & 7
            word = packed[place].long() >> shift
            for i in range(1, (layout.widest + 14) // 8):
                byte = packed[(place + i).clamp(max=last)].long()
                word |= torch.where(shift + width > 8 * i, byte << (8 * i - shift).clamp(max=63), 0)
            masked = torch.where(width < 64, word & ((1 << width.clamp(max=63)) - 1), word)
            found[first + done : first + done + within.numel()] = masked
        first += piece.size
    return found


def _layout(width: int | Layout, values: int) -> Layout:
    return Layout.even(values, width) if isinstance(width, int) else width


def _pieces(layout: Layout, words: NDArray[Any]) -> list[tuple[NDArray[Any], int, Whole]]:
    """The words of the whole blocks and those behind them: (words, position of the first, starts within a block)."""
    inside, behind = layout.starts
    whole = len(layout.block) * layout.blocks
    pieces = [(words[:whole], 0, inside)]
    if layout.tail:
        pieces.append((words[whole:], layout.blocks * int(inside[-1]), behind))
    return pieces


def words_at(packed: Tensor, first: Whole, width: Whole) -> Tensor:
    """The words that lie at these bits of a stream, each of so many bits, in the type that the widest takes.

    >>> words_at(torch.tensor([157, 1], dtype=torch.uint8), np.array([3, 6]), np.array([3, 3])).tolist()
    [3, 6]
    """
    dtype = word_dtype(int(width.max(initial=1)))
    found = np.empty(first.size, f"u{dtype.itemsize}")
    _pick(packed.detach().cpu().contiguous().numpy(), first, width, found)
    return torch.from_numpy(found if dtype == torch.uint8 else found.view(f"i{dtype.itemsize}"))


class Packed(nn.Module):
    """Decodes a bit-packed parameter at every use; `torch.nn.utils.parametrize` calls it.

    Attributes:
        format: how the values are stored.
        shape: of the parameter.
        dtype: of its values.
        trained: whether the parameter had a gradient before it was packed; `unpack_` gives it back.
    """

    def __init__(self, format: Format, like: Tensor) -> None:
        super().__init__()
        self.format, self.shape, self.dtype = format, tuple(like.shape), like.dtype
        self.trained = like.requires_grad

    def right_inverse(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values to (packed words, constants); constants as two whole numbers m · 2^e, which no `.half()` can round."""
        stored, own = self.format.encode(values), self.format.stored_constants
        words = stored.words.reshape(-1)
        if own:
            words = torch.cat([words, self.format.write_constants(stored.coding)])
        return pack(words, self.format.layout(words.numel())), *(_as_integers(c) for c in stored.coding[own:])

    def forward(self, packed: Tensor, *constants: Tensor) -> Tensor:
        """The parameter."""
        count = math.prod(self.shape)
        if self.format.stored_constants:
            words, _, coding = self.read(packed, *constants)
            return self.format.decode_words(words, dense(coding, words.shape), self.dtype)
        coding = tuple(self.constant(c) for c in constants)
        rows = max([c.numel() for c in coding], default=1)
        fast = in_reach(packed) and self.dtype == torch.float32 and self.format.width <= TABLE_WIDTH
        if fast and self.format.together == 1 and count >= 2**self.format.width * rows:
            every = torch.arange(2**self.format.width).to(word_dtype(self.format.width))
            shaped = tuple(c.reshape(-1, 1) if c.dim() else c for c in coding)
            table = self.format.decode_words(every.expand(rows, -1), shaped, self.dtype).contiguous()
            out = torch.empty(self.shape)
            _look_up(packed.numpy(), self.format.width, table.numpy(), count // rows, out.view(-1).numpy())
            return out
        words = unpack(packed, self.format.layout(count), self.shape)
        return by_table(self.format, words, dense(coding, words.shape), self.dtype)[0]

    def read(self, packed: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor, Coding]:
        """(the words of the values, in their shape, those of stored constants, the whole coding)."""
        rest: Coding = tuple(self.constant(c) for c in constants)
        count = math.prod(self.shape)
        if not self.format.stored_constants:
            words = unpack(packed, self.format.layout(count), self.shape)
            return words, words.reshape(-1)[:0], rest
        total = count + self.format.constant_words(self.shape)
        every = unpack(packed, self.format.layout(total), (total,))
        return every[:count].reshape(self.shape), every[count:], self.format.read_constants(every[count:], rest)

    @torch.no_grad()
    def healed(self, packed: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All words, those of stored constants last: (as stored, as healed, which of them are beyond repair)."""
        words, own, coding = self.read(packed, *constants)
        healed, lost = self.format.heal(words, dense(coding, words.shape))
        before, healed, lost = words.reshape(-1), healed.reshape(-1), lost.reshape(-1)
        if own.numel():
            rest = coding[self.format.stored_constants :]
            before = torch.cat([before, own])
            healed = torch.cat([healed, self.format.heal_constants(own, rest)])
            lost = torch.cat([lost, torch.zeros_like(own, dtype=torch.bool)])
        return before, healed, lost

    @staticmethod
    def constant(integers: Tensor) -> Tensor:
        """A constant as float64, of the two whole numbers that `right_inverse` made of it."""
        return integers[0].to(torch.float64) * torch.pow(2.0, integers[1].to(torch.float64))

    def extra_repr(self) -> str:
        """Format and shape."""
        return f"{self.format!r}, {self.shape}"


def _as_integers(constant: Tensor) -> Tensor:
    """A float64 as (m, e) with value m · 2^e, exactly; int64 of shape (2, …)."""
    mantissa, exponent = torch.frexp(constant.to(torch.float64))
    return torch.stack([(mantissa * 2.0**53).to(torch.int64), exponent.to(torch.int64) - 53])


@kernel()
def _pack(words: Any, base: int, starts: Any, out: Any) -> None:
    """Words into a stream of zeros from bit `base` on; word j of a block lies at starts[j] to starts[j + 1] of it."""
    together = starts.size - 1
    for v in range(words.size):
        j = v % together
        word, left = np.uint64(words[v]), starts[j + 1] - starts[j]
        position = base + v // together * starts[together] + starts[j]
        while left > 0:
            shift = position & 7
            taken = min(8 - shift, left)
            piece = word & np.uint64((1 << taken) - 1)
            out[position >> 3] |= np.uint8(piece << np.uint64(shift))
            word >>= np.uint64(taken)
            position += taken
            left -= taken


@kernel()
def _word(packed: Any, position: int, width: int) -> Any:
    word, done = np.uint64(0), 0
    while done < width:
        shift = position & 7
        taken = min(8 - shift, width - done)
        piece = (np.uint64(packed[position >> 3]) >> np.uint64(shift)) & np.uint64((1 << taken) - 1)
        word |= piece << np.uint64(done)
        position += taken
        done += taken
    return word


@kernel()
def _pick(packed: Any, first: Any, width: Any, out: Any) -> None:
    for i in range(first.size):
        out[i] = _word(packed, first[i], width[i])


@kernel()
def _unpack(packed: Any, base: int, starts: Any, out: Any) -> None:
    """The inverse of `_pack`: the stream is read once, a byte at a time, into a register that words are taken from."""
    together = starts.size - 1
    widest = 0
    for j in range(together):
        widest = max(widest, starts[j + 1] - starts[j])
    if widest > 56:  # a register of 64 bits holds no such word and what is left of a byte
        for v in range(out.size):
            j = v % together
            out[v] = _word(packed, base + v // together * starts[together] + starts[j], starts[j + 1] - starts[j])
        return
    byte, held, have = base >> 3, np.uint64(0), 0
    if base & 7 and out.size:
        held, have = np.uint64(packed[byte]) >> np.uint64(base & 7), 8 - (base & 7)
        byte += 1
    for first in range(0, out.size, together):
        for j in range(together):
            width = starts[j + 1] - starts[j]
            while have < width:
                held |= np.uint64(packed[byte]) << np.uint64(have)
                byte += 1
                have += 8
            out[first + j] = held & np.uint64((1 << width) - 1)
            held >>= np.uint64(width)
            have -= width


@kernel()
def _look_up(packed: Any, width: int, table: Any, slice_size: int, out: Any) -> None:
    """Every word's value from the table of its row; eight words of at most 8 bits are `width` bytes, read at once."""
    mask = np.uint64((1 << width) - 1)
    for row in range(table.shape[0]):
        values = table[row]
        first, last = row * slice_size, (row + 1) * slice_size
        v = first
        while v < last:
            if width <= 8 and v & 7 == 0 and v + 8 <= last:
                start = (v >> 3) * width
                group = np.uint64(0)
                for k in range(width):
                    group |= np.uint64(packed[start + k]) << np.uint64(8 * k)
                for k in range(8):
                    out[v + k] = values[(group >> np.uint64(k * width)) & mask]
                v += 8
            else:
                out[v] = values[_word(packed, v * width, width)]
                v += 1
