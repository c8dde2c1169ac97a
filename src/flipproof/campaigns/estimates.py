"""What the trials of one point say of a number: over trials, over samples, over both, and what rare flips could do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from flipproof.campaigns.answers import (
    Bytes,
    Crossed,
    crossed,
    crossed_difference,
    decode_answers,
    decode_golden,
    holds,
)
from flipproof.campaigns.plan import Header
from flipproof.campaigns.record import Trial
from flipproof.campaigns.statistics import (
    Interval,
    difference_interval,
    level_at_looks,
    mean_interval,
    tail,
    two_way_interval,
)
from flipproof.campaigns.strata import stratified_rate
from flipproof.running.scales import Scale, scale_of

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
    records: Sequence[Trial]

    @property
    def exact(self) -> bool:
        """Nothing is drawn at random: one trial says everything about these samples."""
        return bool(self.header.points[self.records[0].point].repeats)

    @property
    def fault_free(self) -> bool:
        """No bit is flipped: the rate, times the bits, rounds to none."""
        return self.exact and self.records[0].flips == 0

    @property
    def confidence(self) -> float:
        """Of all intervals."""
        return float(self.header.plan.confidence)

    @property
    def level(self) -> float:
        """At which intervals over trials are taken, see `level_at_looks`."""
        return level_at_looks(self.confidence, self.header.plan.margin)

    @cached_property
    def golden(self) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Which samples are correct without faults; None if the journal does not say."""
        text = self.header.golden_answers
        return None if text is None else decode_golden(text, self.records[0].samples)

    @cached_property
    def codes(self) -> list[Bytes] | None:
        """How each sample of each trial ended; None if a record does not say."""
        if self.golden is None or any(record.answers is None for record in self.records):
            return None
        return [decode_answers(str(record.answers), self.golden) for record in self.records]

    @cached_property
    def shares(self) -> dict[str, float] | None:
        """In a neuron campaign, the probability with which a trial draws each layer; else None."""
        if any(record.layer is None for record in self.records):
            return None
        bit = self.header.points[self.records[0].point].coordinates.get("bit")
        sizes = {
            site.name: site.bits if bit is None else site.values if bit * site.values < site.bits else 0
            for site in self.header.stored
        }
        total = sum(sizes.values())
        return {name: size / total for name, size in sizes.items()}

    def values(self, name: str) -> list[float]:
        """A metric, or an outcome's share of the samples, per trial; "critical_total" is critical SDC plus DUE."""
        if name in self.records[0].metrics:
            return [record.metrics[name] for record in self.records]
        names = ("critical_sdc", "due") if name == "critical_total" else (name,)
        return [sum(record.outcomes[part] for part in names) / record.samples for record in self.records]

    def over_trials(self, name: str) -> tuple[float, float, float]:
        """Mean and interval over trials: stratified by layer in neuron campaigns, else `mean_interval`."""
        values, scale = self.values(name), scale_in(self.header, name)
        mean = values[0] if len(set(values)) == 1 else float(np.mean(values))  # equal values: no rounding error
        if self.exact:
            return mean, mean, mean
        if self.shares is not None and name not in self.records[0].metrics:
            return self.stratified(np.multiply(values, self.records[0].samples))
        if self.shares is not None and scale.per_sample and self.codes is not None and self.golden is not None:
            golden = self.golden.astype(np.int8)
            change = Crossed.of(holds(code, "correct") - golden for code in self.codes)
            less, low, high = self.stratified(change.plus, change.minus)
            start = float(self.golden.mean())
            return start + less, max(0.0, start + low), min(1.0, start + high)
        return mean, *mean_interval(values, confidence=self.level, bounds=scale.range)

    def stratified(self, plus: Any, minus: Any = None) -> tuple[float, float, float]:
        """Mean and interval of a rate of upsets, or of a rate less another one (`stratified_rate`; MOVER)."""
        assert self.shares is not None
        layers, samples = [str(record.layer) for record in self.records], self.records[0].samples
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
        if counted is None or self.codes is None:
            return Estimate(mean, (ends[0], ends[1]), tail=rest)
        if self.fault_free and counted != "correct":
            return Estimate(mean, (mean, mean), (mean, mean), (mean, mean), rest)
        table = crossed(self.codes, counted)
        return _over_samples(mean, (ends[0], ends[1]), [table], table.sample_means, self.confidence, (0.0, 1.0), rest)

    def drop(self, name: str) -> Estimate:
        """The fault-free value less the mean."""
        golden = float(self.header.golden[name])
        mean, low, high = self.over_trials(name)
        trials, known = (golden - high, golden - low), self.codes is not None and self.golden is not None
        if self.fault_free:
            return Estimate(golden - mean, trials, trials, trials)
        if not scale_in(self.header, name).per_sample or not known:
            return Estimate(golden - mean, trials)
        assert self.codes is not None
        assert self.golden is not None
        before = self.golden.astype(np.int8)
        table = Crossed.of(before - holds(code, "correct") for code in self.codes)
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
        draws: "identical": the same campaign, so that nothing can differ; "paired": the same faults trial by trial;
            "independent": other faults; "exact": neither draws anything at random; "none": nothing to compare with.
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
    if counted is None or one.codes is None or other.codes is None:
        return Gain(Estimate(mean, ends), "paired", len(one.records))
    table = crossed_difference(one.codes, other.codes, counted)
    if one.shares is not None and one.shares == other.shares:
        mean, *strata = one.stratified(table.plus, table.minus)
        ends = (strata[0], strata[1])
    found = _over_samples(mean, ends, [table], table.sample_means, one.confidence, bounds)
    return Gain(found, "paired", len(one.records))


def identical(ours: Point, theirs: Point) -> bool:
    """The same campaign, point and records: whatever trials were added, both would show the same."""
    if ours.header.identity != theirs.header.identity or ours.records[0].coordinates != theirs.records[0].coordinates:
        return False
    others = {record.trial: record for record in theirs.records}
    both = [(record, others[record.trial]) for record in ours.records if record.trial in others]
    return bool(both) and all(
        (one.digest, one.outcomes, one.answers) == (other.digest, other.outcomes, other.answers)
        and repr(one.metrics) == repr(other.metrics)
        for one, other in both
    )


def paired(ours: Point, theirs: Point) -> tuple[Point | None, Point | None]:
    """Both points with the trials that both have, if they drew the same faults in each of them; else None."""
    if ours.exact or theirs.exact:
        return None, None
    others = {record.trial: record for record in theirs.records}
    mine = [record for record in ours.records if record.trial in others]
    if len(mine) < 2 or any(record.digest != others[record.trial].digest for record in mine):
        return None, None
    return Point(ours.header, mine), Point(theirs.header, [others[record.trial] for record in mine])


def _independent(ours: Point, theirs: Point, name: str) -> Gain:
    mean, low, high = ours.over_trials(name)
    other, other_low, other_high = theirs.over_trials(name)
    ends = difference_interval(mean, (low, high), other, (other_low, other_high))
    draws: Draws = "exact" if ours.exact and theirs.exact else "independent"
    counted = _counted(ours, name)
    if counted is None or ours.codes is None or theirs.codes is None:
        return Gain(Estimate(mean - other, ends), draws, len(ours.records))
    if ours.fault_free and theirs.fault_free and counted != "correct":
        return Gain(Estimate(mean - other, ends, ends, ends), draws, len(ours.records))
    tables = [crossed(ours.codes, counted), crossed(theirs.codes, counted)]
    by_sample = tables[0].sample_means - tables[1].sample_means
    found = _over_samples(mean - other, ends, tables, by_sample, ours.confidence, (-1.0, 1.0))
    return Gain(found, draws, len(ours.records))


def _counted(point: Point, name: str) -> str | None:
    """The rate of samples that a column is, if it is one."""
    if name in point.records[0].metrics:
        return "correct" if scale_in(point.header, name).per_sample else None
    return name
