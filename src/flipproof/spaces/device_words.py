"""Faults in the memory of an accelerator: one gather, one change and one scatter a draw, whatever is hit.

On the CPU a compiled kernel walks over addresses (`words`). An accelerator is given one tensor of bytes that spans all
tensors of the space, from the lowest address to the highest; what lies between them is never touched. Which bytes a
draw touches is reckoned on the host, so nothing waits for the device: a flip changes every bit that it hits, and only
stuck cells have to be read first.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flipproof.spaces.contract import Positions
from flipproof.spaces.words import FLIP, SET, Undo, scatter

DEVICES = frozenset({"cuda"})
"""Kinds of devices whose tensors have an address that bytes can be read and written at."""


@dataclass(frozen=True)
class _Pointer:
    """Bytes of a CUDA device, as `torch.as_tensor` reads them (the CUDA array interface, version 2)."""

    __cuda_array_interface__: dict[str, Any]


def bytes_between(low: int, high: int, device: torch.device) -> Tensor:
    """A tensor of the bytes at these addresses; it owns nothing, and only bytes of living tensors may be used."""
    if device.type == "cpu":
        return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low)))
    facts = {"shape": (high - low,), "typestr": "|u1", "data": (low, False), "strides": None, "version": 2}
    return torch.as_tensor(_Pointer(facts), device=device)


class DeviceMemory:
    """The tensors whose memory is the fault space itself, on one device.

    Args:
        tensors: contiguous tensors whose dtype their format calls native.
        firsts: first bit of each in the space, ascending.
        bits: number of bits of each.
        widths: bits a word of each.
    """

    def __init__(self, tensors: list[Tensor], firsts: list[int], bits: list[int], widths: list[int]) -> None:
        if sys.byteorder != "little":
            raise NotImplementedError("flipproof injects into memory byte by byte and needs a little-endian machine")
        self._tensors = tensors  # kept alive: the undo may run after the model has let go of them
        addresses = [tensor.data_ptr() for tensor in tensors]
        low = min(addresses)
        high = max(start + tensor.nbytes for start, tensor in zip(addresses, tensors, strict=True))
        self._memory = bytes_between(low, high, tensors[0].device)
        self._starts = np.array([start - low for start in addresses], np.int64)
        self._firsts = np.array(firsts, np.int64)
        self._lasts = self._firsts + np.array(bits, np.int64)
        self._widths = np.array(widths, np.int64)

    def apply(self, positions: Positions, operation: int, undo: Undo) -> tuple[int, int]:
        """Flip, clear or set bits.

        Args:
            positions: of the space, ascending; those outside these tensors are left alone.
            operation: FLIP, SET or CLEAR.
            undo: learns what was there before anything is written.

        Returns:
            How many bits and how many words changed.
        """
        site = np.searchsorted(self._firsts, positions, "right") - 1
        inside = (site >= 0) & (positions < self._lasts[site])
        site, local = site[inside], positions[inside] - self._firsts[site[inside]]
        if not local.size:
            return 0, 0
        places = self._starts[site] + (local >> 3)
        starts = np.flatnonzero(np.diff(places, prepend=-1))
        bits: NDArray[np.uint8] = np.left_shift(np.uint8(1), (local & 7).astype(np.uint8))
        index, mask = self._there(places[starts]), self._there(np.bitwise_or.reduceat(bits, starts))
        before = self._memory[index]
        after = before ^ mask if operation == FLIP else before | mask if operation == SET else before & ~mask
        if operation == FLIP:
            changed = len(local)
            words = int(np.count_nonzero(np.diff(positions[inside] - local % self._widths[site], prepend=-1)))
        else:
            differing = np.unpackbits((before ^ after).cpu().numpy()[:, None], axis=1, bitorder="little")
            which, bit = np.nonzero(differing)
            changed = len(which)
            hit = positions[inside][starts][which] - local[starts][which] % 8 + bit
            of = site[starts][which]
            words = len(np.unique(hit - (hit - self._firsts[of]) % self._widths[of]))
        undo.append((self._memory, index, before))
        scatter(self._memory, index, after)
        return changed, words

    def faithful(self) -> bool:
        """Whether changes of the first and the last bit of each tensor show in the tensor itself, and are undone."""
        for i, tensor in enumerate(self._tensors):
            flat = tensor.detach().view(-1).view(torch.uint8)
            golden = flat[[0, -1]].clone()
            ends = np.array([self._firsts[i], self._lasts[i] - 1])
            undo: Undo = []
            self.apply(ends, FLIP, undo)
            changed = flat[[0, -1]] ^ golden
            scatter(*undo.pop())
            expected = torch.tensor([1, 128] if flat.numel() > 1 else [129, 129], dtype=torch.uint8)
            if not torch.equal(changed.cpu(), expected) or not torch.equal(flat[[0, -1]], golden):
                return False
        return True

    def _there(self, values: NDArray[Any]) -> Tensor:
        """On the device; a copy from pinned memory waits for nothing."""
        found = torch.from_numpy(np.ascontiguousarray(values))
        device = self._memory.device
        return found if device.type == "cpu" else found.pin_memory().to(device, non_blocking=True)
