"""Hitting values through their format: encode what is touched, change its words, decode them into the model."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flipproof.formats.base import Coding, blocks, sparse, word_dtype
from flipproof.spaces.contract import Positions
from flipproof.spaces.memory import FLIP, SET
from flipproof.spaces.sites import Site

Undo = list[tuple[Tensor, Tensor, Tensor]]
"""(tensor, flat indices, values that were there), in the order of the changes."""


def corrupt_words(
    site: Site,
    tensor: Tensor,
    bits: Positions,
    operation: int,
    undo: Undo,
    *,
    source: Tensor | None,
    coding: Coding,
    packed: bool,
) -> int:
    """Change bits of one site and return how many changed; `undo` learns what was there.

    Args:
        site: what is hit.
        tensor: its live values.
        bits: within the site, ascending.
        operation: FLIP, SET or CLEAR.
        undo: gets an entry before anything is written.
        source: values as they were before they were stored in the format, where the tensor holds decoded ones.
        coding: the format's constants for the whole tensor.
        packed: memory holds packed words: its bytes are the words, and stand for themselves.
    """
    width = 8 if packed else site.width
    values, places = np.divmod(bits, width) if packed else site.locate(bits)
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    masks = np.bitwise_or.reduceat(np.uint64(1) << places.astype(np.uint64), starts)
    index = torch.from_numpy(values[starts]).to(tensor.device)
    mask = _as_words(masks, width).to(tensor.device)
    if not packed and site.format.together > 1:
        every = blocks(index, site.format.together, site.values)
        mask = torch.zeros_like(every, dtype=mask.dtype).index_put_((torch.searchsorted(every, index),), mask)
        index = every
    golden = gather(tensor, index)
    if packed:
        before = golden
    else:
        here = sparse(coding, tensor.shape, index)
        before = site.format.encode_values(golden if source is None else gather(source, index), here)
    after = before ^ mask if operation == FLIP else before | mask if operation == SET else before & ~mask
    undo.append((tensor, index, golden))
    scatter(tensor, index, after if packed else site.format.decode_words(after, here, site.dtype))
    if operation == FLIP:
        return int(bits.size)
    differing = (before ^ after).cpu().numpy().view(f"u{word_dtype(width).itemsize}")
    return int(sum(int(word).bit_count() for word in differing))


def _as_words(masks: NDArray[np.uint64], width: int) -> Tensor:
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
