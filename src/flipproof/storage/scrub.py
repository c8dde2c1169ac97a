"""Repairing memory in place: packed words by their redundancy, live values by a format, as bit clipping is deployed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from flipproof._interrupts import held
from flipproof._kernels import kernel
from flipproof.errors import FormatError
from flipproof.formats import BitClipped, Format
from flipproof.formats.base import bit_pattern, word_dtype
from flipproof.formats.packing import Packed, pack
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Parameters, check_where
from flipproof.spaces.tensors import Candidate, inventory

_BLOCK = 4096
"""Words that are read before any is written. Almost every block is intact, and reading costs half of writing too."""


@torch.no_grad()
def scrub_(model: nn.Module, format: Format | None = None, *, where: Parameters | None = None) -> int:
    """Repair a model's memory in place, so that faults do not add up from one inference to the next.

    **Without `format`: packed memory** (`pack_`). Every word that its own format can repair is written back as it was
    written, check bits included; a word beyond repair stays as it is. No value that is read changes. A code (SECDED,
    BCH) gives back whole code words, `TripleMSB` bits and copies as their majority says, `RangeChecked` the copies of
    its bounds. `Parity` detects and repairs nothing. `BitClipped` writes its bits as they are read: it does not know
    what was there, and where a clipped bit is not constant over the weights the first pass writes such words too.

    Within ``space.corrupted(faults)`` scrubbing works as in a campaign, but what is put back at its end are the bytes
    that were hit. A word with so many faults that it is taken for another one is written back as that one, in other
    bytes too: keep a `state_dict` where that can happen.

    **With `format`: live parameters.** They pass through the format: with ``BitClipped(Float32(), zeros=(30,))`` this
    is weight bit clipping as the paper deploys it: the bit is set to its value in every weight before an inference.
    Where memory holds what was stored, no bit changes. Tied parameters are repaired once.

    Args:
        model: its parameters are changed in place; any device.
        format: None for packed words; else a format without per-tensor constants (floats, fixed point, and wrappers of
            those).
        where: which parameters, all by default.

    Returns:
        How many words (with `format`: values) were repaired.

    Raises:
        FormatError: without `format`, if no parameter is packed; with it, if the format has per-tensor constants:
            those of a corrupted tensor would be wrong. Nothing is changed then.

    Example:
        >>> import flipproof as fp, torch
        >>> net = fp.pack_(torch.nn.Linear(4, 3), fp.SECDED(fp.Float32()))
        >>> space = fp.FaultSpace(net)
        >>> with space.corrupted(space.faults([("weight", 0, 30), ("weight", 5, 38), ("bias", 1, 2)])):
        ...     fp.scrub_(net), fp.scrub_(net)
        (3, 0)
        >>> net = torch.nn.Linear(4, 3)
        >>> before = net.weight.detach().clone()
        >>> space = fp.FaultSpace(net)
        >>> with space.corrupted(space.faults([("weight", 0, 30), ("weight", 5, 30)])):
        ...     fp.scrub_(net, fp.BitClipped(fp.Float32(), zeros=(30,))), torch.equal(net.weight, before)
        (2, True)
    """
    if format is None:
        written = 0
        for candidate in _packed(model, where):
            before, healed, _ = _healed(candidate)
            count = int((healed != before).sum())
            if count:
                fresh = pack(healed, _decoder(candidate).format.layout(healed.numel()))
                with held():  # a word is never half of the old one and half of the new one
                    candidate.tensor.copy_(fresh)
            written += count
        return written
    space = FaultSpace(model, where=where, format={"*": format})
    if space.copies:
        raise FormatError(
            f"scrub_ writes where parameters lie, and {space.copies[0]} lies in an object of torch.ao, which takes no "
            f"writes; scrub the checkpoint before it is loaded"
        )
    tensors = [space.tensors[site.name].data for site in space.sites if site.format == format]
    if not tensors:
        raise FormatError(f"scrub_: no parameter of this {type(model).__name__} is stored by {format!r}")
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


@torch.no_grad()
def damaged_words(model: nn.Module, *, where: Parameters | None = None) -> pd.DataFrame:
    """How the words of packed memory are, as far as their redundancy says; nothing is changed.

    Args:
        model: one that `pack_` packed.
        where: which parameters, all by default.

    Returns:
        One row a parameter: `name`, `format`, how many `words` it has, how many of them are `repairable` (what
        `scrub_` would write back) and how many are `beyond_repair` (they read as 0.0; of a block, all its words). A
        word that was taken for another one, as code words with too many faults can be, is in neither.

    Raises:
        FormatError: if no parameter is packed.

    Example:
        >>> import flipproof as fp, torch
        >>> net = fp.pack_(torch.nn.Linear(4, 3), fp.SECDED(fp.Float32()))
        >>> space = fp.FaultSpace(net)
        >>> with space.corrupted(space.faults([("weight", 0, 30), ("weight", 5, 1), ("weight", 5, 7)])):
        ...     print(fp.damaged_words(net).drop(columns="format").to_string(index=False))
          name  words  repairable  beyond_repair
        weight     12           1              1
          bias      3           0              0
    """
    rows = []
    for candidate in _packed(model, where):
        before, healed, lost = _healed(candidate)
        rows.append(
            {
                "name": candidate.name,
                "format": repr(_decoder(candidate).format),
                "words": before.numel(),
                "repairable": int((healed != before).sum()),
                "beyond_repair": int(lost.sum()),
            }
        )
    return pd.DataFrame(rows)


def _packed(model: nn.Module, where: Parameters | None) -> list[Candidate]:
    where = check_where(where)
    found = [c for c in inventory(model) if c.packed is not None and not where.leaves_out(c)]
    if not found:
        raise FormatError(
            f"no parameter of this {type(model).__name__} is packed (pack_), so that no word says how it was written; "
            f"live values are scrubbed by a format, e.g. fp.scrub_(model, fp.BitClipped(fp.Float32(), zeros=(30,)))"
        )
    return found


def _decoder(candidate: Candidate) -> Packed:
    assert candidate.packed is not None
    return candidate.packed


def _healed(candidate: Candidate) -> tuple[Tensor, Tensor, Tensor]:
    return _decoder(candidate).healed(candidate.tensor, *candidate.constants)


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
