"""Random flips at a rate per stored bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from scipy.stats import binom

from flipproof.errors import FaultModelError
from flipproof.faults._rates import check_rate, draw_at_rate, nothing_to_draw
from flipproof.faults.base import FaultModel
from flipproof.faults.sampling import TrialGenerator
from flipproof.spaces.contract import Faults, Positions, Space


@dataclass(frozen=True)
class BitErrorRate(FaultModel):
    """Random bit flips at a rate per stored bit, the field's standard model.

    With ``exact=True`` every trial flips exactly round(ber × bits) distinct bits, uniformly among all subsets of that
    size; with ``exact=False`` every bit flips independently with probability ber, so the count is binomial. The count
    is taken over the whole fault space, never layer by layer: small layers are hit as often as their bits deserve.

    Args:
        ber: flips per stored bit, in [0, 1]; a sequence is a sweep.
        exact: fixed count or independent bits.
        spread: "bits" draws uniformly over bits. "layers" first draws a layer uniformly for each flip, then one of
            its bits, as FORTUNE's code does (small layers are hit far more often per bit).
        nested: trial t of a lower rate flips some of the bits that trial t of a higher one flips (common random
            numbers: Kleijnen, Statistical Techniques in Simulation, 1974). Each rate by itself is drawn as without;
            the difference between two rates is known far better, see `Assessment.steps`.

    Raises:
        FaultModelError: on a rate outside [0, 1], an empty sweep or a repeated point, and on nested with
            ``spread="layers"``.

    Example:
        >>> import flipproof as fp
        >>> fp.BitErrorRate([1e-6, 1e-5]).points()[1]
        BitErrorRate(ber=1e-05, exact=True, spread='bits')
    """

    ber: float | Sequence[float]
    exact: bool = True
    spread: Literal["bits", "layers"] = "bits"
    nested: bool = False
    swept: ClassVar[str] = "ber"

    def __post_init__(self) -> None:
        self._normalise(float, 0.0, 1.0, "a rate in [0, 1]")
        if self.spread not in ("bits", "layers"):
            raise FaultModelError(f"BitErrorRate: spread must be 'bits' or 'layers', got {self.spread!r}")
        if self.nested not in (True, False):
            raise FaultModelError(f"BitErrorRate: nested must be True or False, got {self.nested!r}")
        if self.nested and self.spread != "bits":
            raise FaultModelError(f"BitErrorRate: nested=True takes spread='bits', got spread={self.spread!r}")

    def __repr__(self) -> str:
        """What rebuilds it; it names the random numbers of points that are not nested, so it says no more than that."""
        nested = ", nested=True" if self.nested else ""
        return f"BitErrorRate(ber={self.ber!r}, exact={self.exact!r}, spread={self.spread!r}{nested})"

    @property
    def stream(self) -> str:
        """Nested rates share their random numbers."""
        return repr(replace(self, ber=0.0)) if self.nested else repr(self)

    def repeats(self, space: Space) -> bool:
        """Only if the rate comes to no bit, or all of them."""
        return nothing_to_draw(self._single(), self.exact, space)

    def check(self, space: Space) -> None:
        """Warn where the rate rounds to no flip at all."""
        check_rate(self, self._single(), self.exact, space)

    def draw(self, space: Space, generator: TrialGenerator) -> Faults:
        """Distinct bits at this rate."""
        ber = self._single()
        if self.nested:
            return Faults.drawn(_nested(ber, self.exact, space, generator))
        if self.spread == "bits":
            return Faults.drawn(draw_at_rate(ber, self.exact, space, generator))
        count = round(ber * space.bits) if self.exact else generator.bernoulli(ber, space.bits).size
        return Faults(_spread_over_layers(count, space, generator))


def _nested(ber: float, exact: bool, space: Space, generator: TrialGenerator) -> Positions:
    """The first bits of one random order of all; how many follows from one uniform number, and grows with the rate."""
    count = round(ber * space.bits)
    if not exact:
        uniform = (int(generator.below(2**53, 1)[0]) + 0.5) / 2**53
        count = int(binom.ppf(uniform, space.bits, ber))
    return generator.nested(count, space.bits)


def _spread_over_layers(count: int, space: Space, generator: TrialGenerator) -> Positions:
    """`count` distinct bits: a layer uniformly, then a bit of it; a layer with every bit taken is passed over."""
    room = np.array([sum(last - first for first, last in spans) for spans in space.layers.values()])
    per_layer = np.zeros(room.size, np.int64)
    while (missing := count - int(per_layer.sum())) > 0:
        open_layers = np.flatnonzero(per_layer < room)
        chosen = open_layers[generator.below(open_layers.size, missing)]
        per_layer = np.minimum(per_layer + np.bincount(chosen, minlength=room.size), room)
    drawn = []
    for spans, hits, size in zip(space.layers.values(), per_layer.tolist(), room.tolist(), strict=True):
        inside = generator.distinct(hits, size)
        start = 0
        for first, last in spans:
            part = inside[(inside >= start) & (inside < start + last - first)]
            drawn.append(part - start + first)
            start += last - first
    return np.sort(np.concatenate(drawn)) if drawn else np.empty(0, np.int64)
