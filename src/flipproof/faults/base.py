"""Fault models: which bits of a fault space are hit in one trial."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from flipproof.errors import FaultModelError
from flipproof.faults.sampling import TrialGenerator
from flipproof.spaces.contract import Draw, Space, Upsets


@dataclass(frozen=True)
class FaultModel(ABC):
    """Draws `Faults` from a fault space with a given generator.

    A new fault model is a frozen dataclass whose first field may be a sweep: give `draw` for a single point and name
    the field in `swept`. `flipproof.testing.FaultModelContract` is the suite it has to pass.
    """

    swept: ClassVar[str]
    """The field that may hold several values: each is one point of a campaign and one column of its records."""

    @property
    def single_upset(self) -> bool:
        """Whether this point is one upset, so that each sample of a trial can have one of its own."""
        return False

    @property
    def stream(self) -> str:
        """Names the random numbers of this point's trials: points of one name draw from the same ones."""
        return repr(self)

    @abstractmethod
    def draw(self, space: Space, generator: TrialGenerator) -> Draw:
        """The faults of one trial: a function of space and generator alone.

        `Faults`, distinct bits; or `Upsets`, a bit for each of `space.samples`, where samples are computed apart.
        """

    def fits(self, space: Space) -> None:
        """Raise FaultModelError if samples are computed apart in this space, and this point is no single upset."""
        if space.samples is not None and not self.single_upset:
            raise FaultModelError(
                f"where=fp.Neurons() injects a single upset into each sample's inference: faults= takes "
                f"fp.RandomBits(1) or fp.BitPosition(bits), got {self!r}"
            )

    @abstractmethod
    def check(self, space: Space) -> None:
        """Raise FaultModelError if this point makes no sense for the space; warn if it does nothing."""

    def repeats(self, space: Space) -> bool:
        """True if every trial of this point draws the same faults, so that one trial says everything."""
        return False

    def points(self) -> tuple[Self, ...]:
        """The sweep, one single-valued model a point."""
        return tuple(replace(self, **{self.swept: value}) for value in self._values())

    def coordinates(self) -> dict[str, float | int]:
        """The columns that tell this point's records from another's, e.g. ``{"ber": 1e-05}``."""
        return {self.swept: self._single()}

    def _values(self) -> tuple[Any, ...]:
        value = getattr(self, self.swept)
        return value if isinstance(value, tuple) else (value,)

    def _single(self) -> Any:
        value = getattr(self, self.swept)
        if not isinstance(value, tuple):
            return value
        values = self._values()
        if len(values) != 1:
            raise FaultModelError(f"{self!r} is a sweep of {len(values)} points; draw from one of its .points()")
        return values[0]

    def _normalise(self, kind: type, low: float, high: float, what: str) -> None:
        """Turn the swept field into a plain number or a tuple of them, and check their range."""
        given = getattr(self, self.swept)
        several = isinstance(given, Iterable) and not isinstance(given, str)
        values = list(given) if several else [given]
        if not values:
            raise FaultModelError(f"{type(self).__name__} got an empty sweep: {self.swept}={given!r}")
        for value in values:
            try:
                fits = low <= value <= high and kind(value) == value
            except (TypeError, ValueError):
                fits = False
            if not fits or isinstance(value, bool):
                raise FaultModelError(f"{type(self).__name__}: {self.swept} must be {what}, got {value!r}")
        values = [kind(value) for value in values]
        if len(set(values)) != len(values):
            raise FaultModelError(f"{type(self).__name__}: {self.swept} names a point twice: {values}")
        object.__setattr__(self, self.swept, tuple(values) if several else values[0])


def upset_each(space: Space, generator: TrialGenerator, bit: int | None = None) -> Upsets:
    """One bit for each sample, all in the same site, which is drawn first, in proportion to its bits.

    So every sample's fault is uniform over the space; those of one trial share the site, which lets the trial start
    there, and are otherwise independent.

    Args:
        space: where samples are computed apart.
        generator: what draws.
        bit: this position of a random value; None for any bit.
    """
    assert space.samples is not None
    sizes = [s.bits if bit is None else s.words if bit < s.width else 0 for s in space.sites]
    borders = np.cumsum(sizes)
    chosen = space.sites[int(np.searchsorted(borders, generator.below(int(borders[-1]), 1)[0], side="right"))]
    if bit is None:
        return Upsets(chosen.offset + generator.below(chosen.bits, space.samples))
    return Upsets(chosen.offset + generator.below(chosen.values, space.samples) * chosen.width + int(bit))
