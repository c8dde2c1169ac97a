"""What the trials of one point say of a number: over trials, over samples, over both, and what rare flips could do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from flipproof.campaigns.answers import Crossed, crossed_difference, rows_of
from flipproof.campaigns.plan import Header
from flipproof.campaigns.records import Records
from flipproof.campaigns.statistics import (
    Interval,
    difference_interval,
    level_at_looks,
    mean_interval,
    tail,
    two_way_interval,
)
from flipproof.campaigns.strata import stratified_rate
from flipproof.running.scales import OUTCOMES, Scale, scale_of

UNKNOWN: Interval = (float("nan"), float("nan"))


@dataclass(frozen=True)
class Estimate:
    """A mean and how far it can be off.

    Attributes:
        mean: over trials (in a neuron campaign each layer counts as often as it should be drawn).
        trials: interval over trials, for these samples.
        samples: interval over samples, for these trials.
        both: interval over trials and samples.
        tail: what a rare kind of trial that was not seen could still do to the mean.
    """

    mean: float
    trials: Interval
    samples: Interval = UNKNOWN
    both: Interval = UNKNOWN
    tail: float = float("nan")

    def columns(self, name: str) -> dict[str, float]:
        """As columns of a table: `name`, `name_low`, `name_high`, `name_samples_low`, …, `name_both_high`."""
        row = {name: self.mean, f"{name}_low": self.trials[0], f"{name}_high": self.trials[1]}
        row |= {f"{name}_samples_low": self.samples[0], f"{name}_samples_high": self.samples[1]}
        return row | {f"{name}_both_low": self.both[0], f"{name}_both_high": self.both[1]}


def scale_in(header: Header, name: str) -> Scale:
    """What a column means, as its campaign recorded it."""
    recorded = header.metrics.get(name)
    return scale_of(name) if recorded is None else recorded


@dataclass(frozen=True)
class Point:
    """The trials of one point of a campaign.

    Attributes:
        header: of the campaign.
        records: of this point, ordered by trial; at least one.
    """

    header: Header
    records: Records
    _known: dict[str, tuple[float, float, float]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def exact(self) -> bool:
        """Nothing is drawn at random: one trial says everything about these samples."""
        return bool(self.header.points[self.index].repeats)

    @cached_property
    def index(self) -> int:
        """Of the point in its sweep."""
        return int(self.records.column("point")[0])

    @property
    def fault_free(self) -> bool:
        """No bit is flipped: the rate, times the bits, rounds to none."""
        return self.exact and int(self.records.column("flips")[0]) == 0

    @property
    def confidence(self) -> float:
        """Of all intervals."""
        return float(self.header.plan.confidence)

    @property
    def level(self) -> float:
        """At which intervals over trials are taken, see `level_at_looks`."""
        return level_at_looks(self.confidence, self.header.plan.margin)

    @property
    def golden(self) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Which samples are correct without faults; None if the journal does not say."""
        return self.records.golden

    @cached_property
    def answered(self) -> bool:
        """Whether the journal says how each sample of each trial ended."""
        return self.records.answered

    @cached_property
    def shares(self) -> dict[str, float] | None:
        """In a neuron campaign, the probability with which a trial draws each layer; else None."""
        if (self.records.column("layer") < 0).any():
            return None
        bit = self.header.points[self.index].coordinates.get("bit")
        sizes = {
            site.name: site.bits if bit is None else site.values if bit * site.values < site.bits else 0
            for site in self.header.stored
        }
        total = sum(sizes.values())
        return {name: size / total for name, size in sizes.items()}

    def values(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """A metric, or an outcome's share of the samples, per trial; "critical_total" is critical SDC plus DUE."""
        if name in self.header.golden:
            return self.records.metric(name)
        names = ("critical_sdc", "due") if name == "critical_total" else (name,)
        return np.asarray(self._counts(*names) / self.records.samples)

    def _counts(self, *names: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Samples with any of these outcomes, per trial."""
        return np.asarray(np.sum([self.records.column(name).astype(np.int64) for name in names], axis=0))

    def table(self, counted: str) -> Crossed:
        """Trials × samples: 1 where an outcome was, or "critical_total", or the sample was "correct"."""
        tally = self.records.tally
        if counted == "correct":
            plus, codes = tally.right, [4, 5, 6, 7]
        else:
            names = ("critical_sdc", "due") if counted == "critical_total" else (counted,)
            plus = self._counts(*names)
            codes = [OUTCOMES.index(part) + right for part in names for right in (0, 4)]
        return Crossed(plus, np.zeros_like(plus), tally.by_sample[codes].sum(axis=0))

    def lost(self) -> Crossed:
        """Trials × samples: 1 where a sample that is correct without faults was not, −1 the other way round."""
        assert self.golden is not None
        tally, golden = self.records.tally, self.golden.astype(np.int64)
        sums = len(tally.right) * golden - tally.by_sample[4:].sum(axis=0)
        return Crossed(golden.sum() - tally.kept, tally.right - tally.kept, sums)

    def over_trials(self, name: str) -> tuple[float, float, float]:
        """As `_over_trials`, asked once."""
        if name not in self._known:
            self._known[name] = self._over_trials(name)
        return self._known[name]

    def _over_trials(self, name: str) -> tuple[float, float, float]:
        """Mean and interval over trials: stratified by layer in neuron campaigns, else `mean_interval`."""
        values, scale = self.values(name), scale_in(self.header, name)
        mean = float(values[0] if (values == values[0]).all() else np.mean(values))  # equal values: no rounding error
        if self.exact:
            return mean, mean, mean
        if self.shares is not None and name not in self.header.golden:
            return self.stratified(np.multiply(values, self.records.samples))
        if self.shares is not None and scale.per_sample and self.answered and self.golden is not None:
            lost = self.lost()
            less, low, high = self.stratified(lost.minus, lost.plus)
            start = float(self.golden.mean())
            return start + less, max(0.0, start + low), min(1.0, start + high)
        return mean, *mean_interval(values, confidence=self.level, bounds=scale.range)

    def stratified(self, plus: Any, minus: Any = None) -> tuple[float, float, float]:
        """Mean and interval of a rate of upsets, or of a rate less another one (`stratified_rate`; MOVER)."""
        assert self.shares is not None
        layers, samples = [str(layer) for layer in self.records.texts("layer")], self.records.samples
        one, *ends = stratified_rate(plus, samples, layers, self.shares, confidence=self.level)
        if minus is None:
            return one, ends[0], ends[1]
        other, *others = stratified_rate(minus, samples, layers, self.shares, confidence=self.level)
        return one - other, *difference_interval(one, (ends[0], ends[1]), other, (others[0], others[1]))

    def estimate(self, name: str) -> Estimate:
        """A metric or outcome rate with all its intervals."""
        mean, *ends = self.over_trials(name)
        scale = scale_in(self.header, name)
        rest = mean if self.exact else tail(mean, len(self.records), scale.worst, confidence=self.confidence)
        counted = _counted(self, name)
        if counted is None or not self.answered:
            return Estimate(mean, (ends[0], ends[1]), tail=rest)
        if self.fault_free and counted != "correct":
            return Estimate(mean, (mean, mean), (mean, mean), (mean, mean), rest)
        table = self.table(counted)
        return _over_samples(mean, (ends[0], ends[1]), [table], table.sample_means, self.confidence, (0.0, 1.0), rest)

    def drop(self, name: str) -> Estimate:
        """The fault-free value less the mean."""
        golden = float(self.header.golden[name])
        mean, low, high = self.over_trials(name)
        trials = (golden - high, golden - low)
        if self.fault_free:
            return Estimate(golden - mean, trials, trials, trials)
        if not scale_in(self.header, name).per_sample or self.golden is None or not self.answered:
            return Estimate(golden - mean, trials)
        table = self.lost()
        return _over_samples(golden - mean, trials, [table], table.sample_means, self.confidence, (-1.0, 1.0))


def _over_samples(
    mean: float,
    trials: Interval,
    tables: Sequence[Crossed],
    by_sample: Any,
    confidence: float,
    bounds: Interval,
    rest: float = float("nan"),
) -> Estimate:
    """Adds the interval of the mean over samples, and the two-way one."""
    centre = float(np.mean(by_sample))
    low, high = mean_interval(by_sample, confidence=confidence, bounds=bounds)
    samples = (max(bounds[0], mean - (centre - low)), min(bounds[1], mean + (high - centre)))
    residual = sum(table.residual / (len(table.plus) * table.samples) for table in tables)
    both = two_way_interval(mean, trials, samples, residual, confidence=confidence, bounds=bounds)
    return Estimate(mean, trials, samples, both, rest)


Draws = Literal["identical", "paired", "independent", "exact", "none"]


@dataclass(frozen=True)
class Gain:
    """What one point has more than another one.

    Attributes:
        estimate: ours − theirs.
        draws: "identical": the same campaign, so that nothing can differ; "paired": the same faults trial by trial, or
            from the same random numbers; "independent": other faults; "exact": neither draws anything at random;
            "none": nothing to compare with.
        trials: how many trials of ours it rests on.
    """

    estimate: Estimate
    draws: Draws
    trials: int


def gain(ours: Point, theirs: Point | None, name: str) -> Gain:
    """The difference of a metric or rate between two points, of the paired trials where both drew the same faults."""
    unknown = float("nan")
    if theirs is None:
        return Gain(Estimate(unknown, UNKNOWN), "none", 0)
    if identical(ours, theirs):
        return Gain(Estimate(0.0, (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)), "identical", len(ours.records))
    one, other = paired(ours, theirs)
    if one is None or other is None:
        return _independent(ours, theirs, name)
    scale = scale_in(ours.header, name)
    low, high = scale.range
    bounds = (low - high, high - low)
    with np.errstate(invalid="ignore"):  # ∞ − ∞ is not known, and said to be
        differences = np.subtract(one.values(name), other.values(name))
    mean = float(differences[0]) if len(set(differences.tolist())) == 1 else float(differences.mean())
    level = max(one.level, other.level)
    ends = mean_interval(differences, confidence=level, bounds=bounds)
    counted = _counted(one, name)
    if counted is None or not one.answered or not other.answered:
        return Gain(Estimate(mean, ends), "paired", len(one.records))
    table = crossed_difference(one.records.codes(), other.records.codes(), counted)
    if one.shares is not None and one.shares == other.shares:
        mean, *strata = one.stratified(table.plus, table.minus)
        ends = (strata[0], strata[1])
    found = _over_samples(mean, ends, [table], table.sample_means, one.confidence, bounds)
    return Gain(found, "paired", len(one.records))


def identical(ours: Point, theirs: Point) -> bool:
    """The same campaign, point and records: whatever trials were added, both would show the same."""
    here, there = ours.header.points[ours.index], theirs.header.points[theirs.index]
    if ours.header.identity != theirs.header.identity or here.coordinates != there.coordinates:
        return False
    one, other = _shared(ours.records, theirs.records)
    if not len(one):
        return False
    names = ("digest", *OUTCOMES)
    return (
        all(np.array_equal(one.column(name), other.column(name)) for name in names)
        and all(np.array_equal(one.metric(name), other.metric(name), equal_nan=True) for name in ours.header.golden)
        and one.answered == other.answered
        and all(np.array_equal(a, b) for a, b in zip(rows_of(one.codes()), rows_of(other.codes()), strict=True))
    )


def _shared(ours: Records, theirs: Records) -> tuple[Records, Records]:
    """The trials of both whose numbers both have."""
    _, mine, others = np.intersect1d(ours.column("trial"), theirs.column("trial"), return_indices=True)
    return ours.select(mine), theirs.select(others)


def paired(ours: Point, theirs: Point) -> tuple[Point | None, Point | None]:
    """Both points with the trials that both have, if faults or random numbers are the same in each; else None."""
    if ours.exact or theirs.exact:
        return None, None
    one, other = _shared(ours.records, theirs.records)
    if len(one) < 2:
        return None, None
    if not _one_stream(ours, theirs) and not np.array_equal(one.column("digest"), other.column("digest")):
        return None, None
    return Point(ours.header, one), Point(theirs.header, other)


def _one_stream(ours: Point, theirs: Point) -> bool:
    """Points of one campaign that draw from the same random numbers."""
    here, there = ours.header.points[ours.index], theirs.header.points[theirs.index]
    return ours.header.identity == theirs.header.identity and here.stream == there.stream != ""


def _independent(ours: Point, theirs: Point, name: str) -> Gain:
    mean, low, high = ours.over_trials(name)
    other, other_low, other_high = theirs.over_trials(name)
    ends = difference_interval(mean, (low, high), other, (other_low, other_high))
    draws: Draws = "exact" if ours.exact and theirs.exact else "independent"
    counted = _counted(ours, name)
    if counted is None or not ours.answered or not theirs.answered:
        return Gain(Estimate(mean - other, ends), draws, len(ours.records))
    if ours.fault_free and theirs.fault_free and counted != "correct":
        return Gain(Estimate(mean - other, ends, ends, ends), draws, len(ours.records))
    tables = [ours.table(counted), theirs.table(counted)]
    by_sample = tables[0].sample_means - tables[1].sample_means
    found = _over_samples(mean - other, ends, tables, by_sample, ours.confidence, (-1.0, 1.0))
    return Gain(found, draws, len(ours.records))


def _counted(point: Point, name: str) -> str | None:
    """The rate of samples that a column is, if it is one."""
    if name in point.header.golden:
        return "correct" if scale_in(point.header, name).per_sample else None
    return name
