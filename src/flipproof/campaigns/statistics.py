"""How many trials are enough, and how far a mean over trials can be off."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from flipproof.errors import FaultModelError

Interval = tuple[float, float]


def sample_size(population: int, *, margin: float = 0.01, confidence: float = 0.95, p: float = 0.5) -> int:
    """Injections needed to estimate a proportion of a finite fault population.

    n = N / (1 + e² (N − 1) / (t² p (1 − p))), rounded up (Leveugle et al., DATE 2009; PAPERS: deepvigor, Eq. 7), with
    t the two-sided normal quantile.

    Args:
        population: number of possible faults N.
        margin: half-width e of the interval, as a fraction.
        confidence: of the interval.
        p: the expected proportion; 0.5 is the worst case.

    Returns:
        A whole number of injections, at most `population`.

    Raises:
        FaultModelError: on arguments out of range.

    Example:
        >>> import flipproof as fp
        >>> fp.sample_size(1_000_000), fp.sample_size(100)
        (9513, 99)
    """
    if population < 1 or not 0 < margin < 1 or not 0 < confidence < 1 or not 0 < p < 1:
        raise FaultModelError(
            f"sample_size needs population ≥ 1 and margin, confidence and p in (0, 1), got population={population}, "
            f"margin={margin}, confidence={confidence}, p={p}"
        )
    t = float(stats.norm.ppf((1 + confidence) / 2))
    needed = population / (1 + margin**2 * (population - 1) / (t**2 * p * (1 - p)))
    return min(ceil(needed), population)


def wilson_interval(successes: float, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a proportion, for independent samples each with a fault of its own.

    Example:
        >>> [round(bound, 4) for bound in wilson_interval(8, 10)]
        [0.4902, 0.9433]
    """
    if n < 1:
        return (float("nan"), float("nan"))
    z = float(stats.norm.ppf((1 + confidence) / 2))
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return (max(0.0, centre - half), min(1.0, centre + half))


def mean_interval(values: ArrayLike, *, confidence: float = 0.95, bounded: bool = False) -> Interval:
    """Interval of the mean over trials (samples within a trial share its faults and are not independent).

    Student's t over trials. For a quantity that cannot leave [0, 1] the interval is cut to it, and where all n trials
    agree, so that t would claim no uncertainty at all, it says what is certain: at most a share q of all possible
    trials differs, q = 1 − ((1 − confidence) / 2)^(1/n) (Clopper-Pearson for 0 of n), and those may lie anywhere in
    [0, 1]. Fewer than two trials, or agreeing trials of an unbounded quantity, give (nan, nan): nothing is known.

    Example:
        >>> [round(bound, 4) for bound in mean_interval([0.9, 0.8, 1.0], bounded=True)]
        [0.6516, 1.0]
        >>> [round(bound, 4) for bound in mean_interval([0.0] * 100, bounded=True)]  # no critical trial seen in 100
        [0.0, 0.0362]
    """
    x = np.asarray(values, np.float64)
    if x.size < 2 or not bool(np.isfinite(x).all()):
        return (float("nan"), float("nan"))
    mean = float(x.mean())
    if float(np.ptp(x)) == 0.0:
        return _agreement(float(x[0]), x.size, confidence) if bounded else (float("nan"), float("nan"))
    half = float(stats.t.ppf((1 + confidence) / 2, x.size - 1) * x.std(ddof=1) / x.size**0.5)
    if bounded:
        return (max(0.0, mean - half), min(1.0, mean + half))
    return (mean - half, mean + half)


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, bounded: bool = False, resamples: int = 2000
) -> Interval:
    """Bias-corrected bootstrap interval of the mean over trials, for skewed metrics such as AUROC.

    Resampling is seeded, so equal records give equal intervals. Where all trials agree, or there are fewer than two,
    it answers as `mean_interval` does.

    Example:
        >>> low, high = bootstrap_interval([0.9, 0.5, 0.92, 0.91, 0.89])
        >>> 0.5 < low < 0.824 < high < 0.92
        True
    """
    x = np.asarray(values, np.float64)
    if x.size < 2 or not bool(np.isfinite(x).all()) or float(np.ptp(x)) == 0.0:
        return mean_interval(x, confidence=confidence, bounded=bounded)
    result = stats.bootstrap(
        (x,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    return (float(result.confidence_interval.low), float(result.confidence_interval.high))


def _agreement(value: float, n: int, confidence: float) -> Interval:
    unseen = 1 - ((1 - confidence) / 2) ** (1 / n)
    return (value * (1 - unseen), value + (1 - value) * unseen)


def half_width(interval: Interval) -> float:
    """Half of an interval's width; nan if it is unknown."""
    return (interval[1] - interval[0]) / 2


def all_within(intervals: Sequence[Interval], margin: float) -> bool:
    """True if every interval is known and no wider than ± margin."""
    return all(half_width(interval) <= margin for interval in intervals)
