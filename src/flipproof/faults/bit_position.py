"""One bit position, in every value or in some."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flipproof.errors import FaultModelError
from flipproof.faults.base import FaultModel, upset_each
from flipproof.faults.sampling import TrialGenerator
from flipproof.spaces.contract import Draw, Faults, Space


@dataclass(frozen=True)
class BitPosition(FaultModel):
    """One bit position flipped in every value of the space, a point a bit: which bit is critical?

    With every value hit nothing is random, so one trial a point says everything and its interval has no width. Values
    stored in fewer bits than the position have no such bit and stay as they are.

    Flipping a constant exponent bit in *every* value multiplies all of them by one factor, which a network may hardly
    notice; `share` hits a random part of the values instead, as memory faults do.

    Args:
        bits: a position (0 is the least significant) or several.
        share: of the values that are hit, in (0, 1]; at least one value is.

    Raises:
        FaultModelError: on a negative position or one that no value has, or a share outside (0, 1].

    Example:
        >>> import flipproof as fp
        >>> len(fp.BitPosition(range(32)).points())
        32
    """

    bits: int | Iterable[int]
    share: float = 1.0
    swept: ClassVar[str] = "bits"

    def __post_init__(self) -> None:
        self._normalise(int, 0, 63, "a bit position from 0 to 63")
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise FaultModelError(f"BitPosition: share must be in (0, 1], got {self.share!r}")
        object.__setattr__(self, "share", float(self.share))

    def coordinates(self) -> dict[str, float | int]:
        """The column ``bit``."""
        return {"bit": self._single()}

    @property
    def single_upset(self) -> bool:
        """Where samples are computed apart, one value of each is hit."""
        return True

    def repeats(self, space: Space) -> bool:
        """Where every value is hit, nothing is drawn at random."""
        return space.samples is None and self.share == 1.0

    def check(self, space: Space) -> None:
        """Raise where no value is that wide."""
        widest = max(site.width for site in space.sites)
        if self._single() >= widest:
            raise FaultModelError(f"{self!r}: the widest stored value has {widest} bits, so bits 0 to {widest - 1}")

    def draw(self, space: Space, generator: TrialGenerator) -> Draw:
        """That bit of every value, or of a random share of them; where samples are computed apart, of one for each."""
        bit = self._single()
        if space.samples is not None:
            return upset_each(space, generator, bit)
        hit = np.concatenate([s.offset + s.positions(bit) for s in space.sites if bit < s.width])
        if self.share < 1.0:
            hit = hit[generator.distinct(max(1, round(self.share * hit.size)), hit.size)]
        return Faults(hit)
