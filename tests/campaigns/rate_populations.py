"""Populations of which the rate is known, to draw strata from: adversarial ones, and one like a real network's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flipproof.campaigns.allocation import Belief, allocation, stakes
from flipproof.campaigns.betting import Bets

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Known:
    """Strata of known shares and rates, and what is believed of them before anything is drawn.

    Attributes:
        shares: of the strata.
        rates: of harm in each.
        prior: what is believed.
        groups: which strata are believed to be alike.
        spread: trials of a stratum have values around its rate, rather than 0 or 1.
    """

    shares: Array
    rates: Array
    prior: Array
    groups: NDArray[np.int64]
    spread: bool = False

    @property
    def rate(self) -> float:
        return float(self.shares @ self.rates)

    @property
    def together(self) -> Known:
        """As uniform injection sees it."""
        return Known(np.ones(1), np.array([self.rate]), np.array([0.05]), np.zeros(1, np.int64))

    def draw(self, strata: NDArray[np.int64], rng: np.random.Generator) -> Array:
        rates = self.rates[strata]
        if self.spread:
            return np.where(
                rates * (1 - rates) > 0, rng.beta(np.maximum(2 * rates, 1e-9), np.maximum(2 - 2 * rates, 1e-9)), rates
            )
        return (rng.random(strata.size) < rates).astype(float)


def _known(shares: list[float], rates: list[float], prior: list[float], **more: bool) -> Known:
    total = np.array(shares) / sum(shares)
    return Known(total, np.array(rates), np.array(prior), np.arange(len(shares)), **more)


def _like_resnet20() -> Known:
    """Three layers; 3 % of the bits are huge changes, and one side of them is nearly always critical."""
    shares = [0.41, 0.09, 0.07, 0.07, 0.03, 0.04, 0.04, 0.06, 0.07, 0.05, 0.02, 0.012, 0.0044, 0.0166, 0.0146]
    rates = [0, 0, 0, 0, 0, 0, 0, 0, 0.0002, 0.0005, 0.001, 0.003, 0.01, 0.03, 0.87]
    prior = [0.004] * 4 + [0.01] * 4 + [0.02] * 3 + [0.1, 0.2, 0.3, 0.7]
    rng = np.random.default_rng(0)
    layers = rng.dirichlet(2 * np.ones(3))
    every = np.outer(layers, np.array(shares) / sum(shares))
    found = np.tile(rates, (3, 1))
    found[:, -1] = rng.uniform(0.7, 1.0, 3)
    groups = np.tile(np.arange(15), 3)
    return Known(every.ravel(), found.ravel(), np.tile(prior, 3), groups)


POPULATIONS = {
    "like ResNet-20": _like_resnet20(),
    "one rare fatal stratum": _known([0.999, 0.001], [0.0, 1.0], [0.01, 0.01]),
    "the guess lies": _known([0.5, 0.3, 0.2], [0.6, 0.0, 0.1], [0.004, 0.9, 0.004]),
    "nothing": _known([0.7, 0.3], [0.0, 0.0], [0.3, 0.01]),
    "everything": _known([0.7, 0.3], [1.0, 1.0], [0.3, 0.01]),
    "values between": _known([0.6, 0.3, 0.1], [0.97, 0.25, 0.1], [0.9, 0.5, 0.5], spread=True),
}


def estimate(
    population: Known,
    seed: int,
    *,
    margin: float,
    confidence: float = 0.95,
    draws: int | None = None,
    count: bool = False,
) -> tuple[float, float, float]:
    """Estimate, low and high as `estimate_rates` makes them: until the margin is met, or of so many draws.

    With `count` the last is the number of draws instead.
    """
    rng = np.random.default_rng([seed, 11])
    belief = Belief(population.shares, population.groups, population.prior)
    bets = Bets(0.0, 1.0)
    while True:
        q = allocation(belief, margin, confidence) if population.shares.size > 1 else population.shares
        weights, middle, means = population.shares / q, belief.mean, belief.means
        below, above = belief.range(weights)
        stake = stakes(belief, q, margin)
        size = 32 if not len(bets) else max(8, len(bets) // 16)
        strata = rng.choice(q.size, size if draws is None else min(size, draws - len(bets)), p=q)
        values = population.draw(strata, rng)
        bets.add(
            middle + weights[strata] * (values - means[strata]), within=(middle - below, middle + above), stakes=stake
        )
        belief.learn(strata, values)
        if draws is not None and len(bets) < draws:
            continue
        low, high = bets.interval(confidence)
        if draws is not None or (high - low) / 2 <= margin:
            return bets.mean, low, float(len(bets)) if count else high
