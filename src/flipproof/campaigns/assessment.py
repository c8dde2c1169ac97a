"""What a campaign found, as tables: a pure function of its records."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flipproof._files import replacing
from flipproof.campaigns.estimates import Point, scale_in
from flipproof.campaigns.plan import Header
from flipproof.campaigns.record import WORD_OUTCOMES, Trial
from flipproof.campaigns.statistics import all_within, wilson_interval
from flipproof.engine.journal import Journal
from flipproof.errors import ConfigError
from flipproof.running.scales import OUTCOMES, Scale

CHECK_EVERY = 20
"""With `margin`, intervals are looked at after every 20th trial of a point, whatever the number of workers."""


CampaignJournal = Journal[Header, Trial]


def campaign_journal(path: str | os.PathLike[str]) -> CampaignJournal:
    """The journal of a campaign; a record that cannot be of it is refused."""
    return Journal(path, Header, Trial, check=_belongs)


def _belongs(header: Header, trial: Trial) -> None:
    """Raise if a record contradicts its header: point, coordinates, metrics, samples, outcomes."""
    if trial.point >= len(header.points):
        raise ConfigError(f"point {trial.point} of a sweep of {len(header.points)}")
    here = header.points[trial.point].coordinates
    for name, was, expected in (
        ("coordinates", trial.coordinates, dict(here)),
        ("metrics", sorted(trial.metrics), sorted(header.golden)),
        ("outcomes", sorted(trial.outcomes), sorted(OUTCOMES)),
        ("samples", trial.samples, header.fingerprint.samples),
        ("sum of outcomes", sum(trial.outcomes.values()), trial.samples),
    ):
        if was != expected:
            raise ConfigError(f"{name}: expected {expected}, got {was}")
    if trial.flips > trial.faults:
        raise ConfigError(f"flips: expected at most the {trial.faults} faults, got {trial.flips}")


@dataclass(frozen=True)
class Assessment:
    """The records of a campaign and the tables made of them.

    Attributes:
        header: what was assessed: fingerprint, golden run, points, stored sites, plan.
        records: one `Trial` each, ordered by point and trial.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Linear(2, 2)
        >>> result = fp.assess(net, data=[(torch.eye(2), torch.tensor([0, 1]))], faults=fp.RandomBits(3), trials=4)
        >>> len(result.trials), result.summary["flips"].tolist()
        (4, [3.0])
    """

    header: Header
    records: Sequence[Trial] = field(repr=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Assessment:
        """Read a journal, finished or not.

        Raises:
            JournalError: if it is not one.
        """
        header, trials = campaign_journal(path).read()
        return cls(header, answer(trials, header))

    @property
    def golden(self) -> dict[str, float]:
        """Each metric of the fault-free run."""
        return dict(self.header.golden)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics."""
        return list(self.header.golden)

    @property
    def bits(self) -> int:
        """Stored bits that could be hit."""
        return self.header.fingerprint.bits

    @property
    def coverage(self) -> float:
        """Bits that could be hit ÷ all stored bits of the model, see `FaultSpace`; NaN in a journal that lacks it."""
        return self.header.coverage

    @property
    def left_out(self) -> dict[str, str]:
        """What was outside the fault space, and why."""
        return dict(self.header.left_out)

    @cached_property
    def trials(self) -> pd.DataFrame:
        """One row a trial: `point`, `ber`/`bit`/…, `trial`, `flips`, metrics (fractions), samples and words by outcome.

        `corrected`, `detected` and `miscorrected` count the stored words that the trial's faults hit: read as without
        faults, as the value that the format states for what it cannot repair, or as another value that nobody noticed.
        Words that are decoded together count as one. They are NaN in campaigns over neurons.
        """
        return pd.DataFrame([record.row() for record in self.records])

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row a point: means with `_low` and `_high`, drops against the golden run, outcomes as rates.

        Every number has `_low` and `_high`: its interval **over trials**, for these samples, at the campaign's
        confidence (`mean_interval`; in neuron campaigns rates are stratified by layer, `stratified_rate`). Accuracy
        and outcome rates also have `_samples_low`, `_samples_high`: **over samples**, for these trials, and
        `_both_low`, `_both_high`: **over trials and samples** (`two_way_interval`), which is what holds for other
        inputs of the same kind; they are NaN for other metrics. `accuracy_drop` = golden accuracy − mean accuracy;
        over samples it is of the paired difference.

        `accuracy_tail` is the mean if a share q of trials, of a kind of which none was drawn, had the worst value
        (`tail`): what a rare fatal flip could still do. NaN where the worst value is not known. The same upwards for
        `critical_total_tail`. `critical_total` = critical SDC + DUE; `flips` is the mean number of changed bits a
        trial, and `corrected`, `detected` and `miscorrected` those of stored words. Points that draw nothing at random
        have intervals over trials of no width.
        """
        rows = []
        for index, point in enumerate(self.header.points):
            if (found := self.point(index)) is None:
                continue
            row: dict[str, Any] = {"point": index, **point.coordinates}
            for name in self.metrics:
                estimate = found.estimate(name)
                row |= estimate.columns(name) | {f"{name}_tail": estimate.tail}
                row |= found.drop(name).columns(f"{name}_drop")
            for outcome in (*OUTCOMES, "critical_total"):
                estimate = found.estimate(outcome)
                row |= estimate.columns(outcome)
            row |= {"critical_total_tail": estimate.tail}
            row |= {"trials": len(found.records), "flips": float(np.mean([r.flips for r in found.records]))}
            for name in WORD_OUTCOMES:
                row[name] = float(np.mean([np.nan if r.words is None else r.words[name] for r in found.records]))
            row |= {"audited": sum(r.audited for r in found.records), "coverage": self.coverage}
            rows.append(row)
        return pd.DataFrame(rows)

    def point(self, index: int) -> Point | None:
        """The trials of one point; None if there is none yet."""
        records = [record for record in self.records if record.point == index]
        return Point(self.header, records) if records else None

    def scale(self, name: str) -> Scale:
        """Unit, range and direction of a metric or outcome rate."""
        return scale_in(self.header, name)

    def golden_interval(self, name: str) -> tuple[float, float]:
        """Interval of a fault-free metric over samples, at the campaign's confidence.

        Accuracy: Wilson's. AUROC and average precision: from a bootstrap over samples when the campaign was begun, at
        the confidence it then had. (nan, nan) for a user's metric.

        Raises:
            ConfigError: if the campaign has no such metric.
        """
        if name not in self.metrics:
            raise ConfigError(f"the campaign has no metric {name!r}; it has {self.metrics}")
        if self.scale(name).per_sample:
            samples = self.header.fingerprint.samples
            right = round(self.golden[name] * samples)
            return wilson_interval(right, samples, confidence=self.header.plan.confidence)
        low, high = self.header.golden_intervals.get(name) or (float("nan"), float("nan"))
        return float(low), float(high)

    def to_csv(self, path: str | os.PathLike[str], *, table: str = "trials") -> Path:
        """Write `trials` or `summary` as CSV.

        Raises:
            ConfigError: if the file cannot be written.
        """
        chosen = self._table(table)
        with replacing(path) as target:
            chosen.to_csv(target, index=False)
        return Path(path)

    def to_parquet(self, path: str | os.PathLike[str], *, table: str = "trials") -> Path:
        """Write `trials` or `summary` as Parquet.

        Raises:
            ConfigError: if pyarrow is not installed, or the file cannot be written.
        """
        chosen = self._table(table)
        try:
            with replacing(path) as target:
                chosen.to_parquet(target, index=False)
        except ImportError as error:
            raise ConfigError("Parquet needs pyarrow: pip install 'flipproof[parquet]'") from error
        return Path(path)

    def _table(self, name: str) -> pd.DataFrame:
        if name not in ("trials", "summary"):
            raise ConfigError(f"table must be 'trials' or 'summary', got {name!r}")
        return self.trials if name == "trials" else self.summary

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value:.4f}" for name, value in self.golden.items())
        points = len(self.header.points)
        return f"<Assessment: {len(self.records)} trials at {points} points, {self.bits:,} bits, golden {shown}>"


def planned(trials: Sequence[Trial], ceiling: int) -> list[Trial]:
    """The trials below the ceiling, once each, ordered by point and trial."""
    kept = {(trial.point, trial.trial): trial for trial in trials if trial.trial < ceiling}
    return [kept[key] for key in sorted(kept)]


def answer(trials: Sequence[Trial], header: Header) -> list[Trial]:
    """The trials that a campaign of this plan rests on: below the ceiling and, with a margin, up to where it stops.

    A journal may hold more: trials that were run for a higher ceiling or a narrower margin.
    """
    kept: list[Trial] = []
    plan = header.plan
    for _, group in groupby(planned(trials, plan.trials), key=lambda trial: trial.point):
        records = list(group)
        for upto in range(CHECK_EVERY, len(records), CHECK_EVERY) if plan.margin is not None else ():
            gapless = records[upto - 1].trial == upto - 1
            if gapless and narrow(records[:upto], header):
                records = records[:upto]
                break
        kept += records
    return kept


def narrow(records: Sequence[Trial], header: Header) -> bool:
    """True if every metric of a point is known to the plan's margin: its interval over trials, and its tail.

    A few trials without a fatal one agree closely, and say nothing about fatal ones: the tail must be within the margin
    as well, for metrics whose worst value is known. That takes about 3.7 / margin trials at 95 %.
    """
    point, margin = Point(header, records), header.plan.margin
    assert margin is not None  # who asks has one
    intervals = [point.over_trials(name)[1:] for name in header.golden]
    if not all_within(intervals, margin):
        return False
    estimates = [point.estimate(name) for name in header.golden]
    return not any(abs(found.mean - found.tail) > margin for found in estimates)
