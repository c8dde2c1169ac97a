"""One stored tensor of a space: its words, how they are changed, and how they are put back."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats.base import Coding, Format, Linear, bit_pattern, blocks, dense, sparse, word_dtype
from flipproof.formats.packing import Packed, words_at
from flipproof.spaces import device_words
from flipproof.spaces.contract import Positions
from flipproof.spaces.sites import Site
from flipproof.spaces.words import FLIP, SET, Lookup, Stretch, Undo, as_words, finds_words, gather, scatter

_WIDEST = 16
_MOST_ENTRIES = 2**18
"""Of a table of what words read as: beyond a megabyte, looking up is no quicker than computing."""


class WordCount:
    """Counts `WordOutcomes` while faults are put in place.

    Attributes:
        corrected: see `WordOutcomes`.
        detected: see `WordOutcomes`.
        miscorrected: see `WordOutcomes`.
        differs: whether any value is read otherwise than without faults.
    """

    def __init__(self) -> None:
        self.corrected = self.detected = self.miscorrected = 0
        self.differs = False

    def add(self, hit: Tensor, differs: Tensor, lost: Tensor | None, group: Tensor | None = None) -> None:
        """Words that are hit or not, read as another value or not, known to be lost or not.

        `group` says which words are decoded together, as ascending numbers; each group counts once.
        """
        self.differs |= bool(differs.any())
        found = torch.zeros_like(hit) if lost is None else lost
        if group is not None:
            _, group = torch.unique_consecutive(group, return_inverse=True)
            count = int(group.max()) + 1 if group.numel() else 0
            hit, differs, found = (
                torch.zeros(count, dtype=torch.bool, device=part.device).index_put_((group[part],), part[part])
                for part in (hit, differs, found)
            )
        self.corrected += int((hit & ~differs).sum())
        self.detected += int((hit & differs & found).sum())
        self.miscorrected += int((hit & differs & ~found).sum())


class Cell:
    """One stored tensor.

    Attributes:
        site: its name, format and place in the space.
        tensor: the live tensor of the model.
        packed: what decodes it, if memory holds packed words: its bytes are the words, and stand for themselves.
        constants: what packed words are decoded with, as buffers.
        held: whether memory holds exactly these words; others are stored by decoding, see `store`.
        original: the values as they were before the format decoded them; None while they are in place.
        coding: the format's constants for the whole tensor, while stored.
    """

    def __init__(
        self, site: Site, tensor: Tensor, *, packed: Packed | None = None, constants: tuple[Tensor, ...] = ()
    ) -> None:
        self.site, self.tensor, self.packed, self.constants = site, tensor, packed, constants
        self.held = packed is not None or site.format.is_native(tensor.dtype)
        self.original: Tensor | None = None
        self.coding: Coding = ()
        self._reading: Linear | Lookup | None = None

    @property
    def stretch(self) -> Stretch | None:
        """What a compiled pass needs to know to change words; None where they go through the format."""
        site, tensor = self.site, self.tensor.data
        if self.direct:
            return Stretch(tensor, site.offset, site.bits, 0 if self.packed is not None else site.width)
        here = tensor.device.type == "cpu" and tensor.dtype == site.dtype and tensor.is_contiguous()
        if self._reading is None or not here:
            return None
        return Stretch(tensor, site.offset, site.bits, site.width, self._reading)

    @property
    def direct(self) -> bool:
        """Whether bit b of the site is bit b of the tensor's own bytes, in the memory of this process."""
        tensor = self.tensor
        return tensor.device.type == "cpu" and tensor.is_contiguous() and (self.packed is not None or self._is_native)

    @property
    def addressed(self) -> bool:
        """Whether it is so in the memory of an accelerator."""
        tensor = self.tensor
        there = tensor.device.type in device_words.DEVICES and tensor.is_contiguous() and tensor.numel() > 0
        return there and self.packed is None and self._is_native

    @property
    def _is_native(self) -> bool:
        site, tensor = self.site, self.tensor
        return site.format.is_native(tensor.dtype) and tensor.dtype == site.dtype

    def store(self) -> None:
        """Let the model compute with what the format can represent.

        Raises:
            FormatError: naming the tensor whose values the format cannot hold.
        """
        original = self.tensor.data.clone(memory_format=torch.contiguous_format)
        words, decoded = self._decoded(original)
        self.original = original
        self._reading = _reading_of(self.site.format, self.coding, words, decoded)
        self.tensor.data.copy_(decoded)

    def take_back(self) -> None:
        """The values as they were before `store`, bit by bit. Safe to call twice."""
        if self.original is not None:
            self.tensor.data.copy_(self.original)

    def forget(self) -> None:
        """Let go of the original, which is in its place again."""
        self.original, self.coding, self._reading = None, (), None

    def _decoded(self, original: Tensor) -> tuple[Tensor, Tensor]:
        """(words, what they read as)."""
        site = self.site
        try:
            self.coding = site.format.fit(original)
            words = site.format.encode_values(original, dense(self.coding, original.shape))
        except FormatError as error:
            raise FormatError(f"{site.name}: {error}") from None
        decoded = site.format.decode_words(words, dense(self.coding, original.shape), site.dtype)
        lost = torch.isfinite(original) & ~torch.isfinite(decoded)
        if bool(lost.any()):
            raise FormatError(
                f"{site.name}: {int(lost.sum())} finite values become NaN or infinite in {site.format!r} "
                f"(largest magnitude {float(original[lost].abs().max()):g}); choose a format with more range"
            )
        return words, decoded

    def corrupt(self, bits: Positions, operation: int, undo: Undo, read: WordCount | None = None) -> int:
        """Change bits and return how many changed; `undo` gets an entry before anything is written.

        What is touched is encoded, its words are changed, and they are decoded into the model.

        Args:
            bits: of the site, counted from its first, ascending.
            operation: FLIP, SET or CLEAR.
            undo: learns what was there.
            read: counts how the words are read; None where nobody asks.
        """
        read = WordCount() if read is None else read
        if self.packed is not None:
            return self._corrupt_bytes(bits, operation, undo)
        site, tensor = self.site, self.tensor.data
        index, mask = self._words(bits)
        everything, change = self._constants(index, mask, operation, read)
        changed = change[1]
        if everything is None:
            index, mask = index[index < site.values], mask[index < site.values]
            coding, within = self.coding, index
        else:  # a constant of the tensor changed, so that all values are read anew
            within = torch.arange(site.values, device=tensor.device)
            inside = index < site.values
            mask = torch.zeros(site.values, dtype=mask.dtype, device=mask.device).index_put_(
                (index[inside],), mask[inside]
            )
            coding = everything
        if not within.numel():
            return changed
        if site.format.together > 1:
            every = blocks(within, site.format.together, site.values)
            mask = torch.zeros_like(every, dtype=mask.dtype).index_put_((torch.searchsorted(every, within),), mask)
            within = every
        golden = gather(tensor, within)
        before = site.format.encode_values(
            golden if self.original is None else gather(self.original, within),
            sparse(self.coding, tensor.shape, within),
        )
        after = _changed(before, mask, operation)
        undo.append((tensor, within, golden))
        values, lost = site.format.read(after, sparse(coding, tensor.shape, within), site.dtype)
        scatter(tensor, within, values)
        read.add(before != after, bit_pattern(values) != bit_pattern(golden), lost, self._groups(within))
        return changed + _count(before, after)

    def foresee(self, bits: Positions, operation: int, read: WordCount) -> None:
        """Count how packed words will be read that are about to be hit; nothing is written."""
        assert self.packed is not None
        site = self.site
        rest: Coding = tuple(self.packed.constant(c) for c in self.constants)
        index, mask = self._words(bits)
        shape = torch.Size(site.shape)
        if site.format.stored_constants:
            own = torch.arange(site.values, site.words, device=index.device)
            self.coding = site.format.read_constants(self._stored(own), rest)
        else:
            self.coding = rest
        everything, _ = self._constants(index, mask, operation, read)
        index, mask = index[index < site.values], mask[index < site.values]
        if not index.numel():
            return
        every = blocks(index, site.format.together, site.values)
        if site.format.together > 1:
            mask = torch.zeros_like(every, dtype=mask.dtype).index_put_((torch.searchsorted(every, index),), mask)
        before = self._stored(every)
        after = _changed(before, mask, operation)
        golden, _ = site.format.read(before, sparse(self.coding, shape, every), site.dtype)
        coding = self.coding if everything is None else everything
        values, lost = site.format.read(after, sparse(coding, shape, every), site.dtype)
        read.add(before != after, bit_pattern(values) != bit_pattern(golden), lost, self._groups(every))

    def _words(self, bits: Positions) -> tuple[Tensor, Tensor]:
        """The words that bits lie in, ascending, and which of their bits, as masks."""
        values, places = self.site.locate(bits)
        starts = np.flatnonzero(np.diff(values, prepend=-1))
        masks = np.bitwise_or.reduceat(np.uint64(1) << places.astype(np.uint64), starts)
        device = self.tensor.device
        return torch.from_numpy(values[starts]).to(device), as_words(masks, self.site.width).to(device)

    def _constants(
        self, index: Tensor, mask: Tensor, operation: int, read: WordCount
    ) -> tuple[Coding | None, tuple[Tensor, int]]:
        """What stored constants become: (coding, None for as before; (their words, how many bits changed))."""
        site = self.site
        inside = index >= site.values
        if not bool(inside.any()):
            return None, (index[:0], 0)
        before = site.format.write_constants(self.coding)
        full = torch.zeros_like(before).index_put_((index[inside] - site.values,), mask[inside])
        after = _changed(before, full, operation)
        kept = self.coding[site.format.stored_constants :]
        coding = site.format.read_constants(after, kept)
        own = site.format.stored_constants
        pairs = zip(coding[:own], self.coding[:own], strict=True)
        differs = torch.stack([(bit_pattern(a) != bit_pattern(b)).reshape(-1) for a, b in pairs])
        copies = before.numel() // differs.numel()  # a word that is outvoted is read as before, whatever others are
        read.add(before != after, differs[:, None].expand(own, copies, -1).reshape(-1), None)
        return (coding if bool(differs.any()) else None), (after, _count(before, after))

    def _stored(self, index: Tensor) -> Tensor:
        """Words of packed memory at these places."""
        site = self.site
        where = index.cpu().numpy()
        first, width = site.layout.first(where), site.layout.width(where)
        return words_at(self.tensor, first, width).to(index.device)

    def _groups(self, index: Tensor) -> Tensor | None:
        """Which words of these are decoded together."""
        together = self.site.format.together
        return None if together == 1 else (index // together).clamp(max=max(self.site.values // together - 1, 0))

    def _corrupt_bytes(self, bits: Positions, operation: int, undo: Undo) -> int:
        """Change packed bytes where they are: on another device than the CPU."""
        places, inside = np.divmod(bits, 8)
        starts = np.flatnonzero(np.diff(places, prepend=-1))
        masks = np.bitwise_or.reduceat(np.uint8(1) << inside.astype(np.uint8), starts)
        tensor = self.tensor.data
        index, mask = (torch.from_numpy(part).to(tensor.device) for part in (places[starts], masks))
        golden = gather(tensor, index)
        after = _changed(golden, mask, operation)
        undo.append((tensor, index, golden))
        scatter(tensor, index, after)
        return _count(golden, after)


def _changed(words: Tensor, mask: Tensor, operation: int) -> Tensor:
    return words ^ mask if operation == FLIP else words | mask if operation == SET else words & ~mask


def _count(before: Tensor, after: Tensor) -> int:
    """How many bits differ."""
    differing = (before ^ after).contiguous().view(torch.uint8).cpu().numpy()
    return int(np.unpackbits(differing).sum())


def _reading_of(format: Format, coding: Coding, words: Tensor, decoded: Tensor) -> Linear | Lookup | None:
    """How a compiled pass reads words; None where torch has to do it."""
    alone = format.together == 1 and not format.stored_constants
    if not alone or decoded.device.type != "cpu" or decoded.dtype != torch.float32:
        return None
    linear = format.linear(coding)
    if linear is not None and finds_words(linear, decoded, words, format.width):
        return linear
    rows = max((c.numel() for c in coding), default=1)
    if format.width > _WIDEST or rows << format.width > _MOST_ENTRIES:
        return None
    table, lost = _table_of(format) if not coding else _table(format, coding)
    flat = words.contiguous().reshape(-1).numpy()
    found = Lookup(flat.view(f"u{flat.itemsize}"), table, lost)
    return found if _reads_alike(found, decoded, format.width) else None


def _reads_alike(lookup: Lookup, decoded: Tensor, width: int) -> bool:
    """Whether the table reads all words as they were read: torch keeps the payload of a NaN or not, as it comes."""
    rows = len(lookup.table)
    words = lookup.words.reshape(rows, -1) & np.array(2**width - 1, lookup.words.dtype)
    read = np.take_along_axis(lookup.table.view(np.uint32), words.astype(np.int64), axis=1)
    return np.array_equal(read.reshape(-1), decoded.contiguous().reshape(-1).numpy().view(np.uint32))


@lru_cache(maxsize=16)
def _table_of(format: Format) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """The table of a format that knows nothing of the tensor, made once."""
    return _table(format, ())


def _table(format: Format, coding: Coding) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """(What every word reads as, which are beyond repair), a row for each entry of the coding."""
    rows = max((c.numel() for c in coding), default=1)
    every = torch.arange(1 << format.width).to(word_dtype(format.width)).expand(rows, -1)
    shaped = tuple(c.reshape(-1, 1) if c.dim() else c for c in coding)
    values, lost = format.read(every, shaped, torch.float32)
    return values.contiguous().numpy(), None if lost is None else lost.contiguous().numpy()
