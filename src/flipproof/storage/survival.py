"""The highest bit error rate that a stored form of a model survives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flipproof.campaigns.assessment import Assessment

LADDER = tuple(step * 10.0**power for power in range(-8, -1) for step in (1, 2, 3, 5))
"""Bit error rates that are tried: 1e-8, 2e-8, 3e-8, 5e-8, … 5e-2."""


CLEAR = 0.1
"""Accuracy: so far from what is asked for, one trial of a whole model says enough for a search."""


class Survival(NamedTuple):
    """What was found.

    Attributes:
        ber: the highest rate of the ladder at which the mean is at least what was asked for; 0.0 if there is none.
        accuracy: the mean there.
        next: the mean one rate above it; NaN at the end of the ladder.
    """

    ber: float
    accuracy: float
    next: float


def survival(
    campaign: Callable[[float, int], Assessment],
    least: float,
    *,
    trials: int,
    ladder: tuple[float, ...] = LADDER,
) -> Survival:
    """Bisect the ladder for the highest rate at which the mean accuracy is at least `least`.

    It takes for granted that accuracy falls with the rate. Where it does not, within the noise of few trials, the
    answer may be a step of the ladder off. One trial decides where it ends `CLEAR` away from `least`.

    Args:
        campaign: injects at one rate, so many trials.
        least: mean accuracy that is still enough, a fraction.
        trials: at a rate that one trial does not decide.
        ladder: rates, ascending.
    """
    means: dict[int, float] = {}

    def mean(index: int) -> float:
        if index not in means:
            means[index] = _mean(campaign(ladder[index], 1))
            if abs(means[index] - least) < CLEAR:
                means[index] = _mean(campaign(ladder[index], trials))
        return means[index]

    low, high = -1, len(ladder)
    while high - low > 1:
        middle = (low + high) // 2
        if mean(middle) >= least:
            low = middle
        else:
            high = middle
    nan = float("nan")
    return Survival(0.0 if low < 0 else ladder[low], means.get(low, nan), means.get(high, nan))


def _mean(found: Assessment) -> float:
    return float(found.summary["accuracy"].iloc[0])
