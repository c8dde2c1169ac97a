"""One stored tensor of a space: its words, how they are changed, and how they are put back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flipproof.errors import FormatError
from flipproof.formats.base import Coding, blocks, dense, sparse, word_dtype
from flipproof.spaces.contract import Positions
from flipproof.spaces.sites import Site
from flipproof.spaces.words import FLIP, SET, Undo, as_words, gather, scatter


class Cell:
    """One stored tensor.

    Attributes:
        site: its name, format and place in the space.
        tensor: the live tensor of the model.
        packed: whether memory holds packed words: its bytes are the words, and stand for themselves.
        held: whether memory holds exactly these words; others are stored by decoding, see `store`.
        original: the values as they were before the format decoded them; None while they are in place.
        coding: the format's constants for the whole tensor, while stored.
    """

    def __init__(self, site: Site, tensor: Tensor, *, packed: bool) -> None:
        self.site, self.tensor, self.packed = site, tensor, packed
        self.held = packed or site.format.is_native(tensor.dtype)
        self.original: Tensor | None = None
        self.coding: Coding = ()

    @property
    def direct(self) -> bool:
        """Whether bit b of the site is bit b of the tensor's own bytes."""
        site, tensor = self.site, self.tensor
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return False
        return self.packed or (site.format.is_native(tensor.dtype) and tensor.dtype == site.dtype)

    @property
    def place(self) -> tuple[int, int]:
        """Address and size of an element: they change if the tensor moves."""
        return self.tensor.data_ptr(), self.tensor.element_size()

    def store(self) -> None:
        """Let the model compute with what the format can represent.

        Raises:
            FormatError: naming the tensor whose values the format cannot hold.
        """
        original = self.tensor.data.clone(memory_format=torch.contiguous_format)
        decoded = self._decoded(original)
        self.original = original
        self.tensor.data.copy_(decoded)

    def take_back(self) -> None:
        """The values as they were before `store`, bit by bit. Safe to call twice."""
        if self.original is not None:
            self.tensor.data.copy_(self.original)

    def forget(self) -> None:
        """Let go of the original, which is in its place again."""
        self.original, self.coding = None, ()

    def _decoded(self, original: Tensor) -> Tensor:
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
        return decoded

    def corrupt(self, bits: Positions, operation: int, undo: Undo) -> int:
        """Change bits and return how many changed; `undo` gets an entry before anything is written.

        What is touched is encoded, its words are changed, and they are decoded into the model.

        Args:
            bits: of the site, counted from its first, ascending.
            operation: FLIP, SET or CLEAR.
            undo: learns what was there.
        """
        site, tensor = self.site, self.tensor.data
        width = 8 if self.packed else site.width
        values, places = np.divmod(bits, width) if self.packed else site.locate(bits)
        starts = np.flatnonzero(np.diff(values, prepend=-1))
        masks = np.bitwise_or.reduceat(np.uint64(1) << places.astype(np.uint64), starts)
        index = torch.from_numpy(values[starts]).to(tensor.device)
        mask = as_words(masks, width).to(tensor.device)
        if not self.packed and site.format.together > 1:
            every = blocks(index, site.format.together, site.values)
            mask = torch.zeros_like(every, dtype=mask.dtype).index_put_((torch.searchsorted(every, index),), mask)
            index = every
        golden = gather(tensor, index)
        coding: Coding = ()
        if self.packed:
            before = golden
        else:
            coding = sparse(self.coding, tensor.shape, index)
            before = site.format.encode_values(
                golden if self.original is None else gather(self.original, index), coding
            )
        after = before ^ mask if operation == FLIP else before | mask if operation == SET else before & ~mask
        undo.append((tensor, index, golden))
        scatter(tensor, index, after if self.packed else site.format.decode_words(after, coding, site.dtype))
        if operation == FLIP:
            return int(bits.size)
        differing = (before ^ after).cpu().numpy().view(f"u{word_dtype(width).itemsize}")
        return int(sum(int(word).bit_count() for word in differing))
