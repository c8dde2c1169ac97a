"""A fixed number of random bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from flipproof.errors import FaultModelError
from flipproof.faults.base import FaultModel, upset_each
from flipproof.faults.sampling import TrialGenerator
from flipproof.spaces.contract import Draw, Faults, Space


@dataclass(frozen=True)
class RandomBits(FaultModel):
    """A fixed number of distinct bits, uniform over the space: single and multiple upsets.

    Args:
        count: bits a trial, or several counts as a sweep.

    Raises:
        FaultModelError: on a negative count or more bits than the space has.

    Example:
        >>> import flipproof as fp
        >>> fp.RandomBits(1)
        RandomBits(count=1)
    """

    count: int | Sequence[int]
    swept: ClassVar[str] = "count"

    def __post_init__(self) -> None:
        self._normalise(int, 0, 2**62, "a whole number of bits")

    @property
    def single_upset(self) -> bool:
        """Whether one bit is hit."""
        return bool(self._single() == 1)

    def repeats(self, space: Space) -> bool:
        """Only if there is nothing to choose: no bit, or all of them."""
        return space.samples is None and self._single() in (0, space.bits)

    def check(self, space: Space) -> None:
        """Raise where the space has fewer bits."""
        if self._single() > space.bits:
            raise FaultModelError(f"{self!r}: the fault space has only {space.bits:,} bits")

    def draw(self, space: Space, generator: TrialGenerator) -> Draw:
        """That many distinct bits; where samples are computed apart, one for each."""
        if space.samples is not None:
            return upset_each(space, generator)
        return Faults.drawn(generator.distinct(self._single(), space.bits))
