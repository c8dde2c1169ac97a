"""How many trials are enough, and how far a mean over trials can be off."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import ceil

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from flipproof.errors import FaultModelError

Interval = tuple[float, float]
FloatArray = NDArray[np.float64]


def sample_size(population: int, *, margin: float = 0.01, confidence: float = 0.95, p: float = 0.5) -> int:
    """Injections needed to estimate a proportion of a finite fault population.

    n = N / (1 + e² (N − 1) / (t² p (1 − p))), rounded up (Leveugle et al. 2009; Ahmadilivani et al. 2023, Eq. 7), with
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


MANY = 4096
"""Trials from which on equal values are counted once, with their number."""


def mean_interval(values: ArrayLike, *, confidence: float = 0.95, bounds: Interval | None = None) -> Interval:
    """Interval of the mean over trials (samples within a trial share its faults and are not independent).

    What `mean_intervals` says for one row; see there for the method and docs/results/coverage for its proof.

    Args:
        values: one a trial.
        confidence: of the interval.
        bounds: lowest and highest possible value, (0, 1) for shares; an end may be infinite; None if there are none.

    Returns:
        (low, high); (nan, nan), nothing is known, for fewer than two trials, for values that are not finite, and for
        agreeing trials of an unbounded quantity.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> [round(bound, 2) for bound in mean_interval(rng.normal(90, 0.2, 60), bounds=(0, 100))]
        [89.97, 90.06]
        >>> [round(bound, 4) for bound in mean_interval([0.0] * 100, bounds=(0, 1))]  # no critical trial seen in 100
        [0.0, 0.0362]
    """
    x = np.asarray(values, np.float64).reshape(-1)
    if x.size < 2 or not bool(np.isfinite(x).all()):
        return (float("nan"), float("nan"))
    weights = None
    if x.size >= MANY:
        values, counts = np.unique(x, return_counts=True)
        if 4 * values.size <= x.size:  # as shares of samples are
            x, weights = values, counts.astype(np.float64)
    low, high = _both_ends(x[None, :], weights, confidence, bounds)[0].tolist()
    return (low, high)


def mean_intervals(rows: FloatArray, *, confidence: float = 0.95, bounds: Interval | None = None) -> FloatArray:
    """Intervals of the means of many rows of trials at once.

    Each end is a quantile of the Bayesian bootstrap of the n trials and one made-up trial (Rubin 1981; Gaffke 2005),
    that is of Σ Dᵢ xᵢ with Dirichlet(1, …, 1) weights D, computed without resampling (Lugannani-Rice r* of a sum of
    exponentials; the exponent is Owen's empirical likelihood). Where the made-up trial lies decides what an end
    knows. With M the farthest trial on that side, in standard deviations from the mean, and cₙ what M would be for
    a bell curve:

    - M is no farther than 1.1·cₙ: at half the skewness, which corrects skewness to second order, moved out as
      Student's t is against the normal. Light tails get about what t gives.
    - M is far out (fully from 1.43·cₙ): at (1 + 50/max(n, 20))·M, but within `bounds`: as much farther as few trials
      may have missed.
    - M was seen at least twice: at M. For two values this is the interval of Clopper and Pearson.
    - all trials agree: at the bound, so that the end is mean ∓ q·(distance to the bound), Clopper-Pearson of 0 of n.

    From the first to the second it moves linearly, and a light end that is narrower than t's goes half the way to it.
    What the interval cannot know is a kind of trial of which not one was seen among others that differ: that is
    `tail`.

    Args:
        rows: (R, n) with n ≥ 2, finite.
        confidence: of the intervals.
        bounds: lowest and highest possible value; an end may be infinite; None if there are none.

    Returns:
        (R, 2): low and high.
    """
    return _both_ends(np.asarray(rows, np.float64), None, confidence, bounds)


def _both_ends(rows: FloatArray, weights: FloatArray | None, confidence: float, bounds: Interval | None) -> FloatArray:
    low, high = bounds if bounds is not None else (-np.inf, np.inf)
    turned = None if weights is None else weights[::-1]
    below = -_upper_ends(-rows[:, ::-1], turned, -float(low), confidence)
    return np.stack([below, _upper_ends(rows, weights, float(high), confidence)], axis=1)


def _upper_ends(rows: FloatArray, weights: FloatArray | None, bound: float, confidence: float) -> FloatArray:
    """`rows` are trials, or, ascending, the values that they have; then `weights` says how many trials have each."""
    if weights is None:
        n = rows.shape[1]
        ordered, spread, middle = np.sort(rows, axis=1), rows.std(axis=1), rows.mean(axis=1)
    else:
        n = int(weights.sum())
        ordered, middle = rows, (rows @ weights) / n
        spread = (((rows - middle[:, None]) ** 2 @ weights) / n) ** 0.5
    agree = (ordered[:, 0] == ordered[:, -1]) | (spread < 1e-150)  # a difference whose square is no number is none
    mean = np.where(agree, ordered[:, 0], middle)
    scale = np.where(agree, 1.0, spread)
    x = (ordered - mean[:, None]) / scale[:, None]
    limit = (bound - mean) / scale
    z, t, bell = _quantiles(n, confidence)
    farthest = x[:, -1]
    second = x[:, -2] if weights is None or weights[-1] < 2 else farthest
    twice = second >= farthest - 1e-9
    far = np.where(twice, 1.0, np.clip(3 * (farthest / bell - 1.1), 0, 1))
    light = np.clip(_sums(x**3, weights) / n / 2, 0, farthest)  # half the skewness
    light = light + n**0.5 * (t * (n / (n - 1)) ** 0.5 - z * (n / (n + 1)) ** 0.5)
    beyond = np.where(twice, farthest, farthest * (1 + 50 / max(n, 20)))
    extra = np.minimum(light + far * np.maximum(beyond - light, 0), limit)
    end = _bootstrap_quantile(x, np.where(agree, 1.0, extra), z, weights)
    students = t / (n - 1) ** 0.5
    end = mean + scale * (end + (1 - far) * np.maximum(students - end, 0) / 2)
    unseen = unseen_share(n, confidence)
    with np.errstate(invalid="ignore"):
        agreed = mean + unseen * (bound - mean) if np.isfinite(bound) else np.full_like(mean, np.nan)
    return np.minimum(np.where(agree, agreed, end), bound)


@cache
def _quantiles(n: int, confidence: float) -> tuple[float, float, float]:
    """Two-sided normal and Student quantile, and about the expected largest of n normal values (Blom 1958)."""
    level = (1 + confidence) / 2
    return float(stats.norm.ppf(level)), float(stats.t.ppf(level, n - 1)), float(stats.norm.ppf(1 - 0.5264 / n))


def _sums(x: FloatArray, weights: FloatArray | None) -> FloatArray:
    return np.asarray(x.sum(axis=1) if weights is None else x @ weights)


def _bootstrap_quantile(
    x: FloatArray, extra: FloatArray, z: float, weights: FloatArray | None = None, steps: int = 12
) -> FloatArray:
    """Where the Bayesian bootstrap of the standardised rows and one `extra` trial each has the quantile Φ(z) > 0.5.

    P(Σ Dᵢ xᵢ ≤ m) = P(Σ Eᵢ (xᵢ − m) ≤ 0) for exponential E. Its saddlepoint s, with c = m + 1/s, gives
    m = Σ xᵢ/(c − xᵢ) ÷ Σ 1/(c − xᵢ), r² = 2 Σ log((c − xᵢ)/(c − m)) and u² = Σ ((xᵢ − m)/(c − xᵢ))², and the
    probability Φ(r + log(u/r)/r). So one search over c > max x is enough; it is over log(c/max x − 1).
    """
    top = np.maximum(extra, x[:, -1])
    near, far = np.full(len(x), -14.0), np.full(len(x), 14.0)
    at_near, at_far = np.full(len(x), np.nan), np.full(len(x), np.nan)
    m_near, m_far = top.copy(), np.zeros(len(x))
    for _ in range(steps):
        middle = (near + far) / 2
        c = top * (1 + np.exp(middle))
        distance = c[:, None] - x
        own = c - extra
        m = (_sums(x / distance, weights) + extra / own) / (_sums(1 / distance, weights) + 1 / own)
        squared = 2 * (_sums(np.log(distance / (c - m)[:, None]), weights) + np.log(own / (c - m)))
        u = _sums(((x - m[:, None]) / distance) ** 2, weights) + ((extra - m) / own) ** 2
        r = np.maximum(squared, 1e-30) ** 0.5
        reached = r + np.log(np.maximum(u, 1e-300) ** 0.5 / r) / r
        beyond = reached > z
        near, at_near, m_near = (np.where(beyond, *p) for p in ((middle, near), (reached, at_near), (m, m_near)))
        far, at_far, m_far = (np.where(beyond, *p) for p in ((far, middle), (at_far, reached), (m_far, m)))
    known = np.isfinite(at_near) & np.isfinite(at_far)
    share = np.where(known, (z - at_far) / np.where(known, at_near - at_far, 1.0), 0.5)
    return np.asarray(m_far + share * (m_near - m_far))


def unseen_share(n: int, confidence: float = 0.95) -> float:
    """The largest share q of trials of a kind of which n trials may have shown none.

    q = 1 − ((1 − confidence) / 2)^(1/n): Clopper and Pearson's upper end for 0 of n.

    Example:
        >>> round(unseen_share(100), 4)
        0.0362
    """
    return float(1 - ((1 - confidence) / 2) ** (1 / n)) if n else 1.0


def tail(mean: float, n: int, worst: float, *, confidence: float = 0.95) -> float:
    """What rare trials that were not seen could still do to a mean over n trials: mean − q·(mean − worst).

    q is `unseen_share`. The mean would be that if a share q of trials, none of which was drawn, had the worst value.

    Example:
        >>> round(tail(0.9, 500, 0.0), 4)
        0.8934
    """
    return mean - unseen_share(n, confidence) * (mean - worst)


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


def binomial_interval(successes: ArrayLike, n: ArrayLike, *, confidence: float = 0.95) -> tuple[FloatArray, FloatArray]:
    """Clopper and Pearson's interval of proportions, elementwise: (low, high).

    Example:
        >>> low, high = binomial_interval([0, 8], [10, 10])
        >>> low.round(4).tolist(), high.round(4).tolist()
        ([0.0, 0.4439], [0.3085, 0.9748])
    """
    k, total = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(n, np.float64))
    alpha = (1 - confidence) / 2
    low = np.where(k > 0, stats.beta.ppf(alpha, np.maximum(k, 0.5), total - k + 1), 0.0)
    high = np.where(k < total, stats.beta.ppf(1 - alpha, k + 1, np.maximum(total - k, 0.5)), 1.0)
    return low, high


def two_way_interval(
    mean: float,
    over_trials: Interval,
    over_samples: Interval,
    residual: float,
    *,
    confidence: float = 0.95,
    bounds: Interval | None = None,
) -> Interval:
    """Interval of a mean over trials × samples when both could have been others.

    Trials and samples are crossed random effects: Var = S_T²/T + S_I²/N − S_TI²/(TN), where both one-way variances
    hold the residual and it is taken off once (Cameron et al. 2011; Owen 2007). The distances to the
    one-way ends add as squares (MOVER), so that a skewed interval over trials stays skewed.

    Args:
        mean: the estimate.
        over_trials: its interval for these samples.
        over_samples: its interval for these trials.
        residual: S_TI²/(TN), see `Crossed.residual`.
        confidence: of the intervals.
        bounds: lowest and highest possible value.

    Returns:
        (low, high), no narrower than either; (nan, nan) if one of them is unknown.

    Example:
        >>> [round(end, 3) for end in two_way_interval(0.5, (0.47, 0.53), (0.46, 0.54), 0.0)]
        [0.45, 0.55]
    """
    z = float(stats.norm.ppf((1 + confidence) / 2))
    ends = []
    for sign, trial, sample in ((-1, over_trials[0], over_samples[0]), (1, over_trials[1], over_samples[1])):
        one, other = (trial - mean) ** 2, (sample - mean) ** 2
        ends.append(mean + sign * max(one + other - z**2 * residual, one, other) ** 0.5)
    if any(np.isnan(end) for end in (*over_trials, *over_samples)):
        return (float("nan"), float("nan"))
    low, high = bounds if bounds is not None else (-np.inf, np.inf)
    return (max(float(low), ends[0]), min(float(high), ends[1]))


LOOKS = 0.6
"""With looks every 20 trials each interval is taken at 1 − 0.6·(1 − confidence); see docs/results/coverage."""


def level_at_looks(confidence: float, margin: float | None) -> float:
    """The level at which an interval is taken so that it covers with `confidence` where a margin stopped the trials.

    A campaign that stops when its interval is narrow stops more often when it was lucky. 1 − 0.6·(1 − confidence)
    makes good for it (by simulation, docs/results/coverage); without a margin it is `confidence`.

    Example:
        >>> round(level_at_looks(0.95, 0.01), 4), level_at_looks(0.95, None)
        (0.97, 0.95)
    """
    return confidence if margin is None else 1 - LOOKS * (1 - confidence)


def half_width(interval: Interval) -> float:
    """Half of an interval's width; nan if it is unknown."""
    return (interval[1] - interval[0]) / 2


def all_within(intervals: Sequence[Interval], margin: float) -> bool:
    """True if every interval is known and no wider than ± margin."""
    return all(half_width(interval) <= margin for interval in intervals)
