"""Repairing a live model's parameters before an inference: weight bit clipping as it is deployed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from flipproof._kernels import kernel
from flipproof.errors import FormatError
from flipproof.formats import BitClipped, Format
from flipproof.formats.base import bit_pattern, word_dtype
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Parameters

_BLOCK = 4096
"""Words that are read before any is written. Almost every block is intact, and reading costs half of writing too."""


@torch.no_grad()
def scrub_(model: nn.Module, format: Format, *, where: Parameters | None = None) -> int:
    """Pass a live model's parameters through a format in place, so that what it can repair is repaired.

    With ``BitClipped(Float32(), zeros=(30,))`` this is weight bit clipping as the paper deploys it: the bit is set to
    its value in every weight before an inference. Where memory holds what was stored, no bit changes. Tied parameters
    are repaired once.

    Args:
        model: its parameters are changed in place; any device.
        format: a format without per-tensor constants (floats, fixed point, and wrappers of those).
        where: which parameters, all by default.

    Returns:
        How many values were repaired.

    Raises:
        FormatError: if the format has per-tensor constants: those of a corrupted tensor would be wrong. Nothing is
            changed then.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Linear(4, 3)
        >>> before = net.weight.detach().clone()
        >>> space = fp.FaultSpace(net)
        >>> with space.corrupted(space.faults([("weight", 0, 30), ("weight", 5, 30)])):
        ...     fp.scrub_(net, fp.BitClipped(fp.Float32(), zeros=(30,))), torch.equal(net.weight, before)
        (2, True)
    """
    tensors = [t.data for t in FaultSpace(model, where=where, format={"*": format}).tensors.values()]
    if isinstance(format, BitClipped) and all(format.inner.is_native(t.dtype) for t in tensors):
        return sum(_clip_(tensor, format) for tensor in tensors)
    inner = format
    while isinstance(inner, BitClipped):
        inner = inner.inner
    if inner.fit(torch.ones(2)):
        raise FormatError(
            f"scrub_ takes formats that store each value by itself; {format!r} has constants of a whole tensor, and "
            f"those of a corrupted tensor are wrong. Keep such a model in its words instead"
        )
    repaired = [format.decode_words(inner.encode_values(t, ()), (), t.dtype) for t in tensors]
    changed = 0
    for tensor, new in zip(tensors, repaired, strict=True):
        changed += int((bit_pattern(tensor) != bit_pattern(new)).sum())
        tensor.copy_(new)
    return changed


def _clip_(tensor: Tensor, format: BitClipped) -> int:
    keep, force = format.masks
    if not tensor.is_contiguous():
        words = bit_pattern(tensor)
        read = (words & keep) | force
        tensor.copy_(read.view(tensor.dtype))
        return int((read != words).sum())
    words = tensor.view(word_dtype(format.width)).reshape(-1)
    if words.device.type == "cpu":
        array = words.numpy()
        return int(_clip_words(array, array.dtype.type(keep), array.dtype.type(force), _BLOCK))
    changed = int((((words & keep) | force) != words).sum())
    words.bitwise_and_(keep).bitwise_or_(force)
    return changed


@kernel()
def _clip_words(words: np.ndarray, keep: int, force: int, block: int) -> int:
    changed = 0
    for first in range(0, words.size, block):
        part = words[first : first + block]
        found = 0
        for i in range(part.size):
            found += ((part[i] & keep) | force) != part[i]
        if found:
            changed += found
            for i in range(part.size):
                part[i] = (part[i] & keep) | force
    return changed
