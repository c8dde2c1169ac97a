"""How often intervals hold the truth, by simulation: `python -m benchmarks.coverage` writes docs/results/coverage.

Every cell draws many campaigns from a known distribution and counts how often the interval, as the summary makes it,
holds the true mean. Distributions are of one trial's accuracy; losses are rare, skewed or fatal as flips make them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from flipproof.campaigns.answers import Crossed
from flipproof.campaigns.statistics import (
    difference_interval,
    level_at_looks,
    mean_interval,
    mean_intervals,
    tail,
    two_way_interval,
    unseen_share,
)
from flipproof.campaigns.strata import stratified_rate

OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "coverage" / "README.md"
Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Array]


@dataclass(frozen=True)
class Shape:
    """A distribution of one trial's accuracy, and its mean."""

    name: str
    draw: Draw
    mean: float


def _two(share: float, loss: float = 0.8) -> Shape:
    name = f"two-point, {share:g} lose {100 * loss:g} points"
    return Shape(name, lambda rng, shape: np.where(rng.random(shape) < share, 0.9 - loss, 0.9), 0.9 - share * loss)


def _noisy(share: float) -> Shape:
    """Fatal trials among trials that all differ a little."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
        return 0.9 + 0.002 * rng.standard_normal(shape) - 0.8 * (rng.random(shape) < share)

    return Shape(f"noise and {share:g} lose 80 points", draw, 0.9 - 0.8 * share)


def _lognormal(sigma: float) -> Shape:
    """A loss of exp(σ·z) points, at most 95 points."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
        return 0.95 - np.minimum(0.95, 0.01 * np.exp(sigma * rng.standard_normal(shape)))

    top = np.log(95) / sigma
    whole = np.exp(sigma**2 / 2)
    loss = 0.01 * whole * stats.norm.cdf(top - sigma) + 0.95 * stats.norm.sf(top)
    return Shape(f"log-normal loss, σ = {sigma:g}", draw, 0.95 - float(loss))


def _pareto(alpha: float) -> Shape:
    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
        return 0.95 - np.minimum(0.95, 0.01 * rng.pareto(alpha, shape))

    cut = 1 + 95.0
    loss = 0.01 * (1 - cut ** (1 - alpha)) / (alpha - 1)  # E min(X, 95) of a Lomax
    return Shape(f"Pareto loss, α = {alpha:g}", draw, 0.95 - loss)


def _cut_t3(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return 0.8 + np.clip(0.01 * rng.standard_t(3, shape), -0.2, 0.2)


SHAPES = (
    Shape("normal", lambda rng, shape: 0.9 + 0.002 * rng.standard_normal(shape), 0.9),
    Shape("uniform", lambda rng, shape: rng.random(shape), 0.5),
    Shape("250 samples, binomial", lambda rng, shape: rng.binomial(250, 0.9, shape) / 250, 0.9),
    Shape("beta(8, 2)", lambda rng, shape: rng.beta(8, 2, shape), 0.8),
    Shape("exponential loss", lambda rng, shape: 0.9 - 0.02 * rng.exponential(size=shape), 0.88),
    Shape("t with 3 degrees", _cut_t3, 0.8),
    _lognormal(1.0),
    _lognormal(1.5),
    _pareto(2.5),
    Shape("beta(0.1, 1) loss", lambda rng, shape: 1 - rng.beta(0.1, 1, shape), 1 - 0.1 / 1.1),
    Shape(
        "80 % masked, else exponential",
        lambda rng, shape: 0.95 - (rng.random(shape) < 0.2) * 0.03 * rng.exponential(size=shape),
        0.95 - 0.006,
    ),
    Shape(
        "90 % masked, else any loss",
        lambda rng, shape: 0.95 - 0.9 * (rng.random(shape) < 0.1) * rng.random(shape),
        0.95 - 0.045,
    ),
    _two(0.5),
    _two(0.1),
    _two(0.02),
    _two(0.005),
)
NOISY = (_noisy(0.1), _noisy(0.05), _noisy(0.02), _noisy(0.005))
TRIALS = (20, 60, 300, 1000)


@dataclass(frozen=True)
class Cell:
    """Coverage of one cell: share of intervals that hold the mean, that lie below it, that lie above it."""

    inside: float
    below: float
    above: float
    width: float

    @classmethod
    def of(cls, ends: Array, mean: float) -> Cell:
        """From (R, 2) intervals."""
        below = float((ends[:, 1] < mean - 1e-12).mean())
        above = float((ends[:, 0] > mean + 1e-12).mean())
        return cls(1 - below - above, below, above, float((ends[:, 1] - ends[:, 0]).mean()))


def campaigns(shape: Shape, trials: int, repetitions: int, seed: int = 0) -> Array:
    """Values of many campaigns, (repetitions, trials)."""
    return shape.draw(np.random.default_rng([seed, trials]), (repetitions, trials))


def mean_cell(shape: Shape, trials: int, repetitions: int, seed: int = 0) -> tuple[Cell, Cell, float]:
    """Our interval, Student's t, and how often the tail number is no higher than the mean."""
    rows = campaigns(shape, trials, repetitions, seed)
    ours = np.concatenate(
        [mean_intervals(part, bounds=(0, 1)) for part in np.array_split(rows, max(1, rows.size // 10**6))]
    )
    half = stats.t.ppf(0.975, trials - 1) * rows.std(axis=1, ddof=1) / trials**0.5
    students = np.stack([rows.mean(axis=1) - half, rows.mean(axis=1) + half], axis=1)
    tails = np.array([tail(mean, trials, 0.0) for mean in rows.mean(axis=1)])
    held = float((np.minimum(tails, ours[:, 0]) <= shape.mean + 1e-12).mean())
    return Cell.of(ours, shape.mean), Cell.of(students, shape.mean), held


def stopped_cell(
    shape: Shape, margin: float, repetitions: int, *, most: int = 400, seed: int = 0
) -> tuple[Cell, float]:
    """With looks every 20 trials until interval and tail are within ± margin: coverage then, and the mean of trials.

    At most `most` trials.
    """
    rows = campaigns(shape, most, repetitions, seed)
    level = level_at_looks(0.95, margin)
    ends, spent = np.zeros((repetitions, 2)), np.zeros(repetitions)
    going = np.arange(repetitions)
    for trials in range(20, most + 1, 20):
        found = mean_intervals(rows[going, :trials], confidence=level, bounds=(0, 1))
        tails = unseen_share(trials, 0.95) * rows[going, :trials].mean(axis=1)  # the worst value is 0
        done = (((found[:, 1] - found[:, 0]) / 2 <= margin) & (tails <= margin)) | (trials == most)
        ends[going[done]], spent[going[done]] = found[done], trials
        going = going[~done]
        if not going.size:
            break
    return Cell.of(ends, shape.mean), float(spent.mean())


STOPS = (
    (SHAPES[0], (0.05, 0.02)),
    (SHAPES[3], (0.05, 0.02)),
    (SHAPES[4], (0.05, 0.02)),
    (SHAPES[6], (0.05, 0.02)),
    (SHAPES[11], (0.1, 0.05, 0.025)),
    (_two(0.5), (0.1, 0.06)),
    (_two(0.3), (0.1, 0.06)),
    (_two(0.1), (0.1, 0.04)),
    (_two(0.02), (0.1, 0.02)),
    (_noisy(0.1), (0.1, 0.04)),
    (_noisy(0.05), (0.1, 0.02)),
    (_noisy(0.02), (0.1, 0.02)),
)


NAMED = {shape.name: shape for shape in (*SHAPES, *NOISY, *(shape for shape, _ in STOPS))}
"""Processes are told a name: what draws cannot be sent."""


@dataclass(frozen=True)
class Effects:
    """A campaign over trials × samples: which answers are lost depends on the trial and on the sample."""

    name: str
    trial: float
    sample: float
    level: float
    fatal: float = 0.0

    def lost(self, rng: np.random.Generator, trials: int, samples: int) -> NDArray[np.int8]:
        """1 where an answer is lost, (trials, samples)."""
        share = self.chance(rng.standard_normal(trials), rng.standard_normal(samples), rng.random(trials))
        return (rng.random((trials, samples)) < share).astype(np.int8)

    def chance(self, trial: Array, sample: Array, fate: Array) -> Array:
        """Probability of a loss, (trials, samples)."""
        share = 1 / (1 + np.exp(-(self.level + self.trial * trial[:, None] + self.sample * sample[None, :])))
        return np.where((fate < self.fatal)[:, None], 0.9, share)

    @property
    def mean(self) -> float:
        """Of the population of trials and samples."""
        z, weight = np.polynomial.hermite_e.hermegauss(80)
        weight = weight / weight.sum()
        ordinary = float(weight @ self.chance(z, z, np.ones(80)) @ weight)
        return (1 - self.fatal) * ordinary + self.fatal * 0.9


EFFECTS = (
    Effects("trials differ most", 1.5, 0.5, -3.0),
    Effects("samples differ most", 0.3, 2.0, -3.0),
    Effects("both differ", 1.5, 2.0, -4.0),
    Effects("neither differs", 0.0, 0.0, -2.0),
    Effects("10 % fatal trials", 0.3, 1.0, -4.0, 0.1),
)


def two_way_cell(effects: Effects, trials: int, samples: int, repetitions: int, seed: int = 0) -> tuple[Cell, Cell]:
    """The interval over trials and samples, and the one over trials alone, against the population mean."""
    both, alone = [], []
    rng = np.random.default_rng([seed, trials, samples])
    for _ in range(repetitions):
        table = Crossed.of(effects.lost(rng, trials, samples))
        mean = float(table.trial_means.mean())
        over_trials = mean_interval(table.trial_means, bounds=(0, 1))
        over_samples = mean_interval(table.sample_means, bounds=(0, 1))
        residual = table.residual / (trials * samples)
        both.append(two_way_interval(mean, over_trials, over_samples, residual, bounds=(0, 1)))
        alone.append(over_trials)
    truth = effects.mean
    return Cell.of(np.array(both), truth), Cell.of(np.array(alone), truth)


LAYERS = {
    "5 very different layers": ((5.0, 3.0, 2.0, 1.0, 1.0), (0.001, 0.01, 0.05, 0.1, 0.3)),
    "5 equal layers": ((1.0,) * 5, (0.02,) * 5),
    "20 layers, half of them tiny": (
        tuple(0.8**i for i in range(20)),
        tuple(0.002 * (1 + i % 7) ** 2 for i in range(20)),
    ),
    "rare": ((10.0, 1.0, 1.0, 1.0), (0.0005, 0.001, 0.0, 0.02)),
}


def neuron_cell(
    name: str, trials: int, samples: int, repetitions: int, seed: int = 0
) -> tuple[Cell, Cell, float, float]:
    """Stratified by layer and with a trial as one observation: coverage of both, and the bias of the estimate."""
    sizes, rates = LAYERS[name]
    share = np.array(sizes) / sum(sizes)
    rng = np.random.default_rng([seed, trials, samples])
    frail = rng.gamma(0.5, 2.0, samples)  # samples differ in how easily they are lost
    chance = np.clip(np.array(rates)[:, None] * frail / frail.mean(), 0, 1)
    truth = float(share @ chance.mean(axis=1))
    named = {str(i): float(part) for i, part in enumerate(share)}
    ours, plain, means = [], [], []
    for _ in range(repetitions):
        drawn = rng.choice(len(share), trials, p=share)
        hits = (rng.random((trials, samples)) < chance[drawn]).sum(axis=1)
        mean, *ends = stratified_rate(hits, samples, [str(i) for i in drawn], named)
        ours.append(ends)
        means.append(mean)
        plain.append(mean_interval(hits / samples, bounds=(0, 1)))
    bias = (float(np.mean(means)) - truth) / (float(np.std(means)) / repetitions**0.5)
    return Cell.of(np.array(ours), truth), Cell.of(np.array(plain), truth), truth, bias


def difference_cell(one: Shape, other: Shape, trials: int, repetitions: int, *, paired: bool, seed: int = 0) -> Cell:
    """The difference of two campaigns: of the same draws (the other one loses half as much), or of other draws."""
    rows = campaigns(one, trials, repetitions, seed)
    if paired:
        best = 0.95
        half = best - (best - rows) / 2
        return Cell.of(mean_intervals(half - rows, bounds=(-1, 1)), (best - one.mean) / 2)
    others = campaigns(other, trials, repetitions, seed + 1)
    first, second = (mean_intervals(x, bounds=(0, 1)) for x in (rows, others))
    means = zip(rows.mean(axis=1), first, others.mean(axis=1), second, strict=True)
    ends = [difference_interval(x, (a[0], a[1]), y, (b[0], b[1])) for x, a, y, b in means]
    return Cell.of(np.array(ends), one.mean - other.mean)


def _row(*cells: object) -> str:
    return "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"


def _head(*names: str) -> list[str]:
    return ["", _row(*names), "|" + "---|" * len(names)]


def _mean_line(job: tuple[str, int, int]) -> str:
    name, trials, repetitions = job
    shape = NAMED[name]
    ours, students, held = mean_cell(shape, trials, repetitions)
    ratio = f"{ours.width / students.width:.2f}"
    return _row(shape.name, trials, ours.inside, ours.below, ours.above, students.inside, ratio, held)


def _stop_line(job: tuple[str, float, int]) -> str:
    name, margin, repetitions = job
    shape = NAMED[name]
    cell, spent = stopped_cell(shape, margin, repetitions)
    return _row(shape.name, f"{margin:g}", cell.inside, cell.below, cell.above, f"{spent:.0f}")


def _two_way_line(job: tuple[Effects, int, int, int]) -> str:
    effects, trials, samples, repetitions = job
    both, alone = two_way_cell(effects, trials, samples, repetitions)
    return _row(effects.name, trials, samples, both.inside, both.below, both.above, alone.inside)


def _neuron_line(job: tuple[str, int, int, int]) -> str:
    name, trials, samples, repetitions = job
    ours, plain, _, bias = neuron_cell(name, trials, samples, repetitions)
    gain = f"{(plain.width / ours.width) ** 2:.1f}"
    return _row(name, trials, samples, ours.inside, ours.below, ours.above, plain.inside, gain, f"{bias:+.1f}")


def _difference_line(job: tuple[str, str, int, int, bool]) -> str:
    first, second, trials, repetitions, paired = job
    one, other = NAMED[first], NAMED[second]
    cell = difference_cell(one, other, trials, repetitions, paired=paired)
    name = f"{one.name}, half the loss" if paired else f"{one.name} − {other.name}"
    return _row(name, "paired" if paired else "independent", trials, cell.inside, cell.below, cell.above)


def tables(repetitions: int, run: Callable[..., Iterable[str]]) -> dict[str, list[str]]:
    """Every table of the page by name, as lines of Markdown."""
    half, quarter, few = (max(400, repetitions // part) for part in (2, 4, 8))
    sized = {20: repetitions, 60: repetitions, 300: half, 500: half, 1000: quarter}
    means = [(shape.name, n, sized[n]) for shape in SHAPES for n in TRIALS]
    means.append((_two(0.02).name, 500, sized[500]))
    noisy = [(shape.name, n, sized[n]) for shape in NOISY for n in TRIALS]
    stops = [(shape.name, margin, quarter) for shape, margins in STOPS for margin in margins]
    crossed = [(effects, t, n, few) for effects in EFFECTS for t, n in ((60, 100), (300, 100), (60, 1000))]
    neurons = [(name, t, n, few) for name in LAYERS for t, n in ((60, 32), (60, 200), (300, 32), (300, 200))]
    chosen = ((6, 6), (11, 11), (0, 4), (11, 13))
    pairs = [(SHAPES[i].name, SHAPES[j].name, n, sized[n], i == j) for i, j in chosen for n in (60, 300)]
    sides = ("covered", "all below", "all above")
    mean = _head("distribution", "trials", *sides, "Student's t covers", "width ÷ t's", "tail holds")
    two_way = _head("answers", "trials", "samples", *sides, "over trials alone covers")
    strata = ("a trial as one observation covers", "so many times fewer trials", "bias, standard errors")
    return {
        "means": [*mean, *run(_mean_line, means)],
        "noisy": [*mean, *run(_mean_line, noisy)],
        "stops": [*_head("distribution", "margin ±", *sides, "trials"), *run(_stop_line, stops)],
        "crossed": [*two_way, *run(_two_way_line, crossed)],
        "neurons": [*_head("layers", "trials", "samples", *sides, *strata), *run(_neuron_line, neurons)],
        "pairs": [*_head("difference", "draws", "trials", *sides), *run(_difference_line, pairs)],
    }


PAGE = """# How often the intervals hold the truth

Made by `make coverage` (`python -m benchmarks.coverage --repetitions {repetitions}`, seeded): {repetitions} simulated
campaigns a cell for 20 and 60 trials, half of that for 300 and 500, a quarter for 1,000 and for early stopping, an
eighth (at least 400) for the last three tables. 95 % intervals. *All below*: the whole interval lies below the true
mean; each side should have 0.025. The aim is 0.945 to 0.96; more is width that is given away, less is a wrong number.
The standard error of a cell is {errors}.

## The mean over trials (`accuracy_low`, `accuracy_high`)

A made-up trial is added to those that were run: near the mean for light tails, as bad as the worst where the worst
stands out or came twice (`flipproof.campaigns.statistics.mean_intervals` says it in full). *Width ÷ t's* is over all
campaigns; *tail holds* is how often the lower one of interval and tail number is no higher than the true mean.
{means}

Where it covers more than 0.96: two values and few of one of them, because the number of fatal trials is a whole number
(Clopper and Pearson's interval, exact on either side, is never shorter than it may be), and one-sided tails, where the
side away from the tail is safe. At 20 trials heavy tails take much wider intervals than t's; they need it.

## What no interval of this width can know

Fatal trials among trials that all differ a little: where none of the fatal ones was drawn, nothing in the data tells of
them, and the interval is that of the others. With a share p that happens in (1 − p)^n of the campaigns. This is what
`accuracy_tail` is for: the interval **and** the tail number are to be read.
{noisy}

## Stopping early (`margin=`)

Looks every 20 trials, at most 400, until the interval *and* the tail are within the margin; each interval is taken at
1 − 0.6·(1 − confidence), 97 % for 95 %. A campaign that stops when its interval is narrow stops more often when it was
lucky. Without asking the tail too, rare fatal trials among others that differ a little were covered in as little as
half of the campaigns: a few trials without a fatal one agree closely. At a wide margin that still shows (the last rows
at ± 0.1): the interval is then far narrower than the margin, and it is the margin that holds.
{stops}

## Over trials and samples (`accuracy_both_low`, `accuracy_both_high`)

Against the mean over the population of trials *and* samples. The interval over trials alone is of these samples; how
seldom it holds the population's mean is in the last column.
{crossed}

## Rates of neuron campaigns

Stratified by layer (`flipproof.campaigns.strata.stratified_rate`), for these samples, which differ in how easily they
are lost. *So many times fewer trials*: the square of how much narrower it is than with a trial as one observation.
{neurons}

## Differences (`accuracy_gain_low`, `accuracy_gain_high`)
{pairs}
"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    with ProcessPoolExecutor(chosen.workers) as pool:
        found = tables(chosen.repetitions, pool.map)
        text = {name: "\n".join(lines) for name, lines in found.items()}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    errors = [(0.95 * 0.05 / max(400, chosen.repetitions // part)) ** 0.5 for part in (1, 2, 4, 8)]
    said = "{:.3f}, {:.3f}, {:.3f} and {:.3f} in this order".format(*errors)
    chosen.out.write_text(PAGE.format(repetitions=chosen.repetitions, errors=said, **text), encoding="utf-8")


if __name__ == "__main__":
    main()
