"""Words changed and put back: where the values live, in one compiled pass, or by their flat positions.

For a format that equals the tensor's own type (float32 weights stored as binary32), bit b of a site *is* bit b of the
tensor's memory on a little-endian machine, so a fault is one byte changed in place and the undo is that byte written
back. Where memory holds what words of a format stand for, the same pass finds the word of each touched value, changes
it, and writes what it reads as then: by `Linear` arithmetic, or by a `Lookup` of all its words. This is what keeps
injection at a few microseconds a trial; all else is encoded, changed and decoded by torch (`cell`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from flipproof._kernels import kernel
from flipproof.formats.base import Linear, word_dtype
from flipproof.spaces.contract import Positions

FLIP, CLEAR, SET = 0, 1, 2

_AHEAD = 64
"""Words fetched ahead of the one being changed: a fault is a cache miss, and they can be waited for together."""


def _reader(kind: types.Type) -> Any:
    """An intrinsic that reads a number of this type at an address."""

    def load(typing_context, address):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.load(builder.inttoptr(args[0], context.get_value_type(kind).as_pointer()))

        return kind(types.uint64), codegen

    return intrinsic(load)


def _writer(kind: types.Type) -> Any:
    """An intrinsic that writes a number of this type to an address."""

    def store(typing_context, address, value):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            builder.store(args[1], builder.inttoptr(args[0], context.get_value_type(kind).as_pointer()))
            return context.get_dummy_value()

        return types.void(types.uint64, kind), codegen

    return intrinsic(store)


def _fetch(typing_context, address):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer, number = builder.inttoptr(args[0], ir.IntType(8).as_pointer()), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(prefetch, [pointer, number(1), number(3), number(1)])  # to write, keep in cache, data
        return context.get_dummy_value()

    return types.void(types.uint64), codegen


_load_byte, _store_byte = _reader(types.uint8), _writer(types.uint8)
_load_16, _load_32, _store_32 = _reader(types.uint16), _reader(types.uint32), _writer(types.uint32)
_load_float, _load_double = _reader(types.float32), _reader(types.float64)
_fetch_line: Any = intrinsic(_fetch)

_DIRECT, _LINEAR, _LOOKUP = 0, 1, 2
# What a row of a table of sites says: where memory begins, the bits [first, last) of the space, bits a word (of direct
# sites: 0 leaves words uncounted), which of the kinds above, values a row of the coding. Of `Linear`: addresses of
# scales and zeros, smallest and largest word. Of `Lookup`: addresses of words, of what they read as and of which are
# lost (0 for none), bytes a word.
_START, _FIRST, _LAST, _WIDTH, _KIND, _SLICE, _A, _B, _C, _D = range(10)
_FIELDS = 10


@kernel(inline="always")
def _change(word, mask, operation):  # type: ignore[no-untyped-def]
    if operation == FLIP:
        return word ^ mask
    return word | mask if operation == SET else word & ~mask


@kernel(inline="always")
def _read_linear(word, scale, zero, width, signed):  # type: ignore[no-untyped-def]
    """What a word stands for, as the bit pattern of a float32."""
    whole = word - (np.int64(1) << width) if signed and word >> (width - 1) else word
    return np.float32(scale * (np.float64(whole) - zero)).view(np.uint32)


@kernel(inline="always")
def _word_of(value, scale, zero, low, high, width):  # type: ignore[no-untyped-def]
    """The word that is written for a value, as an unsigned number."""
    whole = min(max(np.rint(np.float64(value) / scale + zero), np.float64(low)), np.float64(high))
    return np.int64(whole) & ((np.int64(1) << width) - 1)


@kernel(error_model="numpy")
def _words_are(values, words, slice_size, scales, zeros, low, high, width, signed):  # type: ignore[no-untyped-def]
    """Whether `_word_of` finds all these words in the values that they read as, and `_read_linear` reads them so."""
    bits = values.view(np.uint32)
    keep = (np.int64(1) << width) - 1
    for v in range(values.size):
        row = v // slice_size if scales.size > 1 else 0
        word = np.int64(words[v]) & keep
        if _word_of(values[v], scales[row], zeros[row], low, high, width) != word:
            return False
        if _read_linear(word, scales[row], zeros[row], width, signed) != bits[v]:
            return False
    return True


_COUNTS = 7
"""At the front of a log: saved bytes, saved values, words corrected, detected and miscorrected (see `WordOutcomes`),
bits changed in direct sites, values that differ. Behind them are addresses, and what was there."""
_STARTS, _UNCOUNTED = 256, 512
"""Beside the mask of a byte: another word begins here; its words are not counted."""


@kernel(inline="always")
def _parts(log, size):  # type: ignore[no-untyped-def]
    """(Counts, addresses, what was there) of a log of so many faults."""
    return log[:_COUNTS], log[_COUNTS : _COUNTS + size], log[_COUNTS + size : _COUNTS + 2 * size]


@kernel(error_model="numpy")
def _apply(sites, positions, operation, log):  # type: ignore[no-untyped-def]
    """Change every position that lies in one of these sites, whose bits ascend; returns how many bits changed.

    The first pass only finds addresses (`saved` holds the masks meanwhile), so that the second can fetch ahead of
    itself. What is direct is listed by bytes from the front of the lists, what is decoded by values from their end.
    """
    count, touched, saved = _parts(log, positions.size)
    count[:] = 0
    site = 0
    direct, coded = 0, positions.size
    last = np.int64(-1)  # the last word seen, by the bit of the space that it starts at
    for position in positions:
        while site < len(sites) and position >= sites[site, _LAST]:
            site += 1
        if site == len(sites):
            break
        if position < sites[site, _FIRST]:
            continue
        local = position - sites[site, _FIRST]
        width = sites[site, _WIDTH]
        if sites[site, _KIND] == _DIRECT:
            touched[direct] = sites[site, _START] + (local >> 3)
            word = position - local % width if width else np.int64(-1)
            note = (_STARTS if word != last else 0) | (_UNCOUNTED if width == 0 else 0)
            saved[direct] = note | np.int64(1) << (local & 7)
            last = word
            direct += 1
        else:
            value = local // width
            bit = local - value * width
            if position - bit != last:
                last = position - bit
                coded -= 1
                touched[coded] = sites[site, _START] + 4 * value
                saved[coded] = np.int64(site) << 32
            saved[coded] |= np.int64(1) << bit
    for i in range(min(_AHEAD, direct)):
        _fetch_line(np.uint64(touched[i]))
    changed, words, fresh = 0, 0, False
    for i in range(direct):
        if i + _AHEAD < direct:
            _fetch_line(np.uint64(touched[i + _AHEAD]))
        address, note = np.uint64(touched[i]), saved[i]
        before = _load_byte(address)
        after = _change(before, np.uint8(note & 255), operation)
        saved[i] = before
        fresh = (fresh or note & _STARTS != 0) and note & _UNCOUNTED == 0
        if after != before:
            changed += 1
            words += fresh
            fresh = False
            _store_byte(address, np.uint8(after))
    count[0] = direct
    count[5] = changed
    count[4] = words
    end = positions.size
    for i in range(max(end - _AHEAD, coded), end):
        _fetch_line(np.uint64(touched[i]))
    for i in range(end - 1, coded - 1, -1):
        if i - _AHEAD >= coded:
            _fetch_line(np.uint64(touched[i - _AHEAD]))
        address, mask, site = np.uint64(touched[i]), saved[i] & 0xFFFFFFFF, saved[i] >> 32
        value = (touched[i] - sites[site, _START]) >> 2
        width, slice_size = sites[site, _WIDTH], sites[site, _SLICE]
        row = value // slice_size if slice_size else 0
        golden = _load_32(address)
        lost = False
        if sites[site, _KIND] == _LINEAR:
            scale = _load_double(np.uint64(sites[site, _A] + 8 * row))
            zero = _load_double(np.uint64(sites[site, _B] + 8 * row))
            low, high = sites[site, _C], sites[site, _D]
            word = _word_of(_load_float(address), scale, zero, low, high, width)
            after = _change(word, mask, operation)
            read = _read_linear(after, scale, zero, width, low < 0)
        else:
            wide = sites[site, _D] == 2
            word = np.int64(
                _load_16(np.uint64(sites[site, _A] + 2 * value))
                if wide
                else _load_byte(np.uint64(sites[site, _A] + value))
            )
            after = _change(word, mask, operation)
            entry = (row << width) + after
            read = _load_32(np.uint64(sites[site, _B] + 4 * entry))
            lost = sites[site, _C] != 0 and _load_byte(np.uint64(sites[site, _C] + entry)) != 0
        saved[i] = golden
        if after == word:
            continue
        difference = after ^ word
        while difference:
            difference &= difference - 1
            changed += 1
        if read == golden:
            count[2] += 1
            continue
        count[3 if lost else 4] += 1
        count[6] += 1
        _store_32(address, read)
    count[1] = end - coded
    return changed


@kernel()
def _undo(log, size):  # type: ignore[no-untyped-def]
    """Write back what was there, newest first: a byte hit twice ends as it was before the first hit."""
    count, touched, saved = _parts(log, size)
    for i in range(size - count[1], size):
        _store_32(np.uint64(touched[i]), np.uint32(saved[i]))
    for i in range(count[0] - 1, -1, -1):
        _store_byte(np.uint64(touched[i]), np.uint8(saved[i]))
    count[:] = 0


@dataclass(frozen=True)
class Lookup:
    """Words as they were written, and what each word that there is reads as.

    Attributes:
        words: one a value, unsigned.
        table: float32, a row for each entry of the coding, one of 2^width words a column.
        lost: which of them are beyond repair; None for none.
    """

    words: NDArray[Any]
    table: NDArray[np.float32]
    lost: NDArray[np.bool_] | None


def finds_words(reading: Linear, values: Tensor, words: Tensor, width: int) -> bool:
    """Whether the words of these values can be found in what they read as: each is compared.

    Not where neighbouring words read as the same float32.
    """
    rows = reading.scale.size
    slice_size = max(values.numel() // rows, 1)
    array = words.contiguous().reshape(-1).numpy()
    limits = (reading.low, reading.high, width, reading.low < 0)
    flat = values.reshape(-1).numpy()
    return bool(_words_are(flat, array, slice_size, reading.scale, reading.zero, *limits))


@dataclass(frozen=True)
class Stretch:
    """A tensor whose words can be changed in one compiled pass.

    Attributes:
        tensor: contiguous, on the CPU.
        first: its first bit in the space.
        bits: how many bits it has.
        width: bits a word; 0 where words are not to be counted.
        reading: how its float32 values follow from words; None where memory holds the words themselves.
    """

    tensor: Tensor
    first: int
    bits: int
    width: int
    reading: Linear | Lookup | None = None

    def row(self) -> list[int]:
        """As a row of the table that the kernel reads."""
        head = [self.tensor.data_ptr(), self.first, self.first + self.bits, self.width]
        reading = self.reading
        if reading is None:
            return [*head, _DIRECT, 0, 0, 0, 0, 0]
        rows = reading.scale.size if isinstance(reading, Linear) else len(reading.table)
        slice_size = max(self.tensor.numel() // rows, 1) if rows > 1 else 0
        if isinstance(reading, Linear):
            places = [reading.scale.ctypes.data, reading.zero.ctypes.data, reading.low, reading.high]
            return [*head, _LINEAR, slice_size, *places]
        lost = 0 if reading.lost is None else reading.lost.ctypes.data
        places = [reading.words.ctypes.data, reading.table.ctypes.data, lost, reading.words.itemsize]
        return [*head, _LOOKUP, slice_size, *places]


class CompiledMemory:
    """The tensors whose words are changed in one compiled pass, as one list of addresses.

    Args:
        stretches: ascending by their first bits.
    """

    def __init__(self, stretches: list[Stretch]) -> None:
        if sys.byteorder != "little":
            raise NotImplementedError("flipproof injects into memory byte by byte and needs a little-endian machine")
        self._stretches = stretches  # kept alive: the undo may run after the model has let go of them
        self._sites = np.array([stretch.row() for stretch in stretches], np.int64).reshape(-1, _FIELDS)

    def apply(self, positions: Positions, operation: int, log: UndoLog) -> int:
        """Flip, clear or set bits and return how many changed; `log` can undo it at any moment.

        Python handles signals between bytecodes: the kernel runs through, and it keeps the log's count itself, so a
        Ctrl-C right after it finds the log complete.
        """
        log.make_room(positions.size)
        return _apply(self._sites, positions, operation, log.entries)  # type: ignore[no-any-return]


class UndoLog:
    """What was there before the faults. One that is empty again may serve the next trial: its memory is in place."""

    def __init__(self) -> None:
        self.entries: NDArray[np.int64] = np.zeros(_COUNTS + 2 * 64, np.int64)
        self._size = 0

    def make_room(self, size: int) -> None:
        """Be ready for so many faults."""
        if _COUNTS + 2 * size > self.entries.size:
            self.entries = np.zeros(_COUNTS + 2 * size, np.int64)
        self._size = size

    @property
    def outcomes(self) -> list[int]:
        """Words corrected, detected and miscorrected; bits changed in memory itself; decoded values that differ."""
        found: list[int] = self.entries[2:_COUNTS].tolist()
        return found

    def undo(self) -> None:
        """Restore every byte and value. Safe to call twice."""
        _undo(self.entries, self._size)


Undo = list[tuple[Tensor, Tensor, Tensor]]
"""(tensor, flat indices, values that were there), in the order of the changes."""


def as_words(masks: NDArray[np.uint64], width: int) -> Tensor:
    """Masks as words of this width."""
    dtype = word_dtype(width)
    words = masks.astype(f"u{dtype.itemsize}")
    return torch.from_numpy(words if dtype == torch.uint8 else words.view(f"i{dtype.itemsize}"))


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """The values at flat, row-major positions, whatever the memory layout."""
    if tensor.is_contiguous():
        return tensor.view(-1)[index]
    return tensor[torch.unravel_index(index, tensor.shape)]


def scatter(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Write values to flat, row-major positions, in place."""
    if tensor.is_contiguous():
        tensor.view(-1)[index] = values
    else:
        tensor[torch.unravel_index(index, tensor.shape)] = values
