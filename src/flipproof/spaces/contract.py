"""What every space of bits that can be hit has in common, and what a trial draws from one.

A new space is one file: a subclass of `Space`, and the `Where` with which a user asks for it.
`flipproof.testing.SpaceContract` is the suite it has to pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from flipproof.errors import FaultModelError, FaultSpaceError
from flipproof.formats.base import Format
from flipproof.formats.layout import Layout

if TYPE_CHECKING:
    import pandas as pd

Positions = NDArray[np.int64]
"""Global bit numbers of a space."""


class WordOutcomes(NamedTuple):
    """How the stored words that faults hit were read; words of a block that is decoded together count as one.

    Attributes:
        corrected: as without faults.
        detected: as the value that the format states for what it cannot repair.
        miscorrected: as another value, and nothing noticed it. All changed words of formats without redundancy are.
    """

    corrected: int = 0
    detected: int = 0
    miscorrected: int = 0


Forwards = Sequence[tuple[Callable[[], object], int]]
"""One function a batch that runs the model on it, and the samples of that batch."""


@dataclass(frozen=True, eq=False)
class Draw:
    """What one trial drew: global bit numbers of a space. Indices, never tensors."""

    positions: Positions

    def __len__(self) -> int:
        return int(self.positions.size)

    @property
    def digest(self) -> str:
        """Sixteen hex digits that tell this draw from any other; records carry it."""
        return _digest(self.positions, None)


@dataclass(frozen=True, eq=False)
class Faults(Draw):
    """Distinct bits of a fault space and what happens to them.

    Args:
        positions: global bit numbers, whole, from 0, strictly ascending; `FaultSpace.locate` names them, and
            `FaultSpace.faults` makes them of names in any order.
        stuck: None if the bits flip, else the value (0 or 1) they are stuck at.

    Raises:
        FaultModelError: if a position is named twice, they do not ascend, or are no whole numbers from 0.

    Example:
        >>> len(Faults(np.array([3, 40, 700])))
        3
        >>> Faults(np.array([40, 3, 40, 700]))
        Traceback (most recent call last):
            ...
        flipproof.errors.FaultModelError: Faults: positions must ascend, each bit once, got 3 behind 40
    """

    stuck: Literal[0, 1] | None = None

    def __post_init__(self) -> None:
        positions = _whole(self.positions, "Faults")
        object.__setattr__(self, "positions", positions)
        if positions.size > 1 and not (positions[1:] > positions[:-1]).all():
            i = int(np.argmin(positions[1:] > positions[:-1]))
            raise FaultModelError(
                f"Faults: positions must ascend, each bit once, got {positions[i + 1]} behind {positions[i]}"
            )
        if positions.size and positions[0] < 0:
            raise FaultModelError(f"Faults: positions count from 0, got {positions[0]}")
        if self.stuck is not None and (isinstance(self.stuck, bool) or self.stuck not in (0, 1)):
            raise FaultModelError(f"Faults: stuck must be None, 0 or 1, got {self.stuck!r}")

    @classmethod
    def drawn(cls, positions: Positions, stuck: Literal[0, 1] | None = None) -> Self:
        """Of positions that a generator has just made: they are distinct and ascend, which is not checked again.

        >>> Faults.drawn(np.array([3, 40])).positions.tolist()
        [3, 40]
        """
        made = object.__new__(cls)
        made.__dict__.update(positions=positions, stuck=stuck)
        return made

    @property
    def digest(self) -> str:
        return _digest(self.positions, self.stuck)


@dataclass(frozen=True, eq=False)
class Upsets(Draw):
    """Single upsets: a bit of a neuron space for each sample, in the order of the samples.

    Two samples may be hit in the same bit: they are computed apart.

    Args:
        positions: global bit numbers, whole, from 0; `NeuronSpace.places` names them.

    Raises:
        FaultModelError: if a position is no whole number from 0.
    """

    def __post_init__(self) -> None:
        positions = _whole(self.positions, "Upsets")
        object.__setattr__(self, "positions", positions)
        if positions.size and int(positions.min()) < 0:
            raise FaultModelError(f"Upsets: positions count from 0, got {positions.min()}")


def _digest(positions: Positions, stuck: int | None) -> str:
    return blake2b(positions.tobytes() + repr(stuck).encode(), digest_size=8).hexdigest()


def _whole(positions: object, what: str) -> Positions:
    """Positions as int64 in one dimension, which they must be already, but for the width of the integers."""
    found = np.asarray(positions)
    if found.dtype == np.int64 and found.ndim == 1:
        return found
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise FaultModelError(
            f"{what}: positions are whole numbers in one dimension, got {found.dtype} of shape {found.shape}"
        )
    if found.size and int(found.max()) > np.iinfo(np.int64).max:
        raise FaultModelError(f"{what}: positions are int64, got {found.max()}")
    return found.astype(np.int64)


class Sized:
    """One tensor of a space, all its values in one format: how many bits there are, and which is which.

    Attributes:
        name: what it is called in records.
        layer: qualified name of the module that it belongs to.
        kind: "weight", "bias", "norm", "buffer" or "other"; "scale" or "zero_point" of a quantised layer; "neuron" for
            computed values.
        shape: of its values.
        format: how they are stored.
        offset: number of its first bit in the space. Bit b of value v is `offset + v · width + b`; where words of a
            block differ in width, they lie one behind the other just so (`layout`).
    """

    name: str
    layer: str
    kind: str
    shape: tuple[int, ...]
    format: Format
    offset: int

    @property
    def values(self) -> int:
        """Number of values stored here."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def words(self) -> int:
        """Number of words: one a value, and behind them those of constants that the format stores."""
        return self.values + self.format.constant_words(self.shape)

    @property
    def width(self) -> int:
        """Stored bits a value; of the widest word, where check bits of a block make words differ."""
        return self.format.width

    @property
    def bits(self) -> int:
        """Stored bits in all."""
        return self.words * self.width if self.is_even else self.layout.bits

    @property
    def is_even(self) -> bool:
        """Whether every word is `width` bits wide."""
        return self.format.together == 1

    @cached_property
    def layout(self) -> Layout:
        """Which of the words' bits are stored, one behind the other."""
        return Layout.even(self.words, self.width) if self.is_even else self.format.layout(self.words)

    def locate(self, bits: Positions) -> tuple[Positions, Positions]:
        """(word, bit of it) of bits of this site, counted from its first; word v is value v, and then constants."""
        if self.is_even:
            value, bit = np.divmod(bits, self.width)
            return value, bit
        return self.layout.locate(bits)

    def positions(self, bit: int) -> Positions:
        """Bit `bit` of every word that has one, counted from the site's first, ascending."""
        values = np.arange(self.words, dtype=np.int64)
        if self.is_even:
            return values * self.width + bit if bit < self.width else values[:0]
        wide = values[self.layout.width(values) > bit]
        return self.layout.first(wide) + bit


@dataclass(frozen=True)
class Start:
    """Where the faults of a draw act first: what runs before is as without faults.

    Attributes:
        names: tensors that are hit, with all their names; nothing changes before their first use.
        rows: the first and the last slice of axis 0 that is hit, where it is known and one tensor is hit. Or
        layer: the module whose output is hit, and
        change: makes the faulty output of the golden one.
        plain: whether layers behind it give what they compute: no format stores it, and nothing else is hit.
        site: the value that is hit, where no module gives it; a trace may hold it (`Space.traced`).
    """

    names: Sequence[str] = ()
    rows: tuple[int, int] | None = None
    layer: str | None = None
    change: Callable[[Any], Any] | None = None
    plain: bool = False
    site: str | None = None


class Space(ABC):
    """Every bit of one kind of memory that can be hit, numbered from 0: tensor by tensor, value by value, bit 0 first.

    A space of its own sets the attributes and gives `corrupted` and `again`. What else it gives follows from them
    where faults in memory are the same for all samples, and no run can start behind the first layer.

    Attributes:
        sites: the tensors that the bits belong to, in the order of their numbers.
        bits: how many bits there are.
        left_out: what could be thought to be in the space and is not, and why.
        left_out_bits: bits of all that.
    """

    sites: Sequence[Sized]
    bits: int
    left_out: Mapping[str, str]
    left_out_bits: int

    @abstractmethod
    def corrupted(self, draw: Draw) -> AbstractContextManager[int]:
        """While active, these faults are in place; afterwards not a bit differs. Yields how many bits changed.

        Raises:
            FaultSpaceError: for draws of another kind, or outside the space.
        """

    @abstractmethod
    def again(self, model: nn.Module) -> Self:
        """The same space of a copy of the model."""

    @property
    def samples(self) -> int | None:
        """How many samples a draw has an upset for, one each; None where all samples share the faults."""
        return None

    @property
    def layers(self) -> dict[str, list[tuple[int, int]]]:
        """Each module that owns bits, with the ranges [first, last) it owns."""
        spans: dict[str, list[tuple[int, int]]] = {}
        for site in self.sites:
            spans.setdefault(site.layer, []).append((site.offset, site.offset + site.bits))
        return spans

    @property
    def coverage(self) -> float:
        """Bits in the space ÷ these and `left_out_bits`."""
        return self.bits / (self.bits + self.left_out_bits)

    def shortfall(self) -> str | None:
        """A sentence on what is missing, if more than 1 % is outside without being asked for."""
        return None

    def locate(self, draw: Draw) -> pd.DataFrame:
        """Where faults lie: one row a bit with its `site`, `value` (flat index) and `bit`."""
        which, value, bit = self.located(draw.positions)
        names = np.array([site.name for site in self.sites], dtype=object)[which]
        import pandas as pd  # no draw needs it

        return pd.DataFrame({"site": names, "value": value, "bit": bit})

    def places(self, draw: Draw) -> list[tuple[str, int, int]]:
        """The same as plain (name, value, bit): for a few faults far quicker than a table."""
        which, value, bit = (column.tolist() for column in self.located(draw.positions))
        return [(self.sites[i].name, v, b) for i, v, b in zip(which, value, bit, strict=True)]

    def located(self, positions: Positions) -> tuple[Positions, Positions, Positions]:
        """Number of the site, number of the value in it, and bit of its word."""
        firsts, widths, uneven = self._numbers
        which = np.searchsorted(firsts, positions, side="right") - 1
        inside = positions - firsts[which]
        value, bit = np.divmod(inside, widths[which])
        for i in uneven:
            here = which == i
            value[here], bit[here] = self.sites[i].locate(inside[here])
        return which, value, bit

    @cached_property
    def _numbers(self) -> tuple[Positions, Positions, list[int]]:
        """First bit and width of each site, and which sites have words of several widths."""
        firsts = np.array([site.offset for site in self.sites], np.int64)
        widths = np.array([site.width for site in self.sites], np.int64)
        return firsts, widths, [i for i, site in enumerate(self.sites) if not site.is_even]

    def stored(self) -> AbstractContextManager[None]:
        """While active, the model computes with what its formats can represent."""
        return nullcontext()

    def originals(self) -> dict[str, Tensor]:
        """While `stored()`: the values that its formats replaced, by qualified name."""
        return {}

    def begin(self, batch: int, made: Mapping[str, int] | None = None) -> None:  # noqa: B027  # most spaces need not know
        """A run of this batch starts; `made` says how often layers were called before the place it starts at."""

    @property
    def word_outcomes(self) -> WordOutcomes | None:
        """How the words hit by the latest draw were read; None for spaces that hold no words."""
        return None

    @property
    def as_stored(self) -> bool:
        """Whether, with the faults in place, the model computes with the bits that it has without faults.

        A code may repair all that was hit. False where that is not known.
        """
        return False

    def only(self, rows: Sequence[int]) -> AbstractContextManager[None]:
        """While active, only these rows of the batch are hit, where each has an upset of its own.

        Raises:
            FaultSpaceError: where all samples of a batch share the faults.
        """
        raise FaultSpaceError("faults in memory hit every sample of a batch")

    def layer_of(self, draw: Draw) -> str | None:
        """The layer that all upsets of a draw share; None where a draw may hit any."""
        return None

    def start(self, draw: Draw) -> Start:
        """Where these faults act first."""
        return Start()

    def traced(self, nodes: Sequence[Any]) -> Mapping[str, Any]:
        """Where a trace of the model (`torch.fx` nodes) holds sites that no module gives, by their names."""
        return {}

    def agreeing(self, forward: Callable[[], object], held: Mapping[str, Tensor]) -> set[str]:
        """Which of these sites have, while `forward` runs the model, the bits that a trace of it has."""
        return set()

    def starts(self) -> Mapping[str, int] | None:
        """Layers right behind whose outputs runs may start, with their bits; None where that depends on the draw."""
        return {}


class Where(ABC):
    """What `assess(where=…)` takes for a space of one's own: a frozen dataclass, whose repr goes into the journal."""

    @abstractmethod
    def space(self, model: nn.Module, format: Format | Mapping[str, Format] | None, forwards: Forwards) -> Space:
        """The space of a model.

        Args:
            model: in eval mode; what `forwards` writes to it is put back.
            format: as `assess` was given it.
            forwards: the batches, for spaces of what is computed; those of what is stored need them not.
        """
