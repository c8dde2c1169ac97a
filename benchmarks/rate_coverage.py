"""How often the intervals of `estimate_rates` hold the truth, and whether its estimates are unbiased, by simulation.

`make rate-coverage` (`python -m benchmarks.rate_coverage`) writes docs/results/rates. The populations are adversarial
ones, and every single bit of a trained network for every one of a hundred images, injected by brute force. Draws,
beliefs, bets and stopping are those of the library; only the network is replaced by what is known of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import flipproof as fp
from flipproof.campaigns.allocation import Belief, allocation, stakes, stakes_seen
from flipproof.campaigns.betting import Bets
from flipproof.campaigns.populations import SingleBits, classes_of
from flipproof.campaigns.rates import FIRST, GROWTH, LEAST
from flipproof.datasets import digits
from flipproof.models import mlp
from flipproof.models.training import cached, train_classifier
from flipproof.spaces.contract import Faults

OUT = Path(__file__).parents[1] / "docs" / "results" / "rates" / "README.md"

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


@dataclass(frozen=True)
class Seen:
    """Uniform trials as they were seen, from which others like them are drawn.

    Attributes:
        values: of trials, in [0, 1].
    """

    values: Array

    @property
    def shares(self) -> Array:
        return np.ones(1)

    @property
    def groups(self) -> NDArray[np.int64]:
        return np.zeros(1, np.int64)

    @property
    def prior(self) -> Array:
        return np.array([0.5])

    def draw(self, strata: NDArray[np.int64], rng: np.random.Generator) -> Array:
        return rng.choice(self.values, strata.size)


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


def _sixty() -> Known:
    """As of a network of a hundred weights: no stratum is pure, and most are small."""
    rng = np.random.default_rng(3)
    shares, groups = rng.dirichlet(np.full(60, 0.4)), np.arange(60) % 20
    rates = np.where(rng.random(60) < 0.5, 0.0, rng.beta(0.6, 6, 60)) * (shares < 0.1)
    return Known(shares, rates, np.full(60, 0.02), groups)


POPULATIONS = {
    "like ResNet-20": _like_resnet20(),
    "sixty strata of all rates": _sixty(),
    "one rare fatal stratum": _known([0.999, 0.001], [0.0, 1.0], [0.01, 0.01]),
    "the guess lies": _known([0.5, 0.3, 0.2], [0.6, 0.0, 0.1], [0.004, 0.9, 0.004]),
    "nothing": _known([0.7, 0.3], [0.0, 0.0], [0.3, 0.01]),
    "everything": _known([0.7, 0.3], [1.0, 1.0], [0.3, 0.01]),
    "values between": _known([0.6, 0.3, 0.1], [0.97, 0.25, 0.1], [0.9, 0.5, 0.5], spread=True),
}


class Found(NamedTuple):
    """What one simulated estimate comes to.

    Attributes:
        early: the estimate from the first 96 draws, a number fixed before.
        mean: where the margin stops, and so are
        low: end, and
        high: end of the interval, and
        draws: their number.
    """

    early: float
    mean: float
    low: float
    high: float
    draws: int


FIXED = 96


def estimate(
    population: Known | Seen, seed: int, *, margin: float, confidence: float = 0.95, most: int = 10**7
) -> Found:
    """As `estimate_rates` does it, until the margin is met."""
    rng = np.random.default_rng([seed, 11])
    belief = Belief(population.shares, population.groups, population.prior)
    bets, early = Bets(0.0, 1.0, bettors=2), float("nan")
    low, high = 0.0, 1.0
    while True:
        q = allocation(belief, margin, confidence) if population.shares.size > 1 else population.shares
        weights, middle, means = population.shares / q, belief.mean, belief.means
        below, above = belief.range(weights)
        staked = [stakes(belief, q, margin, plausible=(low, high))]
        staked += [stakes_seen(*bets.latest, belief, q, margin, plausible=(low, high)) if len(bets) else staked[0]]
        size = max(LEAST, len(bets) // GROWTH) if len(bets) else FIRST
        strata = rng.choice(q.size, size, p=q)
        values = population.draw(strata, rng)
        bets.add(
            middle + weights[strata] * (values - means[strata]), within=(middle - below, middle + above), stakes=staked
        )
        belief.learn(strata, values)
        if len(bets) == FIXED:
            early = bets.mean
        low, high = bets.interval(confidence)
        if len(bets) >= FIXED and ((high - low) / 2 <= margin or len(bets) >= most):
            return Found(early, bets.mean, low, high, len(bets))


IMAGES = 100


def digits_mlp() -> nn.Module:
    """Linear 64 – 16 – 10 on 8 × 8 digits: 1,210 parameters."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return mlp(inputs=64, hidden=(16,))

    return cached(
        "rates-mlp-1", build, lambda net: train_classifier(net, digits("train", batch_size=32), epochs=25, lr=5e-3)
    ).eval()


@cache
def every_bit() -> Known:
    """The strata of the digits network, with the rate of each over all of its bits and a hundred images."""
    net = digits_mlp()
    images = torch.cat([inputs for inputs, _ in digits("test")])[:IMAGES]
    space = fp.FaultSpace(net)
    with torch.no_grad():
        golden = net(images).argmax(dim=1)
        critical = np.zeros(space.bits)
        for bit in range(space.bits):
            with space.corrupted(Faults(np.array([bit]))):
                outputs = net(images)
            critical[bit] = (torch.isnan(outputs).any(dim=1) | (outputs.argmax(dim=1) != golden)).double().mean()
    population = SingleBits(space)
    rates = []
    for parts, kind in zip(population._parts, population._kinds, strict=True):
        bits = [
            space.sites[site].offset + np.flatnonzero(classes_of(space.cells[site], bit) == kind) * 32 + bit
            for site, bit, _ in parts.tolist()
        ]
        rates.append(critical[np.concatenate(bits)].mean())
    found = Known(population.shares, np.array(rates), population.harm, population.groups)
    assert abs(found.rate - critical.mean()) < 1e-12
    return found


REAL = "every bit of a digits network"


def _population(name: str) -> Known:
    return every_bit() if name == REAL else POPULATIONS[name]


def line(job: tuple[str, float, int]) -> str:
    """One row: a population, a margin, and what so many simulated estimates come to."""
    name, margin, runs = job
    population = _population(name)
    truth = population.rate
    found = np.array([estimate(population, seed, margin=margin) for seed in range(runs)])
    early, mean, low, high, draws = found.T
    uniform = np.mean([estimate(population.together, seed, margin=margin).draws for seed in range(max(1, runs // 20))])
    error = float(early.std()) / runs**0.5
    bias = (float(early.mean()) - truth) / error if error > 1e-12 else 0.0
    cells = (
        name,
        f"{truth:.4g}",
        f"{margin:g}",
        f"{bias:+.1f}",
        f"{(float(mean.mean()) - truth) / margin:+.3f}",
        f"{((low <= truth) & (truth <= high)).mean():.3f}",
        f"{(high < truth).mean():.3f}",
        f"{(low > truth).mean():.3f}",
        f"{draws.mean():,.0f}",
        "–" if population.spread else f"{uniform:,.0f}",
    )
    return "| " + " | ".join(cells) + " |"


JOBS = (
    ("like ResNet-20", 0.01),
    ("like ResNet-20", 0.003),
    (REAL, 0.01),
    ("sixty strata of all rates", 0.006),
    ("one rare fatal stratum", 0.01),
    ("the guess lies", 0.1),
    ("nothing", 0.01),
    ("everything", 0.01),
    ("values between", 0.05),
)

PAGE = """# How often the intervals of `estimate_rates` hold the truth

Made by `make rate-coverage` (`python -m benchmarks.rate_coverage --runs {runs}`, seeded): {runs} simulated estimates a
row at 95 %, each stopped when its interval was within the margin. *Bias* is of estimates from {fixed} draws, a number
fixed before, in standard errors of the mean of {runs}: it should be within ± 3. *Where the margin stops* is how far
estimates then lie from the truth on average, in margins: stopping when it is narrow pulls rare rates down a little.
*Covered* should be at least 0.95, and each side at most 0.025; its standard error is {error:.3f}. Intervals from bets
hold at every moment, and so cover more than they claim at the one where they are looked at. *Draws* are means: ours,
and those of uniform injection with the same interval and stopping rule (over {few} estimates).

*{real}*: all 38,720 bits of a trained 64–16–10 network were injected by brute force for {images} images; strata, shares
and rates are real. *The guess lies*: a stratum that is believed to be harmless is critical in 60 % of the cases, and
one that is believed to be fatal never.

| population | rate | margin | bias | where the margin stops | covered | all below | all above | draws | uniform |
|---|---|---|---|---|---|---|---|---|---|
{rows}
"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    every_bit()
    jobs = [(name, margin, chosen.runs) for name, margin in JOBS]
    if chosen.workers > 1:
        with ProcessPoolExecutor(chosen.workers) as pool:
            rows: Iterable[str] = list(pool.map(line, jobs))
    else:
        rows = list(map(line, jobs))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    page = PAGE.format(
        runs=chosen.runs,
        fixed=FIXED,
        few=max(1, chosen.runs // 20),
        error=(0.95 * 0.05 / chosen.runs) ** 0.5,
        real=REAL.capitalize(),
        images=IMAGES,
        rows="\n".join(rows),
    )
    chosen.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
