"""Tensors as memory: copies that lie there as the originals do, and the same bits or not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, empty, equal, int64, nn, uint8

_LINE = 64
"""Bytes to which fast kernels look whether memory is aligned."""


def laid_alike(one: Tensor, other: Tensor) -> bool:
    """Whether both have the same strides and are as well aligned."""
    return one.stride() == other.stride() and (one.data_ptr() - other.data_ptr()) % _LINE == 0


def copy_alike(tensor: Tensor) -> Tensor:
    """A copy with the same strides, as well aligned: sums over other memory may be taken in another order.

    Where several elements share memory (`expand`), the copy holds each of them.
    """
    found = tensor.clone()
    expanded = any(step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    if expanded or not tensor.numel() or laid_alike(found, tensor):
        return found
    reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    room = _LINE // tensor.element_size()
    memory = empty(reach + room, dtype=tensor.dtype, device=tensor.device)
    offset = (tensor.data_ptr() - memory.data_ptr()) // tensor.element_size() % room
    return memory.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of tensors that came out of a plain file.

    Modules that note a version of theirs beside the tensors, as MNASNet does, find there the one that `model` has.
    """
    noted: OrderedDict[str, Tensor] = OrderedDict(state)
    noted._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]  # where PyTorch keeps versions
    model.load_state_dict(noted)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether both hold the same bits: −0.0 is not 0.0, and a NaN is itself.

    Args:
        one: of any type with plain memory.
        other: of the same type and shape, on the same device.
    """
    flat = [tensor.detach().contiguous().reshape(-1).view(uint8) for tensor in (one, other)]
    if any(part.storage_offset() % 8 for part in flat):
        return equal(flat[0], flat[1])
    whole = flat[0].numel() & ~7  # eight bytes at a time are six times as fast
    here, there = (part[:whole].view(int64) for part in flat)
    return equal(here, there) and equal(flat[0][whole:], flat[1][whole:])
