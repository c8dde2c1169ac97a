"""What a campaign found, as tables: a pure function of its records."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flipproof.campaigns.journal import Journal
from flipproof.campaigns.statistics import all_within, mean_interval
from flipproof.campaigns.trial import Trial
from flipproof.errors import ConfigError
from flipproof.metrics import METRIC_NAMES, resolve
from flipproof.outcomes import OUTCOMES

CHECK_EVERY = 20
"""With `margin`, intervals are looked at after every 20th trial of a point, whatever the number of workers."""


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

    header: Mapping[str, Any]
    records: Sequence[Trial] = field(repr=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Assessment:
        """Read a journal, finished or not.

        Raises:
            JournalError: if it is not one.
        """
        header, trials = Journal(path).read()
        return cls(header, answer(trials, header["plan"], list(header["golden"])))

    @property
    def golden(self) -> dict[str, float]:
        """Each metric of the fault-free run."""
        return dict(self.header["golden"])

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics."""
        return list(self.header["golden"])

    @property
    def bits(self) -> int:
        """Stored bits that could be hit."""
        return int(self.header["fingerprint"]["bits"])

    @cached_property
    def trials(self) -> pd.DataFrame:
        """One row a trial: `point`, `ber`/`bit`/…, `trial`, `flips`, metrics (fractions), samples by outcome."""
        return pd.DataFrame([record.row() for record in self.records])

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row a point: means with `_low` and `_high`, drops against the golden run, outcomes as rates.

        `accuracy_drop` = golden accuracy − mean accuracy; `critical_total` = critical SDC + DUE; `flips` is the mean
        number of changed bits a trial. Intervals are over trials, at the campaign's confidence (`mean_interval`;
        bootstrap for AUROC and average precision), never narrower than what unseen trials could change; points that
        draw nothing at random have intervals of no width.
        """
        confidence = float(self.header["plan"]["confidence"])
        rows = []
        for index, point in enumerate(self.header["points"]):
            records = [record for record in self.records if record.point == index]
            if not records:
                continue
            row: dict[str, Any] = {"point": index, **point["coordinates"]}
            certain = bool(point["repeats"])
            for name in self.metrics:
                golden = float(self.header["golden"][name])
                mean, low, high = _estimate(name, [r.metrics[name] for r in records], confidence, certain)
                row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
                row |= {
                    f"{name}_drop": golden - mean,
                    f"{name}_drop_low": golden - high,
                    f"{name}_drop_high": golden - low,
                }
            for outcome in (*OUTCOMES, "critical_total"):
                mean, low, high = _estimate(outcome, rates(records, outcome), confidence, certain)
                row |= {outcome: mean, f"{outcome}_low": low, f"{outcome}_high": high}
            row |= {"trials": len(records), "flips": float(np.mean([r.flips for r in records]))}
            rows.append(row)
        return pd.DataFrame(rows)

    def to_csv(self, path: str | os.PathLike[str], *, table: str = "trials") -> Path:
        """Write `trials` or `summary` as CSV."""
        target = _parent_of(path)
        self._table(table).to_csv(target, index=False)
        return target

    def to_parquet(self, path: str | os.PathLike[str], *, table: str = "trials") -> Path:
        """Write `trials` or `summary` as Parquet.

        Raises:
            ConfigError: if pyarrow is not installed.
        """
        target = _parent_of(path)
        try:
            self._table(table).to_parquet(target, index=False)
        except ImportError as error:
            raise ConfigError("Parquet needs pyarrow: pip install 'flipproof[parquet]'") from error
        return target

    def _table(self, name: str) -> pd.DataFrame:
        if name not in ("trials", "summary"):
            raise ConfigError(f"table must be 'trials' or 'summary', got {name!r}")
        return self.trials if name == "trials" else self.summary

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value:.4f}" for name, value in self.golden.items())
        points = len(self.header["points"])
        return f"<Assessment: {len(self.records)} trials at {points} points, {self.bits:,} bits, golden {shown}>"


def planned(trials: Sequence[Trial], ceiling: int) -> list[Trial]:
    """The trials below the ceiling, once each, ordered by point and trial."""
    kept = {(trial.point, trial.trial): trial for trial in trials if trial.trial < ceiling}
    return [kept[key] for key in sorted(kept)]


def answer(trials: Sequence[Trial], plan: Mapping[str, Any], metrics: Sequence[str]) -> list[Trial]:
    """The trials that a campaign of this plan rests on: below the ceiling and, with a margin, up to where it stops.

    A journal may hold more: trials that were run for a higher ceiling or a narrower margin.
    """
    kept: list[Trial] = []
    for _, group in groupby(planned(trials, plan["trials"]), key=lambda trial: trial.point):
        records = list(group)
        for upto in range(CHECK_EVERY, len(records), CHECK_EVERY) if plan["margin"] is not None else ():
            gapless = records[upto - 1].trial == upto - 1
            if gapless and narrow(records[:upto], metrics, plan["margin"], plan["confidence"]):
                records = records[:upto]
                break
        kept += records
    return kept


def narrow(records: Sequence[Trial], metrics: Sequence[str], margin: float, confidence: float) -> bool:
    """True if the interval of every metric over these trials of a point is within ± margin."""
    return all_within(
        [interval_of(name, [record.metrics[name] for record in records], confidence) for name in metrics], margin
    )


def rates(records: Sequence[Trial], outcome: str) -> list[float]:
    """An outcome's share of the samples, per trial; "critical_total" is critical SDC plus DUE."""
    names = ("critical_sdc", "due") if outcome == "critical_total" else (outcome,)
    return [sum(record.outcomes[name] for name in names) / record.samples for record in records]


def interval_of(name: str, values: Sequence[float], confidence: float) -> tuple[float, float]:
    """The interval a column gets: bootstrap for ranking metrics, else Student's t over trials."""
    bounds = (0.0, 1.0) if is_share(name) else None
    if name in METRIC_NAMES and resolve(name)[0].ranking:
        return bootstrap_interval(values, confidence=confidence, bounds=bounds)
    return mean_interval(values, confidence=confidence, bounds=bounds)


def is_share(name: str) -> bool:
    """True for the built-in metrics and the outcomes, which cannot leave [0, 1]."""
    return name in METRIC_NAMES or name in (*OUTCOMES, "critical_total")


def _estimate(name: str, values: Sequence[float], confidence: float, certain: bool) -> tuple[float, float, float]:
    mean = values[0] if len(set(values)) == 1 else float(np.mean(values))  # equal values: no rounding error
    low, high = (mean, mean) if certain else interval_of(name, values, confidence)
    return mean, low, high


def _parent_of(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target
