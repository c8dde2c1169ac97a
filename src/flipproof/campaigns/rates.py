"""`estimate_rates`: how often faults do harm, to a margin, with the trials that say most about it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import isfinite, isnan
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import nn

from flipproof._fields import Fields
from flipproof.campaigns.allocation import SPLITS, Belief, FloatArray, allocation, stakes, stakes_seen
from flipproof.campaigns.assess import noting, ready, switch_off, take_shortcuts
from flipproof.campaigns.betting import Bets
from flipproof.campaigns.fingerprint import fingerprint_of
from flipproof.campaigns.plan import Identity, Plan
from flipproof.campaigns.populations import (
    Everything,
    FlipCounts,
    NeuronBits,
    Population,
    SingleBits,
    Within,
    huge_flips,
)
from flipproof.campaigns.record import Trial
from flipproof.campaigns.trial import TrialRunner
from flipproof.engine.cluster import Client
from flipproof.engine.jobs import crew
from flipproof.engine.journal import Journal, Key, written
from flipproof.errors import ConfigError, DataError, FlipproofWarning
from flipproof.faults.base import FaultModel
from flipproof.faults.bit_error_rate import BitErrorRate
from flipproof.faults.bit_position import BitPosition
from flipproof.faults.random_bits import RandomBits
from flipproof.faults.sampling import TrialGenerator
from flipproof.running.data import Data, Output
from flipproof.running.decision import DecisionChoice
from flipproof.running.metrics import Metrics
from flipproof.running.scales import LOSS, OUTCOMES, SHARE, Scale
from flipproof.running.tasks.base import Task
from flipproof.running.tasks.classification import task_of
from flipproof.spaces.contract import Space, Where
from flipproof.spaces.neurons import NeuronSpace
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Neurons, Parameters
from flipproof.spaces.tensors import FormatChoice

KIND = "rate estimate"
"""What the journal says it is of."""

FIRST, LEAST, GROWTH = 32, 8, 16
"""Draws of the first round; of a later one at least, and one for so many that there are."""

HARM = (*OUTCOMES, "critical_total")


def estimate_rates(
    model: nn.Module,
    data: Data,
    *,
    faults: FaultModel,
    format: FormatChoice = None,
    where: Parameters | Neurons | Where | None = None,
    of: str = "critical_total",
    margin: float = 0.01,
    confidence: float = 0.95,
    sampling: Literal["stratified", "uniform"] = "stratified",
    images: int | None = None,
    trials: int = 1_000_000,
    metrics: Metrics | None = None,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    workers: int = 1,
    client: Client | None = None,
    progress: bool | None = None,
    device: str | torch.device | None = None,
    output: Output = None,
    task: Task | None = None,
    decision: DecisionChoice = None,
    cache_bytes: int | None = None,
    audit: float = 0.01,
) -> RateEstimate:
    """How often faults do harm, to ± `margin`, with few trials: the same rates as `assess` estimates.

    Faults are divided into strata whose shares are known exactly: single flips by tensor and by how far the value that
    is read moves, upsets of neurons by layer and bit, draws at a bit error rate by how many huge changes are among
    their flips. A trial draws stratum s with probability q_s and a fault within it as the fault model does, and counts

        z = Σ p_s m_s + (p_s / q_s) (y − m_s),

    with p_s the stratum's share, y the share of its samples with the outcome and m_s a guess of that. The mean of z is
    the rate, whatever q and m are; after each round of trials both are chosen anew. The interval is that of bets
    (`flipproof.campaigns.betting`): it holds at every moment with the confidence asked for, so stopping early does not
    spoil it. It is over the faults and the samples given: it does not speak of other samples. The estimate itself is
    unbiased for a number of trials fixed before; stopping when the interval is narrow pulls rare rates down a little.

    Args:
        model: as for `assess`, and so are `format`, `where`, `seed`, `device`, `output`, `decision`, `cache_bytes`
            and `audit`.
        data: labelled batches.
        faults: `fp.RandomBits(1)`, a single flip anywhere, or `fp.BitPosition(bit)` of neurons; `fp.RandomBits([…])` or
            `fp.BitErrorRate([…])`, each point by itself. ``sampling="uniform"`` takes any fault model.
        format: how values are stored.
        where: what is hit.
        of: what is to be known to ± `margin`: "critical_total" (critical SDC + DUE), an outcome, or one of `metrics`.
        margin: half-width of its interval, in its unit: 0.01 is a hundredth of all samples.
        confidence: of all intervals, each for itself.
        sampling: "stratified", or "uniform": faults as the fault model draws them, with the same interval and stopping
            rule.
        images: samples a trial runs, drawn at random, at most: one for single flips, all of them otherwise. One says
            most about a rate for each forward; more are quicker by the clock where a forward of one sample is no
            quicker than that of several. The network answers batches of so many, also in the golden run.
        trials: at a point, at most.
        metrics: names, functions, torchmetrics objects or a mapping, as for `assess`. With `images` they have to be
            means over samples, as accuracy is.
        seed: of all draws.
        journal: file to write and resume, JSON lines: one a trial. What is found does not depend on interruptions.
        workers: processes. What is found does not depend on their number.
        client: see `assess`.
        progress: show a progress bar; None shows it on a terminal.
        device: where to run; None is where the model is.
        output: picks the tensor to judge out of what the model returns.
        task: what the model is for, see `assess`.
        decision: how outputs become classes.
        cache_bytes: memory for golden activations.
        audit: share of the trials that run again whole, uncached, on a fresh copy of the model.

    Returns:
        Estimates with intervals, and what was drawn of each stratum.

    Raises:
        ConfigError: on a quantity that is not there or has no bounds, another `sampling`, or faults and spaces that
            there are no strata for.
        FlipproofError: one of its kinds, as for `assess`.

    Warns:
        FlipproofWarning: if `trials` did not suffice for the margin.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net, x = torch.nn.Linear(4, 3), torch.randn(50, 4)
        >>> data = [(x, net(x).argmax(dim=1))]
        >>> found = fp.estimate_rates(net, data, faults=fp.RandomBits(1), margin=0.05)
        >>> row = found.table.iloc[0]
        >>> bool(row["critical_total_low"] <= row["critical_total"] <= row["critical_total_high"])
        True
        >>> bool(row["met"]), round(float(found.strata["share"].sum()), 9)
        (True, 1.0)
    """
    _check(faults, of, sampling, images, margin)
    single = all(point.single_upset for point in faults.points())
    images = 1 if images is None and single else images
    with ready(
        model,
        data,
        faults=faults,
        format=format,
        where=where,
        plan=Plan(trials, margin, confidence),
        metrics=metrics,
        seed=seed,
        journal=journal,
        workers=workers,
        device=device,
        output=output,
        task=task_of(task, decision),
        cache_bytes=cache_bytes,
        audit=audit,
        depth=4,
        verb="estimate_rates",
        images=images,
        parts=partial(_strata_of, sampling),
    ) as runner:
        if metrics is None:  # others of the task have no bounds, or are no means over samples
            runner.metrics = runner.metrics[:1]
        quantities = _quantities(runner, of, images)
        work = _Draws(runner, images is not None)
        settings = {"of": of, "margin": margin, "confidence": confidence, "sampling": sampling, "images": images}
        about = asdict(fingerprint_of(runner, faults, where or Parameters()))
        header = RateHeader({**about, "metrics": list(about["metrics"]), **settings})
        file = Journal(journal, RateHeader, Drawn, kind=KIND) if journal is not None else None
        with written(file, header) as known:
            off = file.switched_off if file is not None else frozenset()
            switch_off(runner, off)
            take_shortcuts(runner, cache_bytes, off)
            kept: dict[Key, Drawn] = {record.key: record for record in known}
            points = [
                _Point(runner, faults_of, numbers, quantities, of, margin, confidence)
                for faults_of, numbers in _points(runner)
            ]
            work.audit_first(points)
            with (
                noting(file),
                crew(
                    work,
                    workers=workers,
                    client=client,
                    journal=file,
                    total=len(points) * trials,
                    done=0,
                    progress=progress,
                    label=work.describe,
                ) as hands,
            ):
                for point in points:
                    while not point.enough and point.drawn < trials:
                        keys = point.next(trials)
                        for record in hands.run([key for key in keys if key not in kept]):
                            kept[record.key] = record
                        point.take([kept[key] for key in keys])
                    hands.skip((0, 0), trials - point.drawn)
        found = RateEstimate(
            of=of,
            table=pd.DataFrame([point.row() for point in points]),
            strata=pd.concat([point.strata() for point in points], ignore_index=True),
            bits=runner.space.bits,
            samples=runner.faulty.batches.samples,
            coverage=runner.space.coverage,
            left_out=dict(runner.space.left_out),
        )
    missed = [point for point in points if not point.enough]
    if missed:
        low, high = missed[0].interval(of)
        warnings.warn(
            f"{trials} trials say no more about {of} than ± {(high - low) / 2:.2g} at {missed[0].faults!r}; "
            f"{len(missed)} of {len(points)} points miss the margin {margin:g}. Raise trials=, or the margin",
            FlipproofWarning,
            stacklevel=2,
        )
    return found


@dataclass(frozen=True)
class RateEstimate:
    """Rates with their intervals: what `estimate_rates` found.

    Attributes:
        of: the quantity that is known to the margin.
        table: a row a point: what names it, each quantity with `_low` and `_high`, `trials` that were run, `images`
            that they ran, and `met`, whether the margin was.
        strata: a row a stratum: its `point`, `name` and `share` of the faults, `trials` in it and the `mean` of the
            quantity there. Faults that provably change nothing are the row "changes nothing", without trials.
        bits: that can be hit.
        samples: that the rates speak of.
        coverage: bits that can be hit ÷ all.
        left_out: what cannot be hit, and why.
    """

    of: str
    table: pd.DataFrame = field(repr=False)
    strata: pd.DataFrame = field(repr=False)
    bits: int
    samples: int
    coverage: float
    left_out: Mapping[str, str]


class RateHeader(Identity):
    """What is estimated and how: the first line of the journal of `estimate_rates`."""


@dataclass(frozen=True)
class Drawn:
    """What came of one trial: one line of the journal of `estimate_rates`.

    Attributes:
        stratum: number of the stratum, over all points.
        trial: number of the trial in it.
        samples: that it ran.
        outcomes: samples by outcome.
        metrics: of these samples; None where one is no number.
        digest: tells this draw from any other.
        where: (name, value, bit) of the faults, if they are few and all samples share them.
        audited: whether it ran again, whole, with the same answers.
    """

    stratum: int
    trial: int
    samples: int
    outcomes: dict[str, int]
    metrics: dict[str, float | None]
    digest: str
    where: tuple[tuple[str, int, int], ...]
    audited: bool

    @property
    def key(self) -> tuple[int, int]:
        """Which job it was."""
        return self.stratum, self.trial

    @classmethod
    def of(cls, trial: Trial, shared: bool) -> Drawn:
        """What is kept of a trial."""
        return cls(
            trial.point,
            trial.trial,
            trial.samples,
            trial.outcomes,
            {name: value if isfinite(value) else None for name, value in trial.metrics.items()},
            trial.digest,
            tuple(trial.where) if shared else (),
            trial.audited,
        )

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(self), "where": [list(place) for place in self.where]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Drawn:
        """The inverse of `to_json`."""
        about = Fields(record, "a trial")
        outcomes, metrics = about.inside("outcomes"), about.inside("metrics")
        found = cls(
            about.whole("stratum"),
            about.whole("trial"),
            about.whole("samples", 1),
            {name: outcomes.whole(name) for name in OUTCOMES},
            {name: None if value is None else metrics.number(name) for name, value in about.mapping("metrics").items()},
            about.text("digest"),
            tuple(_place(place) for place in about.take("where")),
            about.flag("audited"),
        )
        outcomes.end()
        about.end()
        if sum(found.outcomes.values()) != found.samples:
            raise ConfigError(f"a trial: outcomes sum to {sum(found.outcomes.values())}, not to {found.samples}")
        return found

    def value(self, name: str, scale: Scale) -> float:
        """A quantity of this trial, from 0 to 1 over its range; a metric that is no number is at its worst."""
        if name in HARM:
            names = ("critical_sdc", "due") if name == "critical_total" else (name,)
            return sum(self.outcomes[part] for part in names) / self.samples
        found, (low, high) = self.metrics[name], scale.range
        if found is None:
            found = scale.worst
        if isnan(found) or not low <= found <= high:
            raise DataError(
                f"the metric {name} gave {found!r} under faults, expected a number from {low:g} to {high:g}"
            )
        return (found - low) / (high - low)


def _place(place: Any) -> tuple[str, int, int]:
    about = Fields(dict(zip(("name", "value", "bit"), place, strict=True)), "where")
    return about.text("name"), about.whole("value"), about.whole("bit")


class _Draws:
    """Runs trials of strata, each on all samples or on a batch drawn at random.

    Args:
        runner: whose points are the strata.
        divided: whether a trial runs one batch.
    """

    def __init__(self, runner: TrialRunner, divided: bool) -> None:
        self._runner, self._divided = runner, divided

    def __call__(self, stratum: int, trial: int) -> Drawn:
        """Run one trial."""
        runner, batch = self._runner, None
        if self._divided:
            batches = runner.faulty.batches
            chosen = TrialGenerator(runner.seed, f"samples of {runner.points[stratum]!r}", trial)
            sample = int(chosen.below(batches.samples, 1)[0])
            batch = int(np.searchsorted(batches.borders, sample, side="right")) - 1
        return Drawn.of(runner(stratum, trial, batch), runner.space.samples is None)

    def audit_first(self, points: Sequence[_Point]) -> None:
        """Audit the first trials of the first point in any case."""
        audit = self._runner.audit
        if audit is not None:
            first = frozenset((int(s), int(t)) for s, t in points[0].next(5))
            self._runner.audit = replace(audit, first=first)

    @property
    def serial_only(self) -> str:
        """Why trials cannot be given to worker processes."""
        return self._runner.serial_only

    def describe(self, key: Key) -> str:
        """A trial in words."""
        return f"{self._runner.points[int(key[0])]!r}, trial {key[1]}"

    def recover(self) -> None:
        """Give memory back to a device that ran out of it."""
        self._runner.recover()

    def wake(self) -> None:
        """In another process."""
        self._runner.wake()

    def differs(self) -> str:
        """How this copy of the model answers otherwise without faults."""
        return self._runner.differs()


@dataclass
class _Quantity:
    """What is estimated about one quantity at one point."""

    scale: Scale
    belief: Belief
    bets: Bets


class _Point:
    """One point: what was drawn there, and what is to be drawn next.

    Args:
        runner: of the trials.
        faults: the point.
        numbers: of its strata among all.
        quantities: the scale of each.
        of: the one that says when it is enough.
        margin: of that.
        confidence: of the intervals.
    """

    def __init__(
        self,
        runner: TrialRunner,
        faults: FaultModel,
        numbers: range,
        quantities: Mapping[str, Scale],
        of: str,
        margin: float,
        confidence: float,
    ) -> None:
        self.faults, self._numbers, self._of, self._confidence = faults, numbers, of, confidence
        first = runner.points[numbers.start]
        self._population = first.population if isinstance(first, Within) else Everything(faults)
        self._seed, self.repeats = runner.seed, runner.repeats(faults)
        self._uniform = not isinstance(first, Within)
        self.drawn = self.images = 0
        self.taken = np.zeros(len(numbers), np.int64)
        golden = {
            metric.name: metric.measure(
                runner.faulty.golden, runner.faulty.batches.targets, runner.judge, runner.faulty.golden
            )
            for metric in runner.metrics
        }
        self._quantities = {
            name: self._begin(name, scale, golden.get(name, float(name == "masked")))
            for name, scale in quantities.items()
        }
        self._without = golden.get(of, float(of == "masked"))
        low, high = quantities[of].range
        self._margin = margin / (high - low)
        self._rounds: list[tuple[FloatArray, dict[str, tuple[float, float]]]] = []
        self._plan()

    def _begin(self, name: str, scale: Scale, golden: float) -> _Quantity:
        population, (low, high) = self._population, scale.range
        without = (golden - low) / (high - low)
        bad = 0.0 if name not in OUTCOMES or name in ("masked", "non_critical_sdc") else 1.0
        bad = 1.0 if name == "critical_total" else bad
        prior = without + (bad - without) * population.harm
        belief = Belief(population.shares, population.groups, prior, population.same * without)
        return _Quantity(scale, belief, Bets(0.0, 1.0, bettors=2))

    def _plan(self) -> None:
        """Choose where to draw next and what to bet on it."""
        main = self._quantities[self._of].belief
        if self._uniform or main.shares.size == 1:
            self._q = main.shares / main.shares.sum()
        else:
            self._q = allocation(main, self._margin, self._confidence)
        self._stakes = {name: self._staked(name, one) for name, one in self._quantities.items()}

    def _staked(self, name: str, one: _Quantity) -> list[tuple[float, float]]:
        """What both bettors stake on a quantity: by what is believed of the strata, and by the latest draws."""
        splits = SPLITS if name == self._of else (0.5,)
        plausible = one.bets.interval(self._confidence)
        believed = stakes(one.belief, self._q, self._margin, splits, plausible)
        if not len(one.bets):
            return [believed, believed]
        return [believed, stakes_seen(*one.bets.latest, one.belief, self._q, self._margin, splits, plausible)]

    def next(self, most: int) -> list[Key]:
        """The trials of the next round."""
        count = 1 if self.repeats else max(LEAST, self.drawn // GROWTH) if self.drawn else FIRST
        count = min(count, most - self.drawn)
        generator = TrialGenerator(self._seed, f"strata of {self.faults!r}", self.drawn)
        uniform = generator.below(2**53, count) / 2**53
        strata = np.minimum(np.searchsorted(np.cumsum(self._q), uniform, side="right"), self._q.size - 1)
        ahead = np.zeros_like(self.taken)
        keys: list[Key] = []
        for stratum in strata.tolist():
            keys.append((self._numbers.start + stratum, int(self.taken[stratum] + ahead[stratum])))
            ahead[stratum] += 1
        return keys

    def take(self, records: Sequence[Drawn]) -> None:
        """What came of the trials of a round, in their order."""
        strata = np.array([record.stratum - self._numbers.start for record in records], np.int64)
        for name, one in self._quantities.items():
            values = np.array([record.value(name, one.scale) for record in records])
            belief, weights = one.belief, one.belief.shares / self._q
            below, above = belief.range(weights)
            middle = belief.mean
            one.bets.add(
                middle + weights[strata] * (values - belief.means[strata]),
                within=(middle - below, middle + above),
                stakes=self._stakes[name],
            )
            belief.learn(strata, values)
        np.add.at(self.taken, strata, 1)
        self.drawn += len(records)
        self.images += sum(record.samples for record in records)
        self._plan()

    def interval(self, name: str) -> tuple[float, float]:
        """Of a quantity, in its unit."""
        one = self._quantities[name]
        low, high = one.scale.range
        if self.repeats and self.drawn:
            return self._mean(name), self._mean(name)
        ends = one.bets.interval(self._confidence)
        return low + (high - low) * ends[0], low + (high - low) * ends[1]

    def _mean(self, name: str) -> float:
        one = self._quantities[name]
        low, high = one.scale.range
        return low + (high - low) * min(max(one.bets.mean, 0.0), 1.0)

    @property
    def enough(self) -> bool:
        """Whether the margin is met."""
        low, high = self._quantities[self._of].scale.range
        ends = self.interval(self._of)
        return bool(self.drawn) and (ends[1] - ends[0]) / 2 <= self._margin * (high - low)

    def row(self) -> dict[str, Any]:
        """Of the table."""
        found: dict[str, Any] = dict(self.faults.coordinates())
        for name in self._quantities:
            low, high = self.interval(name)
            found |= {name: self._mean(name), f"{name}_low": low, f"{name}_high": high}
        return {**found, "trials": self.drawn, "images": self.images, "met": self.enough}

    def strata(self) -> pd.DataFrame:
        """Of what was drawn."""
        one = self._quantities[self._of]
        low, high = one.scale.range
        with np.errstate(invalid="ignore"):
            means = low + (high - low) * one.belief.sums / np.where(one.belief.drawn > 0, one.belief.drawn, np.nan)
        names = [stratum.name for stratum in self._population.strata]
        table = pd.DataFrame({"name": names, "share": self._population.shares, "trials": self.taken, "mean": means})
        if self._population.same:
            rest = {"name": "changes nothing", "share": self._population.same, "trials": 0, "mean": self._without}
            table = pd.concat([table, pd.DataFrame([rest])], ignore_index=True)
        table.insert(0, "point", repr(self.faults))
        return table


def _check(faults: object, of: object, sampling: object, images: object, margin: object) -> None:
    """Refuse what `ready` does not look at."""
    if sampling not in ("stratified", "uniform"):
        raise ConfigError(f"estimate_rates samples 'stratified' or 'uniform', got sampling={sampling!r}")
    if margin is None:
        raise ConfigError("estimate_rates takes a number between 0 and 1 for margin=, got None")
    if images is not None and (isinstance(images, bool) or not isinstance(images, int) or images < 1):
        raise ConfigError(f"estimate_rates takes a whole number from 1 for images=, got {images!r}")
    if not isinstance(of, str):
        raise ConfigError(f"estimate_rates takes the name of an outcome or metric for of=, got {of!r}")
    if not isinstance(faults, FaultModel):
        raise ConfigError(f"faults= takes a fault model such as fp.RandomBits(1), got {faults!r}")
    if isinstance(faults, BitErrorRate) and faults.nested:
        raise ConfigError("estimate_rates draws each rate by itself: leave out nested=True, or take assess")


def _strata_of(sampling: str, space: Space, points: tuple[FaultModel, ...]) -> tuple[FaultModel, ...]:
    """What is drawn instead of the points: their strata, point by point."""
    if sampling == "uniform":
        return points
    found: list[FaultModel] = []
    single: SingleBits | None = None
    huge = None
    for point in points:
        population: Population
        bits = point._single() if isinstance(point, RandomBits) else None
        if isinstance(space, NeuronSpace) and isinstance(point, (RandomBits, BitPosition)):
            population = NeuronBits(space, point._single() if isinstance(point, BitPosition) else None)
        elif not isinstance(space, FaultSpace):
            raise ConfigError(f"there are no strata for faults in a {type(space).__name__}: pass sampling='uniform'")
        elif bits == 1:
            population = single = single or SingleBits(space)
        elif bits is not None or (isinstance(point, BitErrorRate) and point.spread == "bits"):
            huge = huge or huge_flips(space)
            rate = point if isinstance(point, BitErrorRate) else None
            population = FlipCounts(point, space, *huge, flips=bits, rate=rate)
        else:
            raise ConfigError(
                f"there are no strata for {point!r} in stored bits: faults= takes fp.RandomBits or "
                f"fp.BitErrorRate(…, spread='bits'); pass sampling='uniform' for others"
            )
        found += [Within(point, part.name, i, population) for i, part in enumerate(population.strata)]
    return tuple(found)


def _points(runner: TrialRunner) -> Iterator[tuple[FaultModel, range]]:
    """Each point with the numbers of its strata."""
    whole = [part.faults if isinstance(part, Within) else part for part in runner.points]
    first = 0
    for i in range(1, len(whole) + 1):
        if i == len(whole) or whole[i] is not whole[first]:
            yield whole[first], range(first, i)
            first = i


def _quantities(runner: TrialRunner, of: str, images: int | None) -> dict[str, Scale]:
    """What is estimated: outcomes, and metrics that have bounds."""
    found = {name: SHARE if name == "masked" else LOSS for name in HARM}
    metrics = {metric.name: metric.scale for metric in runner.metrics}
    if of not in (*found, *metrics):
        raise ConfigError(f"of= takes one of {', '.join([*found, *metrics])}, got {of!r}")
    for name, scale in metrics.items():
        if not all(map(isfinite, scale.range)):
            raise ConfigError(
                f"the metric {name} has no bounds, and an interval that holds for any distribution needs them: say its "
                f"range by fp.Metric, or leave it out of metrics="
            )
        if (
            images is not None
            and not scale.per_sample
            and name != runner.judge.main
            and len(runner.faulty.batches.sizes) > 1
        ):
            raise ConfigError(
                f"a trial runs {images} of {runner.faulty.batches.samples} samples here, and {name} is not known to be "
                f"a mean over samples, as accuracy is. Pass one batch of all samples and images= as many, or leave "
                f"{name} out of metrics="
            )
        found[name] = scale
    return {of: found[of], **{name: scale for name, scale in found.items() if name != of}}
