"""Rates of neuron campaigns: upsets of one trial share a layer and are otherwise independent, so layers are strata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from flipproof.campaigns.statistics import binomial_interval, mean_interval

ENOUGH = 5
"""A layer that this many trials are expected to hit is a stratum of its own; the others share one."""


def stratified_rate(
    hits: ArrayLike, samples: int, layers: Sequence[str], shares: Mapping[str, float], *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """A rate over the whole neuron space: Σ_l w_l · rate_l, with its interval over upsets.

    A trial draws a layer with probability w_l, then one upset in it for each sample. So how often a layer was drawn
    is no news: each layer counts with w_l (post-stratification), and within a layer the T_l · N upsets are
    independent. Their number of hits varies no more than a binomial (samples differ, which only lowers it); its
    interval is Clopper and Pearson's. Layers too small for 5 expected trials share a stratum, whose trials differ by
    layer: there a trial is one observation (`mean_interval`). The strata's distances add as squares (MOVER).

    Args:
        hits: upsets with the outcome, per trial, (T,).
        samples: N, upsets a trial.
        layers: the layer of each trial, (T,).
        shares: w of each layer; they sum to 1.
        confidence: of the interval.

    Returns:
        mean, low, high; an unknown interval is (nan, nan).

    Example:
        >>> layers = ["a", "b"] * 20
        >>> [round(x, 3) for x in stratified_rate([0, 8] * 20, 16, layers, {"a": 0.5, "b": 0.5})]
        [0.25, 0.222, 0.279]
    """
    found, drawn = np.asarray(hits, np.float64), np.asarray(layers)
    trials = len(found)
    largest = sorted(shares, key=lambda name: (-shares[name], name))
    own = [name for name in largest if trials * shares[name] >= ENOUGH and (drawn == name).any()]
    while own:
        together = ~np.isin(drawn, own)
        left = 1 - sum(shares[name] for name in own)
        if left < 1e-12 or together.sum() >= 2:
            break
        own.pop()  # the smallest joins those that were not drawn often enough
    if not own:
        rates = found / samples
        return float(rates.mean()), *mean_interval(rates, confidence=confidence, bounds=(0.0, 1.0))
    weights = np.array([shares[name] for name in own])
    counts = np.array([(drawn == name).sum() for name in own]) * samples
    successes = np.array([found[drawn == name].sum() for name in own])
    low, high = binomial_interval(successes, counts, confidence=confidence)
    rate = successes / counts
    mean = float((weights * rate).sum())
    below = float((weights**2 * (rate - low) ** 2).sum())
    above = float((weights**2 * (high - rate) ** 2).sum())
    if left >= 1e-12:
        rest = found[together] / samples
        lower, upper = mean_interval(rest, confidence=confidence, bounds=(0.0, 1.0))
        middle = float(rest.mean())
        mean += left * middle
        below += (left * (middle - lower)) ** 2
        above += (left * (upper - middle)) ** 2
    return mean, max(0.0, mean - below**0.5), min(1.0, mean + above**0.5)
