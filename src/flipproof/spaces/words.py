"""Words changed and put back: where the values live, in one compiled pass over bytes, or by their flat positions.

For a format that equals the tensor's own type (float32 weights stored as binary32), bit b of a site *is* bit b of the
tensor's memory on a little-endian machine, so a fault is one byte changed in place and the undo is that byte written
back. This is what keeps injection at a few microseconds a trial; all else is encoded, changed and decoded (`cell`).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from flipproof._kernels import kernel
from flipproof.formats.base import word_dtype
from flipproof.spaces.contract import Positions

FLIP, CLEAR, SET = 0, 1, 2

_AHEAD = 64
"""Bytes fetched ahead of the one being changed: a fault is a cache miss, and they can be waited for together."""


def _load(typing_context, address):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load(builder.inttoptr(args[0], ir.IntType(8).as_pointer()))

    return types.uint8(types.uint64), codegen


def _store(typing_context, address, value):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store(args[1], builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint8), codegen


def _fetch(typing_context, address):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer, number = builder.inttoptr(args[0], ir.IntType(8).as_pointer()), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(prefetch, [pointer, number(1), number(3), number(1)])  # to write, keep in cache, data
        return context.get_dummy_value()

    return types.void(types.uint64), codegen


_load_byte: Any = intrinsic(_load)
_store_byte: Any = intrinsic(_store)
_fetch_byte: Any = intrinsic(_fetch)


@kernel()
def _apply(addresses, firsts, lasts, widths, positions, operation, touched, saved, count):  # type: ignore[no-untyped-def]
    """Change every position that lies in a direct site; count[0] becomes the saved bytes, returns bits changed.

    Site i covers bits [firsts[i], lasts[i]) of the space and starts at byte addresses[i]; both lists ascend. The first
    pass only finds addresses (`saved` holds the masks meanwhile), so that the second can fetch ahead of itself.
    count[1] becomes the words that changed, of sites whose words are widths[i] bits wide; 0 leaves a site uncounted.
    """
    site = 0
    found = 0
    starts = np.empty(positions.size, np.bool_)  # whether another word begins here
    uncounted = np.empty(positions.size, np.bool_)
    counted = np.int64(-1)  # the last word seen, by the bit that it starts at
    for position in positions:
        while site < firsts.size and position >= lasts[site]:
            site += 1
        if site == firsts.size:
            break
        if position < firsts[site]:
            continue
        local = position - firsts[site]
        touched[found] = addresses[site] + np.uint64(local >> 3)
        saved[found] = np.uint8(1 << (local & 7))
        width = widths[site]
        word = position - local % width if width else np.int64(-1)
        starts[found] = word != counted
        counted = word
        uncounted[found] = width == 0
        found += 1
    for i in range(min(_AHEAD, found)):
        _fetch_byte(touched[i])
    changed, words, fresh = 0, 0, False
    for i in range(found):
        if i + _AHEAD < found:
            _fetch_byte(touched[i + _AHEAD])
        address = touched[i]
        mask = saved[i]
        before = _load_byte(address)
        if operation == FLIP:
            after = before ^ mask
        elif operation == SET:
            after = before | mask
        else:
            after = before & ~mask
        saved[i] = before
        fresh = (fresh or starts[i]) and not uncounted[i]
        if after != before:
            changed += 1
            words += fresh
            fresh = False
            _store_byte(address, np.uint8(after))
    count[0] = found
    count[1] = words
    return changed


@kernel()
def _undo(touched, saved, count):  # type: ignore[no-untyped-def]
    """Write the saved bytes back, newest first: a byte hit twice ends as it was before the first hit."""
    for i in range(count[0] - 1, -1, -1):
        _store_byte(touched[i], saved[i])
    count[0] = 0


class DirectMemory:
    """The tensors whose memory is the fault space itself, as one list of addresses.

    Args:
        tensors: contiguous CPU tensors whose dtype their format calls native.
        firsts: first bit of each in the space, ascending.
        bits: number of bits of each.
        widths: bits a word of each; 0 where words are not to be counted.
    """

    def __init__(self, tensors: list[Tensor], firsts: list[int], bits: list[int], widths: list[int]) -> None:
        if sys.byteorder != "little":
            raise NotImplementedError("flipproof injects into memory byte by byte and needs a little-endian machine")
        self._tensors = tensors  # kept alive: the undo may run after the model has let go of them
        self._addresses = np.array([t.data_ptr() for t in tensors], np.uint64)
        self._firsts = np.array(firsts, np.int64)
        self._lasts = self._firsts + np.array(bits, np.int64)
        self._widths = np.array(widths, np.int64)

    def apply(self, positions: Positions, operation: int, log: UndoLog) -> int:
        """Flip, clear or set bits and return how many changed; `log` can undo it at any moment.

        Python handles signals between bytecodes: the kernel runs through, and it keeps the log's count itself, so a
        Ctrl-C right after it finds the log complete.
        """
        log.touched = np.empty(positions.size, np.uint64)
        log.saved = np.empty(positions.size, np.uint8)
        sites = (self._addresses, self._firsts, self._lasts, self._widths)
        return int(_apply(*sites, positions, operation, log.touched, log.saved, log.count))


class UndoLog:
    """Bytes as they were before the faults."""

    def __init__(self) -> None:
        self.count: NDArray[np.int64] = np.zeros(2, np.int64)
        self.touched: NDArray[np.uint64] = np.empty(0, np.uint64)
        self.saved: NDArray[np.uint8] = np.empty(0, np.uint8)

    @property
    def words(self) -> int:
        """Words that changed."""
        return int(self.count[1])

    def undo(self) -> None:
        """Restore every byte. Safe to call twice."""
        _undo(self.touched, self.saved, self.count)


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
