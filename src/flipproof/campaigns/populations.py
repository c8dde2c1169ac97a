"""Faults divided into strata whose shares are known exactly, and how to draw from one of them.

What a flip does to the network is mostly told by what it does to its word: how far the value that is read moves, beside
the values of its tensor, and to which side. That is decoded for every bit of the space, which takes no forward. Bits
whose flip changes no bit of any value are known to be masked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln

from flipproof._interrupts import check
from flipproof.campaigns.allocation import FloatArray, IntArray
from flipproof.faults.base import FaultModel
from flipproof.faults.bit_error_rate import BitErrorRate
from flipproof.faults.sampling import TrialGenerator
from flipproof.formats.base import bit_pattern, dense
from flipproof.spaces.cell import Cell
from flipproof.spaces.contract import Draw, Faults, Positions, Sized, Space, Upsets
from flipproof.spaces.parameters import FaultSpace

EDGES = (-12.0, -9.0, -7.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
"""Where log2(change / root mean square of the tensor) is divided."""

_SAME = 0
"""The class of flips after which the same value is read, bit by bit."""

_OWN = 0.01
"""A tensor with this share of the bits has strata of its own; smaller ones share those of their kind."""

_KEPT = 2**28
"""Bytes of classes that are kept, at most."""

HUGE = 5.0
"""A flip that moves a value by more than 2^5 of its tensor's root mean square may ruin a network alone."""


class Stratum(NamedTuple):
    """Faults that are thought to be alike.

    Attributes:
        name: of the stratum.
        share: of all faults.
        group: strata of one group are thought to do as much harm.
        harm: guessed probability of it.
    """

    name: str
    share: float
    group: str
    harm: float


class Population(ABC):
    """All faults of a point, divided.

    Attributes:
        strata: to draw from.
        same: share of the faults that provably change nothing; with those of the strata it sums to 1.
    """

    strata: tuple[Stratum, ...]
    same: float = 0.0

    @abstractmethod
    def draw(self, stratum: int, space: Space, generator: TrialGenerator) -> Draw:
        """One fault (or set of faults) of a stratum, as the fault model draws it, given that it is of this stratum."""

    @property
    def shares(self) -> FloatArray:
        """Of the strata."""
        return np.array([stratum.share for stratum in self.strata])

    @property
    def groups(self) -> IntArray:
        """Numbers of their groups."""
        numbers = {name: i for i, name in enumerate(dict.fromkeys(stratum.group for stratum in self.strata))}
        return np.array([numbers[stratum.group] for stratum in self.strata], np.int64)

    @property
    def harm(self) -> FloatArray:
        """Guessed of them."""
        return np.array([stratum.harm for stratum in self.strata])


@dataclass(frozen=True)
class Within(FaultModel):
    """A fault model, given that what it draws is of one stratum."""

    faults: FaultModel
    stratum: str
    number: int = field(repr=False)
    population: Population = field(repr=False, compare=False)
    swept: ClassVar[str] = "stratum"

    @property
    def single_upset(self) -> bool:
        return self.faults.single_upset

    def coordinates(self) -> dict[str, float | int]:
        return self.faults.coordinates()

    def check(self, space: Space) -> None:
        """Nothing more than of the fault model."""

    def draw(self, space: Space, generator: TrialGenerator) -> Draw:
        return self.population.draw(self.number, space, generator)


class Everything(Population):
    """One stratum: drawn as the fault model draws."""

    def __init__(self, faults: FaultModel) -> None:
        self._faults = faults
        self.strata = (Stratum("all", 1.0, "all", 0.05),)

    def draw(self, stratum: int, space: Space, generator: TrialGenerator) -> Draw:
        return self._faults.draw(space, generator)


class SingleBits(Population):
    """Single flips of stored bits, by tensor and by how far the value that is read moves.

    Where words are decoded together, or constants of a tensor are stored too, strata are bits of the word instead.

    Args:
        space: while `stored()`.
    """

    def __init__(self, space: FaultSpace) -> None:
        self._bytes = 0
        self._kept: OrderedDict[tuple[int, int], NDArray[np.uint8]] = OrderedDict()
        found: dict[tuple[str, int, bool], list[tuple[int, int, int]]] = {}
        unread: list[tuple[int, int, int]] = []
        for i, cell in enumerate(space.cells):
            site = cell.site
            owner = site.name if site.bits >= _OWN * space.bits else f"small {site.kind}"
            for bit in range(site.width):
                check()
                if not _alone(cell):
                    held = site.positions(bit).size
                    found.setdefault((owner, bit, False), []).append((i, bit, held))
                    continue
                counts = np.bincount(self._classes(space, i, bit))
                if counts[_SAME]:
                    unread.append((i, bit, int(counts[_SAME])))
                for kind in np.flatnonzero(counts[1:]).tolist():
                    found.setdefault((owner, kind + 1, True), []).append((i, bit, int(counts[kind + 1])))
        if not found:  # nothing that is hit is read otherwise: a trial shall say so
            found["everything", _SAME, True], unread = unread, []
        self.same = sum(held for _, _, held in unread) / space.bits
        self._parts = [np.array(parts, np.int64) for parts in found.values()]
        self._kinds = [kind if decoded else None for _, kind, decoded in found]
        self.strata = tuple(
            Stratum(
                f"{owner}, {_named(kind) if decoded else f'bit {kind}'}",
                int(parts[:, 2].sum()) / space.bits,
                _named(kind) if decoded else f"bit {kind}",
                _guess(kind) if decoded else 0.05,
            )
            for (owner, kind, decoded), parts in zip(found, self._parts, strict=True)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict(), "_bytes": 0}

    def draw(self, stratum: int, space: Space, generator: TrialGenerator) -> Faults:
        assert isinstance(space, FaultSpace)
        parts, kind = self._parts[stratum], self._kinds[stratum]
        ends = np.cumsum(parts[:, 2])
        chosen = int(generator.below(int(ends[-1]), 1)[0])
        part = int(np.searchsorted(ends, chosen, side="right"))
        number, bit, held = parts[part].tolist()
        site, nth = space.sites[number], chosen - int(ends[part]) + held
        if kind is None:
            return Faults(site.offset + site.positions(bit)[nth : nth + 1])
        word = np.flatnonzero(self._classes(space, number, bit) == kind)[nth : nth + 1]
        return Faults(site.offset + word * site.width + bit)

    def _classes(self, space: FaultSpace, number: int, bit: int) -> NDArray[np.uint8]:
        """The class of this bit of every word of a site; some are kept."""
        key = (number, bit)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        found = self._kept[key] = classes_of(space.cells[number], bit)
        self._bytes += found.nbytes
        while self._bytes > _KEPT and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return found


class NeuronBits(Population):
    """Single upsets of computed values, by layer and bit of the word.

    Args:
        space: where each sample has an upset of its own.
        bit: the only one that is hit; None for all.
    """

    def __init__(self, space: Space, bit: int | None = None) -> None:
        self._places = [
            (site, b) for site in space.sites for b in range(site.width) if b == (b if bit is None else bit)
        ]
        total = sum(site.words for site, _ in self._places)
        self.strata = tuple(
            Stratum(f"{site.name}, bit {b}", site.words / total, f"bit {b}", 0.4 if b == site.width - 2 else 0.02)
            for site, b in self._places
        )

    def draw(self, stratum: int, space: Space, generator: TrialGenerator) -> Upsets:
        site, bit = self._places[stratum]
        assert space.samples is not None
        return Upsets(site.offset + generator.below(site.values, space.samples) * site.width + bit)


class FlipCounts(Population):
    """Draws at a bit error rate, by how many huge changes there are among their flips, upwards and downwards.

    Where each trial has n flips, (k₊, k₋) is multivariate hypergeometric; where each bit flips by itself, the two are
    independent binomials. Given the numbers, which bits it are is uniform, as in the fault model.

    Args:
        faults: a point.
        space: while `stored()`.
        up: positions of bits whose flip moves a value up by more than `HUGE` allows, ascending.
        down: the same for down.
        flips: of a trial; None for those of a rate.
        rate: the rate, if it is one.
    """

    def __init__(
        self,
        faults: FaultModel,
        space: FaultSpace,
        up: Positions,
        down: Positions,
        *,
        flips: int | None = None,
        rate: BitErrorRate | None = None,
    ) -> None:
        self._faults, self._classes = faults, (up, down)
        taken = np.sort(np.concatenate([up, down]))
        self._before = taken - np.arange(taken.size)
        self._rest = space.bits - taken.size
        if rate is None:
            assert flips is not None
            ber = flips / space.bits
        else:
            ber = rate._single()
            flips = round(ber * space.bits) if rate.exact else None
        self._ber, self._flips = ber, flips
        self._cells: list[tuple[IntArray, FloatArray]] = []
        expected = [ber * positions.size for positions in (up, down)]
        if max(expected) > _MANY:
            self.strata = (Stratum("all", 1.0, "all", 0.5),)
            return
        most = [int(mean + 12 * (mean + 1) ** 0.5 + 12) for mean in expected]
        most = [
            min(m, c.size, m if self._flips is None else self._flips) for m, c in zip(most, (up, down), strict=True)
        ]
        chance = self._chances(ber, most)
        strata = []
        for (a, b), (c, d) in product(_buckets(most[0]), _buckets(most[1])):
            block = chance[a:b, c:d]
            if (share := float(block.sum())) <= 0:
                continue
            pairs = np.stack(np.meshgrid(np.arange(a, b), np.arange(c, d), indexing="ij"), axis=-1).reshape(-1, 2)
            self._cells.append((pairs, np.cumsum(block.reshape(-1)) / share))
            name = f"{_between(a, b, most[0])} up, {_between(c, d, most[1])} down"
            strata.append(Stratum(name, share, f"{_between(a, b, most[0])} up", _harm(a, c)))
        total = sum(stratum.share for stratum in strata)
        self.strata = tuple(stratum._replace(share=stratum.share / total) for stratum in strata)

    def _chances(self, ber: float, most: list[int]) -> FloatArray:
        """Of (k₊, k₋), up to those numbers."""
        k, j = (np.arange(m + 1, dtype=np.float64) for m in most)
        one, other = (float(positions.size) for positions in self._classes)
        if self._flips is None:
            with np.errstate(divide="ignore"):
                logs = [
                    _choose(size, count) + count * np.log(ber) + (size - count) * np.log1p(-ber)
                    for size, count in ((one, k), (other, j))
                ]
            return np.asarray(np.exp(logs[0][:, None] + logs[1][None, :]))
        left = self._flips - k[:, None] - j[None, :]
        log = _choose(one, k)[:, None] + _choose(other, j)[None, :]
        fits = (left >= 0) & (left <= self._rest)
        log = log + np.where(fits, _choose(float(self._rest), np.clip(left, 0, self._rest)), -np.inf)
        total = one + other + self._rest
        return np.asarray(np.exp(log - _choose(total, np.array(float(self._flips)))))

    def draw(self, stratum: int, space: Space, generator: TrialGenerator) -> Draw:
        if not self._cells:
            return self._faults.draw(space, generator)
        pairs, ends = self._cells[stratum]
        uniform = int(generator.below(2**53, 1)[0]) / 2**53
        counts = pairs[min(int(np.searchsorted(ends, uniform, side="right")), len(pairs) - 1)].tolist()
        hit = [
            positions[generator.distinct(count, positions.size)]
            for count, positions in zip(counts, self._classes, strict=True)
        ]
        if self._flips is None:
            rest = generator.bernoulli(self._ber, self._rest)
        else:
            rest = generator.distinct(self._flips - sum(counts), self._rest)
        hit.append(rest + np.searchsorted(self._before, rest, side="right"))
        return Faults(np.sort(np.concatenate(hit)))


_MANY = 100
"""Expected huge flips of a trial from which on their number tells nothing."""

_BORDERS = (0, 1, 2, 3, 4, 6, 9, 14, 20)
"""Numbers of huge flips at which a stratum begins."""


def huge_flips(space: FaultSpace) -> tuple[Positions, Positions]:
    """Bits whose flip moves the value that is read up, or down, by more than 2^`HUGE` of its tensor's size."""
    least = np.searchsorted(EDGES, HUGE) + 1
    found: tuple[list[Positions], list[Positions]] = ([], [])
    for cell in space.cells:
        for bit in range(cell.site.width) if _alone(cell) else ():
            check()
            kinds = classes_of(cell, bit)
            for side, positions in enumerate(found):
                here = np.flatnonzero((_octave(kinds) >= least) & (_down(kinds) == side))
                positions.append(cell.site.offset + here * cell.site.width + bit)
    up, down = (np.sort(np.concatenate([np.zeros(0, np.int64), *positions])) for positions in found)
    return up, down


def classes_of(cell: Cell, bit: int) -> NDArray[np.uint8]:
    """The class of this bit in every word of a cell, (words,): 0 if nothing changes; else 1 + 2·octave + downwards."""
    site = cell.site
    original = cell.tensor.data if cell.original is None else cell.original
    coding = dense(cell.coding, original.shape)
    words = site.format.encode_values(original, coding)
    mask = 1 << bit
    if mask > torch.iinfo(words.dtype).max:
        mask -= 1 << torch.iinfo(words.dtype).bits
    old = site.format.decode_words(words, coding, site.dtype)
    new = site.format.decode_words(words ^ mask, coding, site.dtype)
    same = (bit_pattern(new) == bit_pattern(old)) if new.is_floating_point() else new == old
    was, now = old.double().flatten().cpu().numpy(), new.double().flatten().cpu().numpy()
    finite = was[np.isfinite(was)]
    size = float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
    with np.errstate(all="ignore"):
        change = now - was
        octave = np.searchsorted(EDGES, np.log2(np.abs(change) / (size or 1.0)), side="right")
    octave = np.where(np.isnan(change), len(EDGES), octave)
    downwards = (change < 0) & (octave > _SIDED)
    return np.where(same.flatten().cpu().numpy(), _SAME, 1 + 2 * octave + downwards).astype(np.uint8)


_SIDED = EDGES.index(0.0)
"""Larger changes are told apart by their side."""


def _octave(kinds: NDArray[np.uint8]) -> NDArray[Any]:
    return np.where(kinds == _SAME, -1, (kinds.astype(np.int64) - 1) // 2)


def _down(kinds: NDArray[np.uint8]) -> NDArray[Any]:
    return (kinds.astype(np.int64) - 1) % 2


def _named(kind: int) -> str:
    if kind == _SAME:
        return "no change"
    octave, down = divmod(kind - 1, 2)
    ends = ("0", *(f"2^{edge:g}" for edge in EDGES), "∞")
    side = "" if octave <= _SIDED else " down" if down else " up"
    return f"change {ends[octave]} … {ends[octave + 1]}{side}"


def _guess(kind: int) -> float:
    """How harmful a class is thought to be before anything was drawn."""
    if kind == _SAME:
        return 0.0
    octave, down = divmod(kind - 1, 2)
    edge = EDGES[octave - 1] if octave else -np.inf
    for least, harm in ((8.0, 0.3 if down else 0.7), (4.0, 0.2), (2.0, 0.1), (-1.0, 0.02), (-5.0, 0.01)):
        if edge >= least:
            return harm
    return 0.004


def _harm(up: int, down: int) -> float:
    return 0.7 if up else 0.02 + 0.03 * min(down, 5)


def _alone(cell: Cell) -> bool:
    """Whether each word of a cell is read by itself, and stands for one value."""
    site: Sized = cell.site
    return cell.packed is None and site.is_even and site.words == site.values


def _choose(total: float, count: FloatArray) -> FloatArray:
    return np.asarray(gammaln(total + 1) - gammaln(count + 1) - gammaln(total - count + 1))


def _buckets(most: int) -> list[tuple[int, int]]:
    starts = [border for border in _BORDERS if border <= most]
    return list(zip(starts, [*starts[1:], most + 1], strict=True))


def _between(first: int, end: int, most: int) -> str:
    return f"{first}" if end == first + 1 else f"{first} or more" if end > most else f"{first} to {end - 1}"
