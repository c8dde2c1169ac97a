"""What every space of bits that can be hit has in common, and what a trial draws from one.

A new space is one file: a class with what `Space` names, and in `sites.py` what a user asks for it with.
`flipproof.testing.SpaceContract` is the suite it has to pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from flipproof.errors import FaultModelError
from flipproof.formats.base import Format
from flipproof.formats.layout import Layout

Positions = NDArray[np.int64]
"""Global bit numbers of a space."""


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
        kind: "weight", "bias", "norm", "buffer" or "other"; "neuron" for computed values.
        shape: of its values.
        format: how they are stored.
        offset: number of its first bit in the space. Bit b of value v is `offset + v · width + b`; where words of a
            block differ in width, they lie one behind the other just so (`layout`).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    format: Format
    offset: int

    @property
    def values(self) -> int:
        """Number of values stored here."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def width(self) -> int:
        """Stored bits a value; of the widest word, where check bits of a block make words differ."""
        return self.format.width

    @property
    def bits(self) -> int:
        """Stored bits in all."""
        return self.values * self.width if self.is_even else self.layout.bits

    @property
    def is_even(self) -> bool:
        """Whether every word is `width` bits wide."""
        return self.format.together == 1

    @cached_property
    def layout(self) -> Layout:
        """Which of the words' bits are stored, one behind the other."""
        return Layout.even(self.values, self.width) if self.is_even else self.format.layout(self.values)

    def locate(self, bits: Positions) -> tuple[Positions, Positions]:
        """(value, bit of its word) of bits of this site, counted from its first."""
        if self.is_even:
            value, bit = np.divmod(bits, self.width)
            return value, bit
        return self.layout.locate(bits)

    def positions(self, bit: int) -> Positions:
        """Bit `bit` of every value that has one, counted from the site's first, ascending."""
        values = np.arange(self.values, dtype=np.int64)
        if self.is_even:
            return values * self.width + bit if bit < self.width else values[:0]
        wide = values[self.layout.width(values) > bit]
        return self.layout.first(wide) + bit


@dataclass(frozen=True)
class Start:
    """Where the faults of a draw act first: what runs before is as without faults.

    Attributes:
        names: tensors that are hit, with all their names; nothing changes before their first use. Or
        layer: the module whose output is hit, and
        change: makes the faulty output of the golden one.
    """

    names: Sequence[str] = ()
    layer: str | None = None
    change: Callable[[Any], Any] | None = None


class Space(Protocol):
    """Every bit of one kind of memory that can be hit, numbered from 0."""

    @property
    def sites(self) -> Sequence[Sized]:
        """What the bits belong to, in the order of their numbers."""

    @property
    def bits(self) -> int:
        """How many bits there are."""

    @property
    def layers(self) -> Mapping[str, Sequence[tuple[int, int]]]:
        """Each module that owns bits, with the ranges [first, last) it owns."""

    @property
    def samples(self) -> int | None:
        """How many samples a draw has an upset for, one each; None where all samples share the faults."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """What could be thought to be in the space and is not, and why."""

    @property
    def left_out_bits(self) -> int:
        """Bits of all that."""

    @property
    def coverage(self) -> float:
        """Bits in the space ÷ these and `left_out_bits`."""

    def shortfall(self) -> str | None:
        """A sentence on what is missing, if more than 1 % is outside without being asked for."""

    def stored(self) -> AbstractContextManager[None]:
        """While active, the model computes with what its formats can represent."""

    def corrupted(self, draw: Draw) -> AbstractContextManager[int]:
        """While active, these faults are in place; afterwards not a bit differs. Yields how many bits changed.

        Raises:
            FaultSpaceError: for draws of another kind, or outside the space.
        """

    def begin(self, batch: int, made: Mapping[str, int] | None = None) -> None:
        """A run of this batch starts; `made` says how often layers were called before the place it starts at."""

    def only(self, rows: Sequence[int]) -> AbstractContextManager[None]:
        """While active, only these rows of the batch are hit, where each has an upset of its own."""

    def places(self, draw: Draw) -> list[tuple[str, int, int]]:
        """The faults as (name, value, bit)."""

    def layer_of(self, draw: Draw) -> str | None:
        """The layer that all upsets of a draw share; None where a draw may hit any."""

    def start(self, draw: Draw) -> Start:
        """Where these faults act first."""

    def starts(self) -> Mapping[str, int] | None:
        """Layers right behind whose outputs runs may start, with their bits; None where that depends on the draw."""

    def originals(self) -> Mapping[str, Tensor]:
        """Tensors of the model that its formats replaced, as they were, by name."""

    def again(self, model: nn.Module) -> Self:
        """The same space of a copy of the model."""
