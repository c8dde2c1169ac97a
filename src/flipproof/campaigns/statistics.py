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


def mean_interval(values: ArrayLike, *, confidence: float = 0.95, bounds: Interval | None = None) -> Interval:
    """Interval of the mean over trials (samples within a trial share its faults and are not independent).

    Student's t over trials. t only knows what was seen; flips are mostly harmless and rarely fatal, so that a few
    hundred trials may show no fatal one at all and t would claim near certainty. For a quantity that cannot leave
    `bounds` the interval is therefore never narrower than what is certain about trials not seen: a share of them up to
    q = 1 − ((1 − confidence) / 2)^(1/n) (Clopper-Pearson for 0 of n) may lie anywhere within the bounds and take the
    mean with it, down to mean − q·(mean − lower) and up to mean + q·(upper − mean).

    Args:
        values: one a trial.
        confidence: of the interval.
        bounds: lowest and highest possible value, (0, 1) for shares; None if there are none.

    Returns:
        (low, high); (nan, nan), nothing is known, for fewer than two trials, for values that are not finite, and for
        agreeing trials of an unbounded quantity.

    Example:
        >>> [round(bound, 4) for bound in mean_interval([0.9, 0.8, 1.0], bounds=(0, 1))]
        [0.2632, 1.0]
        >>> [round(bound, 4) for bound in mean_interval([0.0] * 100, bounds=(0, 1))]  # no critical trial seen in 100
        [0.0, 0.0362]
    """
    x = np.asarray(values, np.float64)
    if x.size < 2 or not bool(np.isfinite(x).all()):
        return (float("nan"), float("nan"))
    mean = float(x[0]) if float(np.ptp(x)) == 0.0 else float(x.mean())
    half = float(stats.t.ppf((1 + confidence) / 2, x.size - 1) * x.std(ddof=1) / x.size**0.5)
    if bounds is None:
        return (mean - half, mean + half) if float(np.ptp(x)) else (float("nan"), float("nan"))
    return _with_unseen((mean - half, mean + half), mean, x.size, confidence, bounds)


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, bounds: Interval | None = None, resamples: int = 2000
) -> Interval:
    """Bias-corrected bootstrap interval of the mean over trials, for skewed metrics such as AUROC.

    Resampling is seeded, so equal records give equal intervals. Trials not seen widen it as they widen
    `mean_interval`, which also answers where all trials agree or there are fewer than two.

    Example:
        >>> low, high = bootstrap_interval([0.9, 0.5, 0.92, 0.91, 0.89])
        >>> 0.5 < low < 0.824 < high < 0.92
        True
    """
    x = np.asarray(values, np.float64)
    if x.size < 2 or not bool(np.isfinite(x).all()) or float(np.ptp(x)) == 0.0:
        return mean_interval(x, confidence=confidence, bounds=bounds)
    result = stats.bootstrap(
        (x,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    seen = (float(result.confidence_interval.low), float(result.confidence_interval.high))
    return seen if bounds is None else _with_unseen(seen, float(x.mean()), x.size, confidence, bounds)


def difference_interval(mean: float, interval: Interval, other_mean: float, other: Interval) -> Interval:
    """Interval of `mean` − `other_mean` for two independent means that have intervals of their own.

    The distances to the bounds add as squares (MOVER; Zou and Donner, Statistics in Medicine 2008): for two t intervals
    that is about Welch's, and what widened either of them widens the difference.

    Example:
        >>> [round(bound, 3) for bound in difference_interval(0.9, (0.87, 0.93), 0.5, (0.46, 0.54))]
        [0.35, 0.45]
    """
    difference = mean - other_mean
    below = ((mean - interval[0]) ** 2 + (other[1] - other_mean) ** 2) ** 0.5
    above = ((interval[1] - mean) ** 2 + (other_mean - other[0]) ** 2) ** 0.5
    return (difference - below, difference + above)


def _with_unseen(seen: Interval, mean: float, n: int, confidence: float, bounds: Interval) -> Interval:
    unseen = 1 - ((1 - confidence) / 2) ** (1 / n)
    low = min(seen[0], mean - unseen * (mean - bounds[0]))
    high = max(seen[1], mean + unseen * (bounds[1] - mean))
    return (max(float(bounds[0]), low), min(float(bounds[1]), high))


def half_width(interval: Interval) -> float:
    """Half of an interval's width; nan if it is unknown."""
    return (interval[1] - interval[0]) / 2


def all_within(intervals: Sequence[Interval], margin: float) -> bool:
    """True if every interval is known and no wider than ± margin."""
    return all(half_width(interval) <= margin for interval in intervals)
