"""How many bits a rate comes to."""

from __future__ import annotations

import warnings

from flipproof.errors import FlipproofWarning
from flipproof.faults.base import FaultModel
from flipproof.faults.sampling import TrialGenerator
from flipproof.spaces.contract import Positions, Space


def draw_at_rate(ber: float, exact: bool, space: Space, generator: TrialGenerator) -> Positions:
    """The bits of one trial at this rate: a fixed number of them, or each by itself."""
    if exact:
        return generator.distinct(round(ber * space.bits), space.bits)
    return generator.bernoulli(ber, space.bits)


def nothing_to_draw(ber: float, exact: bool, space: Space) -> bool:
    """Whether the rate comes to no bit, or to all."""
    return ber in (0.0, 1.0) or (exact and round(ber * space.bits) in (0, space.bits))


def check_rate(model: FaultModel, ber: float, exact: bool, space: Space) -> None:
    """Warn where the rate rounds to no bit at all."""
    expected = ber * space.bits
    if exact and round(expected) == 0 and ber > 0:
        warnings.warn(
            f"{model!r} hits no bit at all: {ber:g} × {space.bits:,} bits = {expected:.3g} expected flips, which "
            f"rounds to 0. The point runs once, fault-free; raise the rate, or pass exact=False to draw 0, 1, 2, … "
            f"flips a trial.",
            FlipproofWarning,
            stacklevel=4,
        )
