"""What a campaign found, as tables: a pure function of its records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from flipproof._files import replacing
from flipproof.campaigns.answers import decode_answers
from flipproof.campaigns.estimates import Point, gain, scale_in
from flipproof.campaigns.plan import Header
from flipproof.campaigns.record import WORD_OUTCOMES, Trial
from flipproof.campaigns.records import Records, seconds
from flipproof.campaigns.statistics import all_within, wilson_interval
from flipproof.engine.journal import Journal
from flipproof.errors import ConfigError, JournalError
from flipproof.running.scales import OUTCOMES, Scale

CHECK_EVERY = 20
"""With `margin`, intervals are looked at after every 20th trial of a point, whatever the number of workers."""


_ROWS = 65_536
"""Rows of a table that are made at a time."""

CampaignJournal = Journal[Header, Trial]


def campaign_journal(path: str | os.PathLike[str]) -> CampaignJournal:
    """The journal of a campaign; a record that cannot be of it is refused."""
    return Journal(path, Header, Trial, check=_belongs, store=Records, extend=Header.extended)


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
    if trial.answers:
        try:
            codes = decode_answers(trial.answers, np.zeros(trial.samples, bool))
        except JournalError as error:
            raise ConfigError(str(error)) from None
        counts = np.bincount(codes & 3, minlength=4)
        if counts.tolist() != [trial.outcomes[name] for name in OUTCOMES]:
            raise ConfigError(f"answers: expected those that the outcomes count, got {counts.tolist()}")


@dataclass(frozen=True)
class Assessment:
    """The records of a campaign and the tables made of them.

    Attributes:
        header: what was assessed: fingerprint, golden run, points, stored sites, plan.
        records: one `Trial` each, ordered by point and trial; kept by columns, and made when they are asked for.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Linear(2, 2)
        >>> result = fp.assess(net, data=[(torch.eye(2), torch.tensor([0, 1]))], faults=fp.RandomBits(3), trials=4)
        >>> len(result.trials), result.summary["flips"].tolist()
        (4, [3.0])
    """

    header: Header
    records: Records = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(cast(object, self.records), Records):  # a list of trials will do
            object.__setattr__(self, "records", Records(self.header, self.records))

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
        return self._rows(self.records) if len(self.records) else pd.DataFrame()

    def _rows(self, records: Records) -> pd.DataFrame:
        """`trials` of some records; as `Trial.row` has it."""
        point = records.column("point").astype(np.int64)
        columns: dict[str, Any] = {"point": point}
        for name in self.header.points[0].coordinates:
            columns[name] = np.array([each.coordinates[name] for each in self.header.points])[point]
        for name in ("trial", "faults", "flips"):
            columns[name] = records.column(name).astype(np.int64)
        for name in self.metrics:
            columns[name] = records.metric(name)
        for name in OUTCOMES:
            columns[name] = records.column(name).astype(np.int64)
        for name in WORD_OUTCOMES:
            words = records.column(name).astype(np.int64)
            known = (self.records.column(name) >= 0).all()  # in all of them, so that all parts have one type
            columns[name] = words if known else np.where(words < 0, np.nan, words)
        columns["samples"] = records.samples
        columns["seconds"] = [seconds(elapsed) for elapsed in records.column("seconds").tolist()]
        columns["digest"] = [f"{digest:016x}" for digest in records.column("digest").tolist()]
        columns["error"] = np.array(records.texts("error"), object)
        columns["audited"] = records.column("audited").astype(bool)
        return pd.DataFrame(columns)

    def _parts(self, table: str) -> Iterator[pd.DataFrame]:
        """A table, some rows at a time."""
        if table == "summary" or not len(self.records):
            yield self.trials if table == "trials" else self.summary
            return
        for start in range(0, len(self.records), _ROWS):
            yield self._rows(self.records[start : start + _ROWS])

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
            records = found.records
            row |= {"trials": len(records), "flips": float(np.mean(records.column("flips")))}
            for name in WORD_OUTCOMES:
                words = records.column(name)
                row[name] = float("nan") if (words < 0).any() else float(np.mean(words))
            row |= {"audited": int(records.column("audited").sum()), "coverage": self.coverage}
            rows.append(row)
        return pd.DataFrame(rows)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row for each point after the first: how far it lies from the point before it in the sweep.

        Columns: those that name the point, the same with `_before` of the other one, `accuracy_step`,
        `critical_total_step`, each with the intervals of `summary`; `draws`, and the `trials` that a step rests on.

        - "paired", with ``fp.BitErrorRate(…, nested=True)``: trials of one number share their random numbers. A step is
          the mean difference of those that both points have, and the interval is of these differences.
        - "independent", else, and where a point runs once or both have no trial in common (in a single shard): a step
          is this mean − the one before, and the interval that of two means (MOVER).

        Example:
            >>> import flipproof as fp, torch
            >>> net, data = torch.nn.Linear(2, 2), [(torch.eye(2), torch.tensor([0, 1]))]
            >>> found = fp.assess(net, data, faults=fp.BitErrorRate([0.02, 0.1], nested=True), trials=5)
            >>> found.steps[["ber_before", "ber", "draws"]].values.tolist()
            [[0.02, 0.1, 'paired']]
        """
        known = [(index, found) for index in range(len(self.header.points)) if (found := self.point(index)) is not None]
        rows = []
        for (before, theirs), (index, ours) in pairwise(known):
            row: dict[str, Any] = {"point": index, **self.header.points[index].coordinates}
            row |= {f"{name}_before": at for name, at in self.header.points[before].coordinates.items()}
            for name in (*self.metrics, "critical_total"):
                step = gain(ours, theirs, name)
                row |= step.estimate.columns(f"{name}_step")
            rows.append({**row, "draws": step.draws, "trials": step.trials})
        return pd.DataFrame(rows)

    @property
    def audited(self) -> int:
        """Trials that ran again, whole, on a fresh copy of the model."""
        return int(self.records.column("audited").sum())

    def point(self, index: int) -> Point | None:
        """The trials of one point; None if there is none yet."""
        rows = np.flatnonzero(self.records.column("point") == index)
        return Point(self.header, self.records.select(rows)) if len(rows) else None

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
        self._check_table(table)
        whole = os.fspath(path).endswith((".zip", ".tar", ".zst"))  # which take no second part
        with replacing(path) as target:
            for number, part in enumerate([getattr(self, table)] if whole else self._parts(table)):
                part.to_csv(target, index=False, mode="a" if number else "w", header=not number)
        return Path(path)

    def to_parquet(self, path: str | os.PathLike[str], *, table: str = "trials") -> Path:
        """Write `trials` or `summary` as Parquet.

        Raises:
            ConfigError: if pyarrow is not installed, or the file cannot be written.
        """
        self._check_table(table)
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ConfigError("Parquet needs pyarrow: pip install 'flipproof[parquet]'") from error
        with replacing(path) as target, ExitStack() as stack:
            writer = None
            for part in self._parts(table):
                found = pyarrow.Table.from_pandas(part, preserve_index=False)
                if writer is None:
                    schema = found.schema
                    if "error" in schema.names:  # of trials none of which raised, it has no type
                        schema = schema.set(schema.get_field_index("error"), pyarrow.field("error", pyarrow.string()))
                    writer = stack.enter_context(parquet.ParquetWriter(target, schema))
                writer.write_table(found.cast(writer.schema))
        return Path(path)

    def _check_table(self, name: str) -> None:
        if name not in ("trials", "summary"):
            raise ConfigError(f"table must be 'trials' or 'summary', got {name!r}")

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value:.4f}" for name, value in self.golden.items())
        points = len(self.header.points)
        task = self.header.task.task
        what = "" if task == "classification" else f"{task}, "
        return f"<Assessment: {what}{len(self.records)} trials at {points} points, {self.bits:,} bits, golden {shown}>"


def planned(records: Records, ceiling: int) -> Records:
    """The trials below the ceiling, once each, the last if there are several, ordered by point and trial."""
    point, trial = records.column("point"), records.column("trial")
    order = np.lexsort((trial, point))
    order = order[trial[order] < ceiling]
    last = np.ones(len(order), bool)
    last[:-1] = (np.diff(point[order].astype(np.int64)) != 0) | (np.diff(trial[order].astype(np.int64)) != 0)
    return records.select(order[last])


def answer(records: Records, header: Header) -> Records:
    """The trials that a campaign of this plan rests on: below the ceiling and, with a margin, up to where it stops.

    A journal may hold more: trials that were run for a higher ceiling or a narrower margin.
    """
    found = planned(records, header.plan.trials)
    if header.plan.margin is None:
        return found
    kept = []
    point = found.column("point")
    for index in range(len(header.points)):
        rows = np.flatnonzero(point == index)
        kept.append(rows[: stops_at(found.select(rows), header)])
    return found.select(np.concatenate(kept))


def stops_at(records: Records, header: Header) -> int | None:
    """After how many trials of a point, ordered, its campaign is narrow enough for its margin; None if it is not."""
    trial = records.column("trial")
    for upto in range(CHECK_EVERY, len(records) + 1, CHECK_EVERY):
        gapless = trial[upto - 1] == upto - 1
        if gapless and narrow(records[:upto], header):
            return upto
    return None


def narrow(records: Records, header: Header) -> bool:
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
