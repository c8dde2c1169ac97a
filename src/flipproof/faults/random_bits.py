"""A fixed number of random bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flipproof.errors import FaultModelError
from flipproof.faults.base import FaultModel
from flipproof.faults.sampling import TrialGenerator
from flipproof.spaces.contract import Faults

if TYPE_CHECKING:
    from flipproof.spaces.parameters import FaultSpace


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

    def repeats(self, space: FaultSpace) -> bool:
        """Only if there is nothing to choose: no bit, or all of them."""
        return self._single() in (0, space.bits)

    def check(self, space: FaultSpace) -> None:
        """Raise where the space has fewer bits."""
        if self._single() > space.bits:
            raise FaultModelError(f"{self!r}: the fault space has only {space.bits:,} bits")

    def draw(self, space: FaultSpace, generator: TrialGenerator) -> Faults:
        """That many distinct bits."""
        return Faults(generator.distinct(self._single(), space.bits))
