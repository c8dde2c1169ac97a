"""The fault space: every stored bit that can be hit, and the injector that hits it and puts it back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pandas as pd
from torch import Tensor, nn

from flipproof._interrupts import whole
from flipproof.errors import FaultSpaceError, FlipproofWarning
from flipproof.spaces.cell import Cell, WordCount
from flipproof.spaces.contract import Draw, Faults, Positions, Space, Start, WordOutcomes
from flipproof.spaces.device_words import DeviceMemory
from flipproof.spaces.packed_params import Packing
from flipproof.spaces.sites import Parameters, Site, check_where
from flipproof.spaces.tensors import (
    Candidate,
    FormatChoice,
    check_format,
    check_hit,
    choose_format,
    inventory,
    unmatched,
)
from flipproof.spaces.words import CLEAR, FLIP, SET, CompiledMemory, Undo, UndoLog, scatter

_Paths = tuple[CompiledMemory | None, DeviceMemory | None, list[Cell]]


class FaultSpace(Space):
    """Every stored bit of a model that can be hit, numbered from 0.

    The space is bound to the live model and never copies it. Formats that equal a tensor's own float type are hit in
    place; for every other format the model holds decoded values while `stored()` is active (which keeps one copy of
    the originals), and a fault re-decodes only the words it touches.

    Everything that the model stores is either in the space or in `left_out`, with the reason:

    coverage = bits that can be hit / (bits that can be hit + `left_out_bits`)

    Stored are parameters, buffers (non-persistent ones too), packed objects of torch.ao, and what hangs on quantised
    layers (the absmax of bitsandbytes). What is in the space counts in the format it is stored in, what is not in its
    own type; memory that several tensors share counts once. Not counted are what inference never reads
    (`num_batches_tracked`) and the constants of formats (scale and zero point), which are taken to lie in protected
    memory; those of a checkpoint that is quantised already are stored numbers like any other. Other plain attributes of
    modules that are neither parameter nor buffer are not seen.

    Args:
        model: any eager module.
        where: which of its tensors; every parameter by default.
        format: how they are stored, see `assess`: what it does not store is hit in its own type.

    Raises:
        FaultSpaceError: if nothing is selected, or naming each tensor that cannot be hit.
        FormatError: if `format` is none.

    Warns:
        FlipproofWarning: if a pattern of `format` fits nothing that the model stores.

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
        >>> weights = fp.FaultSpace(net, where=fp.Parameters(kinds=("weight",)), format=fp.Affine(bits=8))
        >>> weights.bits, weights.left_out, weights.left_out_bits, round(weights.coverage, 3)
        (16, {'bias': 'not selected by where='}, 32, 0.333)
    """

    def __init__(self, model: nn.Module, *, where: Parameters | None = None, format: FormatChoice = None) -> None:
        where = check_where(where)
        check_format(format)
        self._asked = (where, format)
        cells: list[Cell] = []
        packings: dict[int, tuple[Packing, list[str]]] = {}
        self.left_out: dict[str, str] = {}
        """What the model stores and is not in the space, and why."""
        self.left_out_bits = 0
        """Stored bits of all that, each in its own type."""
        self._unasked: list[Candidate] = []
        self._held: dict[str, str] = {}
        offset = 0
        found = inventory(model)
        why = {candidate.name: where.leaves_out(candidate) for candidate in found}
        check_hit([candidate for candidate in found if not why[candidate.name]])
        for candidate in found:
            if reason := why[candidate.name]:
                self._leave_out(candidate, reason, asked=not where.asks_for(candidate))
                continue
            chosen = choose_format(candidate, format)
            t = candidate.tensor
            like = candidate.packed or t
            names, shape = candidate.names, tuple(like.shape)
            site = Site(names[0], names[1:], candidate.owner, candidate.kind, shape, like.dtype, chosen, offset)
            offset += site.bits
            cells.append(Cell(site, t, packed=candidate.packed, constants=candidate.constants))
            if candidate.held:
                self._held[candidate.name] = candidate.held
            if (packing := candidate.packing) is not None:
                packings.setdefault(id(packing), (packing, []))[1].append(candidate.name)
        if not cells:
            known = "\n  ".join(f"{c.name} ({c.kind}){f': {c.problem}' if c.problem else ''}" for c in found[:20])
            raise FaultSpaceError(
                f"no parameter is left to hit with {where!r} and format={format!r}; "
                f"the model's parameters are\n  {known or 'none at all'}"
            )
        for pattern, reason in unmatched(found, format).items():
            warnings.warn(
                f"the pattern {pattern!r} of format= {reason}; what it was meant for is hit in its own type",
                FlipproofWarning,
                stacklevel=2,
            )
        self.cells = tuple(cells)
        """What is stored, tensor by tensor."""
        self._packed = [cell for cell in cells if cell.packed is not None]
        self._packings = [packing for packing, _ in packings.values()]
        self._packing_of = {name: packing for packing, names in packings.values() for name in names}
        self._hit = WordCount()
        self._as_stored = False
        self.sites: tuple[Site, ...] = tuple(cell.site for cell in cells)
        self.bits = offset
        self._index = {name: i for i, site in enumerate(self.sites) for name in (site.name, *site.aliases)}
        self._borders = np.array([*(site.offset for site in self.sites), offset], np.int64)
        self._is_stored = False
        self._tensors = [cell.tensor for cell in cells]
        self._paths_at: tuple[list[tuple[int, int]], _Paths] | None = None
        self._spare: list[UndoLog] = []

    def _leave_out(self, candidate: Candidate, reason: str, *, asked: bool) -> None:
        self.left_out[candidate.name] = reason
        if candidate.unread:
            return
        self.left_out_bits += candidate.bits
        if not asked:
            self._unasked.append(candidate)

    def shortfall(self) -> str | None:
        """A sentence on what is missing, if more than 1 % of the stored bits are outside without being asked for."""
        missing = sum(candidate.bits for candidate in self._unasked)
        if missing <= 0.01 * (self.bits + self.left_out_bits):
            return None
        by_reason: dict[str, list[Candidate]] = {}
        for candidate in self._unasked:
            by_reason.setdefault(self.left_out[candidate.name], []).append(candidate)
        parts = [
            f"{', '.join(c.name for c in group[:3])}{f' and {len(group) - 3} more' if len(group) > 3 else ''} "
            f"({sum(c.bits for c in group):,} bits; {reason})"
            for reason, group in by_reason.items()
        ]
        return (
            f"only {100 * self.coverage:.3g} % of the model's stored bits can be hit. Outside the fault space: "
            f"{'; '.join(parts)}. Leave it out on purpose with where=fp.Parameters(exclude=[…]) or kinds=(…) and "
            f"this is not said"
        )

    def __getstate__(self) -> dict[str, object]:
        """Addresses mean nothing in another process: they are looked up again there."""
        return {**self.__dict__, "_paths_at": None, "_spare": []}

    def again(self, model: nn.Module) -> FaultSpace:
        """The same space of a copy of the model."""
        where, format = self._asked
        found = FaultSpace(model, where=where, format=format)
        if [(s.name, s.bits) for s in found.sites] != [(s.name, s.bits) for s in self.sites]:
            raise FaultSpaceError("the copy of the model does not store what the model stores, so no fault is the same")
        return found

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The live tensor of each site, by its name; of `copies`, what the model is given within `corrupted`."""
        return {cell.site.name: cell.tensor for cell in self.cells}

    @property
    def copies(self) -> tuple[str, ...]:
        """Sites that the model keeps in objects of C++: what is written to their tensors elsewhere, it never reads."""
        return tuple(self._packing_of)

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
            width = site.width
            if 0 <= value < site.words and not site.is_even:
                width = int(site.layout.width(np.array([value]))[0])
            if not (0 <= value < site.words and 0 <= bit < width):
                raise FaultSpaceError(
                    f"{name} has values 0 to {site.words - 1} of bits 0 to {width - 1}, got value {value}, bit {bit}"
                )
            first = value * width if site.is_even else int(site.layout.first(np.array([value]))[0])
            positions.append(site.offset + first + bit)
        unique = np.unique(np.array(positions, np.int64))
        if unique.size != len(positions):
            raise FaultSpaceError("the same bit is named twice; two flips of one bit cancel out")
        if stuck not in (None, 0, 1):
            raise FaultSpaceError(f"stuck must be None, 0 or 1, got {stuck!r}")
        return Faults(unique, stuck)  # type: ignore[arg-type]

    def touched_names(self, faults: Draw) -> list[str]:
        """Every name of every tensor that these faults touch."""
        return [name for i in self._touched(faults) for name in (self.sites[i].name, *self.sites[i].aliases)]

    def _touched(self, faults: Draw) -> list[int]:
        touched: list[int] = np.flatnonzero(np.diff(np.searchsorted(faults.positions, self._borders))).tolist()
        return touched

    @whole
    def stored(self) -> Iterator[None]:
        """While active, the model computes with what its formats can represent. Restores every value bit-exactly.

        Raises:
            FormatError: naming the tensor whose values the format cannot hold.
        """
        if self._is_stored:
            raise FaultSpaceError("the model is already stored in this space")
        try:
            for cell in self.cells:
                if not cell.held:
                    cell.store()
            for packing in self._packings:
                packing.settle()
            self._is_stored = True
            self._paths_at = None  # how words are read is known only now
            yield
        finally:
            _to_the_end(self._take_back)

    def _take_back(self) -> None:
        for packing in self._packings:
            packing.put_back()
        for cell in self.cells:
            cell.take_back()
        for cell in self.cells:
            cell.forget()
        self._is_stored = False
        self._paths_at = None

    def originals(self) -> dict[str, Tensor]:
        """While `stored()`: the values that its formats replaced, by qualified name."""
        return {cell.site.name: cell.original for cell in self.cells if cell.original is not None}

    @whole
    def corrupted(self, draw: Draw) -> Iterator[int]:
        """The model with these faults in its memory; afterwards bit-identical to before, whatever happens inside.

        Yields:
            How many stored bits changed (fewer than `len(draw)` for stuck cells that already held the value).

        Raises:
            FaultSpaceError: if a fault lies outside the space.
        """
        if not isinstance(draw, Faults):
            raise FaultSpaceError(f"a space of stored bits takes Faults, got {type(draw).__name__}")
        positions = draw.positions
        if positions.size and positions.item(-1) >= self.bits:  # they ascend from 0
            raise FaultSpaceError(
                f"faults lie outside the space of {self.bits:,} bits: {positions[0]} … {positions[-1]}"
            )
        if not self._is_stored and (self._packings or not all(cell.held for cell in self.cells)):
            with self.stored(), self.corrupted(draw) as changed:
                yield changed
            return
        operation = FLIP if draw.stuck is None else SET if draw.stuck else CLEAR
        compiled, there, coded = self._paths()
        log = self._spare.pop() if self._spare else UndoLog()
        undo: Undo = []
        anew = self._packed_anew(draw)
        self._hit = read = WordCount()
        try:
            for cell in self._packed:
                if (mine := _of(cell, positions)).size:
                    cell.foresee(mine, operation, read)
            changed = in_memory = 0
            if compiled is not None and positions.size:
                changed = compiled.apply(positions, operation, log)
                corrected, detected, miscorrected, in_memory, differing = log.outcomes
                read.corrected += corrected
                read.detected += detected
                read.miscorrected += miscorrected
                read.differs |= differing > 0
            if there is not None:
                bits, words = there.apply(positions, operation, undo)
                changed += bits
                in_memory += bits
                read.miscorrected += words
            near = self._near(positions) if coded else frozenset()
            for cell in coded:
                if id(cell) in near and (mine := _of(cell, positions)).size:
                    bits = cell.corrupt(mine, operation, undo, read)
                    changed += bits
                    in_memory += 0 if cell.packed is None else bits
            self._as_stored = in_memory == 0 and not read.differs
            for packing in anew:
                packing.install()
            yield changed
        finally:
            self._as_stored = False
            for packing in anew:
                packing.take_out()
            try:
                if undo:
                    _to_the_end(lambda: _restore(undo))
            finally:
                log.undo()
            self._spare.append(log)

    def _packed_anew(self, draw: Draw) -> list[Packing]:
        """What a draw makes torch.ao pack anew: one object a layer that is hit."""
        if not self._packings or not len(draw):
            return []
        hit = {self.sites[i].name for i in self._touched(draw)}
        found = {id(packing): packing for name, packing in self._packing_of.items() if name in hit}
        return list(found.values())

    def _near(self, positions: Positions) -> frozenset[int]:
        """Identities of the cells from the first that is hit to the last: one fault is not sought in all of them."""
        if not positions.size:
            return frozenset()
        first, last = np.searchsorted(self._borders, positions[[0, -1]], side="right") - 1
        return frozenset(map(id, self.cells[first : last + 1]))

    def _paths(self) -> _Paths:
        """What is changed in memory here or on a device, and what through its format; anew if the tensors moved."""
        where = [(tensor.data_ptr(), tensor.element_size()) for tensor in self._tensors]  # a tensor may move
        if self._paths_at is None or self._paths_at[0] != where:
            stretches = [(cell, cell.stretch) for cell in self.cells]
            compiled = [stretch for _, stretch in stretches if stretch is not None]
            rest = [cell for cell, stretch in stretches if stretch is None]
            there, coded = _on_device(rest)
            moved = [cell.site.name for cell in coded if not cell.packed and cell.tensor.dtype != cell.site.dtype]
            if moved:
                raise FaultSpaceError(f"{moved[0]} changed its dtype since the fault space was made; make a new space")
            self._paths_at = (where, (CompiledMemory(compiled) if compiled else None, there, coded))
        return self._paths_at[1]

    @property
    def word_outcomes(self) -> WordOutcomes:
        hit = self._hit
        return WordOutcomes(hit.corrected, hit.detected, hit.miscorrected)

    @property
    def as_stored(self) -> bool:
        return self._as_stored

    def start(self, draw: Draw) -> Start:
        """Nothing changes before the first use of a tensor that is hit."""
        touched = [self.sites[i] for i in self._touched(draw)]
        held = self._held
        names = [held.get(name, name) for site in touched for name in (site.name, *site.aliases)]
        alone = len(touched) == 1 and touched[0].name not in held
        return Start(names, self._rows(touched[0], draw) if alone else None)

    def _rows(self, site: Site, draw: Draw) -> tuple[int, int] | None:
        """The slices of axis 0 between which all faults of a draw lie, which are in this site."""
        last = (int(draw.positions[-1]) - site.offset) // site.width
        if not site.is_even or not site.shape or last >= site.values:  # read in blocks, or by a constant that is hit
            return None
        first, size = (int(draw.positions[0]) - site.offset) // site.width, site.values // site.shape[0]
        return first // size, last // size

    def starts(self) -> None:
        """None: it depends on the draw."""


def _on_device(cells: list[Cell]) -> tuple[DeviceMemory | None, list[Cell]]:
    """Cells that are changed where they lie on an accelerator, and the others."""
    mine = [cell for cell in cells if cell.addressed]
    mine = [cell for cell in mine if cell.tensor.device == mine[0].tensor.device]
    if not mine:
        return None, cells
    sites = [cell.site for cell in mine]
    memory = DeviceMemory(
        [cell.tensor.data for cell in mine],
        [site.offset for site in sites],
        [site.bits for site in sites],
        [site.width for site in sites],
    )
    return (memory, [cell for cell in cells if cell not in mine]) if memory.faithful() else (None, cells)


def _of(cell: Cell, positions: Positions) -> Positions:
    """Those that lie in a cell, counted from its first bit."""
    first = cell.site.offset
    low, high = np.searchsorted(positions, (first, first + cell.site.bits))
    return positions[low:high] - first


def _restore(undo: Undo) -> None:
    while undo:
        scatter(*undo[-1])
        undo.pop()


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
