"""The fault space: every stored bit that can be hit, and the injector that hits it and puts it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from flipproof.errors import FaultSpaceError, FormatError
from flipproof.faults.memory import CLEAR, FLIP, SET, DirectMemory, UndoLog
from flipproof.faults.models import Faults
from flipproof.faults.sampling import Positions
from flipproof.faults.selection import FormatChoice, candidates, choose_format
from flipproof.faults.sites import Parameters, Site
from flipproof.faults.words import Undo, corrupt_words, scatter
from flipproof.formats.base import Coding, dense
from flipproof.interrupts import whole


class FaultSpace:
    """Every stored bit of a model that can be hit, numbered from 0.

    The space is bound to the live model and never copies it. Formats that equal a tensor's own float type are hit in
    place; for every other format the model holds decoded values while `stored()` is active (which keeps one copy of
    the originals), and a fault re-decodes only the words it touches.

    Args:
        model: any module.
        where: which of its tensors.
        format: how they are stored, see `assess`.

    Raises:
        FaultSpaceError: if nothing is selected, or naming each tensor that cannot be hit.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Linear(2, 1)
        >>> space = fp.FaultSpace(net, format=fp.Float32())
        >>> space.bits, [site.name for site in space.sites]
        (96, ['weight', 'bias'])
        >>> before = net.weight.clone()
        >>> with space.corrupted(space.faults([("weight", 0, 31)])):  # the sign of the first weight
        ...     bool((net.weight == before * torch.tensor([-1, 1])).all())
        True
        >>> torch.equal(net.weight, before)
        True
    """

    def __init__(self, model: nn.Module, *, where: Parameters | None = None, format: FormatChoice = None) -> None:
        where = where or Parameters()
        self._asked = (where, format)
        sites: list[Site] = []
        tensors: list[Tensor] = []
        held: list[bool] = []
        packed: list[bool] = []
        self.left_out: dict[str, str] = {}
        """Tensors that are not in the space, and why."""
        offset = 0
        found = candidates(model, buffers=where.buffers)
        for candidate in found:
            if not where.selects(candidate):
                self.left_out[candidate.name] = "not selected by where="
                continue
            chosen = choose_format(candidate, format)
            if isinstance(chosen, str):
                self.left_out[candidate.name] = chosen
                continue
            t = candidate.tensor
            like = candidate.packed or t
            names, shape = candidate.names, tuple(like.shape)
            site = Site(names[0], names[1:], candidate.owner, candidate.kind, shape, like.dtype, chosen, offset)
            held.append(candidate.packed is not None or chosen.is_native(t.dtype))
            packed.append(candidate.packed is not None)
            offset += site.bits
            sites.append(site)
            tensors.append(t)
        if not sites:
            known = "\n  ".join(f"{c.name} ({c.kind})" for c in found[:20]) or "none at all"
            raise FaultSpaceError(
                f"no parameter is left to hit with {where!r} and format={format!r}; "
                f"the model's parameters are\n  {known}"
            )
        self.sites: tuple[Site, ...] = tuple(sites)
        self.bits = offset
        self._tensors = tensors
        self._held = held  # memory holds exactly these words; every other site is stored by decoding
        self._packed = packed
        self._index = {name: i for i, site in enumerate(sites) for name in (site.name, *site.aliases)}
        self._borders = np.array([*(site.offset for site in sites), offset], np.int64)
        self._firsts = self._borders[:-1]
        self._widths = np.array([site.width for site in sites], np.int64)
        self._originals: dict[int, Tensor] | None = None
        self._codings: dict[int, Coding] = {}
        self._direct: tuple[tuple[tuple[int, int], ...], DirectMemory | None, list[int]] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Addresses mean nothing in another process: they are looked up again there."""
        return {**self.__dict__, "_direct": None}

    def again(self, model: nn.Module) -> FaultSpace:
        """The same space of a copy of the model."""
        where, format = self._asked
        return FaultSpace(model, where=where, format=format)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The live tensor of each site, by its name."""
        return {site.name: tensor for site, tensor in zip(self.sites, self._tensors, strict=True)}

    @property
    def layers(self) -> dict[str, list[tuple[int, int]]]:
        """Each module that owns stored tensors, with the ranges of bits [first, last) it owns."""
        spans: dict[str, list[tuple[int, int]]] = {}
        for site in self.sites:
            spans.setdefault(site.layer, []).append((site.offset, site.offset + site.bits))
        return spans

    def table(self) -> pd.DataFrame:
        """What is stored how: one row a site, and what its share of the space is."""
        rows = [
            {
                "name": s.name,
                "layer": s.layer,
                "kind": s.kind,
                "values": s.values,
                "format": repr(s.format),
                "width": s.width,
                "bits": s.bits,
                "share": s.bits / self.bits,
            }
            for s in self.sites
        ]
        return pd.DataFrame(rows)

    def faults(self, bits: Iterable[tuple[str, int, int]], *, stuck: int | None = None) -> Faults:
        """Faults at chosen places: (qualified name, flat index of the value, bit), each at most once."""
        positions = []
        for name, value, bit in bits:
            if name not in self._index:
                raise FaultSpaceError(f"{name!r} is not in the fault space; it holds {[s.name for s in self.sites]}")
            site = self.sites[self._index[name]]
            if not (0 <= value < site.values and 0 <= bit < site.width):
                raise FaultSpaceError(
                    f"{name} has values 0 to {site.values - 1} of bits 0 to {site.width - 1}, "
                    f"got value {value}, bit {bit}"
                )
            positions.append(site.offset + value * site.width + bit)
        unique = np.unique(np.array(positions, np.int64))
        if unique.size != len(positions):
            raise FaultSpaceError("the same bit is named twice; two flips of one bit cancel out")
        if stuck not in (None, 0, 1):
            raise FaultSpaceError(f"stuck must be None, 0 or 1, got {stuck!r}")
        return Faults(unique, stuck)  # type: ignore[arg-type]

    def locate(self, faults: Faults) -> pd.DataFrame:
        """Where faults lie: one row a bit with its `site`, `value` (flat index) and `bit`."""
        which, value, bit = self._located(faults)
        names = np.array([site.name for site in self.sites], dtype=object)[which]
        return pd.DataFrame({"site": names, "value": value, "bit": bit})

    def places(self, faults: Faults) -> list[tuple[str, int, int]]:
        """The same as plain (name, value, bit), which `faults` takes: for a few faults far quicker than a table."""
        which, value, bit = (column.tolist() for column in self._located(faults))
        return [(self.sites[i].name, v, b) for i, v, b in zip(which, value, bit, strict=True)]

    def _located(self, faults: Faults) -> tuple[Positions, Positions, Positions]:
        which = np.searchsorted(self._firsts, faults.positions, side="right") - 1
        value, bit = np.divmod(faults.positions - self._firsts[which], self._widths[which])
        return which, value, bit

    def touched_names(self, faults: Faults) -> list[str]:
        """Every name of every tensor that these faults touch."""
        touched = np.flatnonzero(np.diff(np.searchsorted(faults.positions, self._borders)))
        return [name for i in touched.tolist() for name in (self.sites[i].name, *self.sites[i].aliases)]

    @whole
    def stored(self) -> Iterator[None]:
        """While active, the model computes with what its formats can represent. Restores every value bit-exactly.

        Raises:
            FormatError: naming the tensor whose values the format cannot hold.
        """
        if self._originals is not None:
            raise FaultSpaceError("the model is already stored in this space")
        originals: dict[int, Tensor] = {}
        self._codings = {}
        try:
            for i, (site, tensor) in enumerate(zip(self.sites, self._tensors, strict=True)):
                if self._held[i]:
                    continue
                original = tensor.data.clone(memory_format=torch.contiguous_format)
                decoded = self._decoded(i, site, original)
                originals[i] = original
                tensor.data.copy_(decoded)
            self._originals = originals
            yield
        finally:
            _to_the_end(lambda: self._take_back(originals))

    def _take_back(self, originals: dict[int, Tensor]) -> None:
        for i, original in originals.items():
            self._tensors[i].data.copy_(original)
        self._originals = None

    def _decoded(self, i: int, site: Site, original: Tensor) -> Tensor:
        try:
            self._codings[i] = site.format.fit(original)
            words = site.format.encode_values(original, dense(self._codings[i], original.shape))
        except FormatError as error:
            raise FormatError(f"{site.name}: {error}") from None
        decoded = site.format.decode_words(words, dense(self._codings[i], original.shape), site.dtype)
        lost = torch.isfinite(original) & ~torch.isfinite(decoded)
        if bool(lost.any()):
            raise FormatError(
                f"{site.name}: {int(lost.sum())} finite values become NaN or infinite in {site.format!r} "
                f"(largest magnitude {float(original[lost].abs().max()):g}); choose a format with more range"
            )
        return decoded

    def originals(self) -> dict[str, Tensor]:
        """While `stored()`: the values that its formats replaced, by qualified name."""
        return {self.sites[i].name: original for i, original in (self._originals or {}).items()}

    @whole
    def corrupted(self, faults: Faults) -> Iterator[int]:
        """The model with these faults in its memory; afterwards bit-identical to before, whatever happens inside.

        Yields:
            How many stored bits changed (fewer than `len(faults)` for stuck cells that already held the value).

        Raises:
            FaultSpaceError: if a fault lies outside the space.
        """
        positions = faults.positions
        if positions.size and (positions[0] < 0 or positions[-1] >= self.bits):
            raise FaultSpaceError(
                f"faults lie outside the space of {self.bits:,} bits: {positions[0]} … {positions[-1]}"
            )
        if self._originals is None and not all(self._held):
            with self.stored(), self.corrupted(faults) as changed:
                yield changed
            return
        operation = FLIP if faults.stuck is None else SET if faults.stuck else CLEAR
        direct, coded = self._paths()
        log = UndoLog()
        undo: Undo = []
        try:
            changed = direct.apply(positions, operation, log) if direct is not None and positions.size else 0
            for i in coded:
                site = self.sites[i]
                first, last = np.searchsorted(positions, (site.offset, site.offset + site.bits))
                if first < last:
                    changed += corrupt_words(
                        site,
                        self._tensors[i].data,
                        positions[first:last] - site.offset,
                        operation,
                        undo,
                        source=self._originals.get(i) if self._originals else None,
                        coding=self._codings.get(i, ()),
                        packed=self._packed[i],
                    )
            yield changed
        finally:
            _to_the_end(lambda: _restore(log, undo))

    def _paths(self) -> tuple[DirectMemory | None, list[int]]:
        """Which sites are changed in memory and which through their format; found anew if the tensors moved."""
        where = tuple((t.data_ptr(), t.element_size()) for t in self._tensors)
        if self._direct is None or self._direct[0] != where:
            direct = [
                i
                for i, (s, t) in enumerate(zip(self.sites, self._tensors, strict=True))
                if t.device.type == "cpu"
                and t.is_contiguous()
                and (self._packed[i] or (s.format.is_native(t.dtype) and t.dtype == s.dtype))
            ]
            memory = DirectMemory(
                [self._tensors[i].data for i in direct],
                [self.sites[i].offset for i in direct],
                [self.sites[i].bits for i in direct],
            )
            coded = [i for i in range(len(self.sites)) if i not in set(direct)]
            moved = [
                self.sites[i].name
                for i in coded
                if not self._packed[i] and self._tensors[i].dtype != self.sites[i].dtype
            ]
            if moved:
                raise FaultSpaceError(f"{moved[0]} changed its dtype since the fault space was made; make a new space")
            self._direct = (where, memory if direct else None, coded)
        return self._direct[1], self._direct[2]


def _restore(log: UndoLog, undo: Undo) -> None:
    while undo:
        scatter(*undo[-1])
        undo.pop()
    log.undo()


def _to_the_end(restore: Callable[[], None]) -> None:
    """Restore everything, even if Ctrl-C comes in the middle: do it again to the end first, then let it through."""
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            restore()
            break
        except KeyboardInterrupt as signal:
            interrupted = signal
    if interrupted is not None:
        raise interrupted
