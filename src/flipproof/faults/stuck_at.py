"""Cells that always read the same value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from flipproof.errors import FaultModelError
from flipproof.faults._rates import check_rate, draw_at_rate, nothing_to_draw
from flipproof.faults.base import FaultModel
from flipproof.faults.sampling import TrialGenerator
from flipproof.spaces.contract import Faults, Space


@dataclass(frozen=True)
class StuckAt(FaultModel):
    """Cells that always read the same value: ageing, manufacturing defects.

    A stuck cell that already holds the value changes nothing, so about half the faults of a trial show: records carry
    both numbers, `faults` (cells stuck) and `flips` (bits that changed).

    Args:
        ber: stuck cells per stored bit, in [0, 1]; a sequence is a sweep.
        value: what they read, 0 or 1.
        exact: a fixed count, or independent cells.

    Raises:
        FaultModelError: on a rate outside [0, 1] or another value.

    Example:
        >>> import flipproof as fp
        >>> fp.StuckAt(1e-4, value=1).coordinates()
        {'ber': 0.0001, 'stuck_at': 1}
    """

    ber: float | Sequence[float]
    value: Literal[0, 1] = 1
    exact: bool = True
    swept: ClassVar[str] = "ber"

    def __post_init__(self) -> None:
        self._normalise(float, 0.0, 1.0, "a rate in [0, 1]")
        if self.value not in (0, 1):
            raise FaultModelError(f"StuckAt: value must be 0 or 1, got {self.value!r}")
        object.__setattr__(self, "value", int(self.value))

    def coordinates(self) -> dict[str, float | int]:
        """The columns ``ber`` and ``stuck_at``."""
        return {"ber": self._single(), "stuck_at": self.value}

    def repeats(self, space: Space) -> bool:
        """Only if the rate comes to no cell, or all of them."""
        return nothing_to_draw(self._single(), self.exact, space)

    def check(self, space: Space) -> None:
        """Warn where the rate rounds to no cell at all."""
        check_rate(self, self._single(), self.exact, space)

    def draw(self, space: Space, generator: TrialGenerator) -> Faults:
        """Distinct cells at this rate."""
        return Faults.drawn(draw_at_rate(self._single(), self.exact, space, generator), stuck=self.value)
