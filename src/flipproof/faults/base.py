"""Fault models: which bits of a fault space are hit in one trial."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from flipproof.errors import FaultModelError
from flipproof.faults.sampling import TrialGenerator
from flipproof.spaces.contract import Faults

if TYPE_CHECKING:
    from flipproof.spaces.parameters import FaultSpace


@dataclass(frozen=True)
class FaultModel(ABC):
    """Draws `Faults` from a fault space with a given generator.

    A new fault model is a frozen dataclass whose first field may be a sweep: give `draw` for a single point and name
    the field in `swept`. `flipproof.testing.FaultModelContract` is the suite it has to pass.
    """

    swept: ClassVar[str]
    """The field that may hold several values: each is one point of a campaign and one column of its records."""

    @abstractmethod
    def draw(self, space: FaultSpace, generator: TrialGenerator) -> Faults:
        """The faults of one trial. Distinct bits; a function of space and generator alone."""

    @abstractmethod
    def check(self, space: FaultSpace) -> None:
        """Raise FaultModelError if this point makes no sense for the space; warn if it does nothing."""

    def repeats(self, space: FaultSpace) -> bool:
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


def parameters_of(model: FaultModel) -> dict[str, Any]:
    """Field names and values, for messages and records."""
    return {field.name: getattr(model, field.name) for field in fields(model)}
