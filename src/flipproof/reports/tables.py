"""Tables of records: for a terminal (100 columns), for comparing campaigns, and in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Group
from rich.table import Table
from scipy import stats

from flipproof.campaigns.assessment import Assessment, rates
from flipproof.campaigns.statistics import mean_interval
from flipproof.campaigns.trial import Trial
from flipproof.errors import ConfigError
from flipproof.outcomes import OUTCOMES

NEGLIGIBLE = 0.005
"""A drop below half a percentage point is not worth a sentence."""


METRICS_A_TABLE = 3
"""More of them, each with an interval and a drop, do not fit 100 columns."""


def summary_table(assessment: Assessment, *, title: str | None = None, rows: list[int] | None = None) -> Group:
    """One line a point: the metric with its interval, its drop, and the outcomes; percent throughout.

    Further metrics follow in tables of their own, so that each fits 100 columns.

    Args:
        assessment: what to show.
        title: above the table.
        rows: indices of points to show; all by default.
    """
    first, *others = assessment.metrics
    tables = [_table(assessment, [first], title, rows, outcomes=True)]
    for start in range(0, len(others), METRICS_A_TABLE):
        tables.append(_table(assessment, others[start : start + METRICS_A_TABLE], None, rows, outcomes=False))
    return Group(*tables)


def _table(
    assessment: Assessment, metrics: Sequence[str], title: str | None, rows: list[int] | None, *, outcomes: bool
) -> Table:
    confidence = float(assessment.header["plan"]["confidence"])
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    coordinates = list(assessment.header["points"][0]["coordinates"])
    headings = [name.upper() if name == "ber" else name for name in coordinates]
    headings += ["flips"] if outcomes else []
    for name in metrics:
        headings += [f"{name} %\n\\[{confidence:.0%} interval]", "drop\npoints"]
    headings += ["masked\n%", "SDC\n%", "critical\n%", "DUE\n%", "trials"] if outcomes else []
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for _, row in assessment.summary.iterrows():
        if rows is not None and int(row["point"]) not in rows:
            continue
        exact = bool(assessment.header["points"][int(row["point"])]["repeats"])
        cells = [number(row[name]) for name in coordinates]
        cells += [f"{row['flips']:,.0f}"] if outcomes else []
        for name in metrics:
            cells += [_with_interval(row, name, exact), percent(row[f"{name}_drop"])]
        cells += [*(percent(row[outcome]) for outcome in OUTCOMES), f"{int(row['trials'])}"] if outcomes else []
        table.add_row(*cells)
    return table


def _with_interval(row: pd.Series[Any], name: str, exact: bool) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if exact:
        return f"{percent(row[name])} (exact)"
    if np.isnan(low):
        return f"{percent(row[name])} (unknown)"
    return f"{percent(row[name])} [{percent(low)}, {percent(high)}]"


def percent(share: float) -> str:
    """A fraction in percent with one decimal, and never −0.0.

    Example:
        >>> percent(0.123456), percent(-1e-9)
        ('12.3', '0.0')
    """
    text = f"{100 * share:.1f}"
    return "0.0" if text == "-0.0" else text


def number(value: float) -> str:
    """A rate or count as people write it.

    Example:
        >>> number(1e-4), number(3e-05), number(0.25), number(12)
        ('1e-4', '3e-5', '0.25', '12')
    """
    if value == 0 or 0.1 <= abs(value) < 1e6:
        return f"{value:g}"
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def findings(assessment: Assessment) -> list[str]:
    """What a campaign found, in sentences: where it stays harmless, where it breaks, and how it breaks.

    Every sentence is about the first metric and says its interval.
    """
    metric = assessment.metrics[0]
    summary = assessment.summary
    if summary.empty:
        return ["No trial has been run yet."]
    samples = assessment.records[0].samples
    said = [f"Without faults {metric} is {assessment.golden[metric]:.1%} over {samples:,} samples."]
    if "bit" in summary:
        return said + _about_bits(summary, metric)
    coordinate = next(iter(assessment.header["points"][0]["coordinates"]))
    name = coordinate.upper() if coordinate == "ber" else coordinate
    harmless = summary[(summary[f"{metric}_drop_high"] < NEGLIGIBLE) & (summary["critical_total"] < NEGLIGIBLE)]
    if len(harmless):
        last = harmless.iloc[-1]
        said.append(
            f"Up to {name} {number(last[coordinate])} (flips a trial: {last['flips']:,.0f}) the mean {metric} "
            f"stays within {percent(NEGLIGIBLE)} points of that."
        )
    broken = summary[summary[f"{metric}_drop_low"] > NEGLIGIBLE]
    if len(broken):
        first, lowest = broken.iloc[0], broken.iloc[int(np.argmax(broken[f"{metric}_drop"]))]
        said.append(f"From {name} {number(first[coordinate])} it measurably falls: {_drop(first, metric)}.")
        if lowest["point"] != first["point"]:
            said.append(f"At {name} {number(lowest[coordinate])} it falls most: {_drop(lowest, metric)}.")
    else:
        said.append(f"No point of this sweep lowers {metric} measurably.")
    worst = summary.iloc[int(np.argmax(summary["critical_total"]))]
    if worst["critical_total"] > 0:
        kind = "NaN outputs (DUE)" if worst["due"] > worst["critical_sdc"] else "silently wrong answers (critical SDC)"
        said.append(
            f"At {name} {number(worst[coordinate])} {worst['critical_total']:.1%} of answers are lost, "
            f"mostly to {kind}: {worst['critical_sdc']:.1%} critical SDC, {worst['due']:.1%} DUE."
        )
    return said


def _about_bits(summary: pd.DataFrame, metric: str) -> list[str]:
    drop = summary[f"{metric}_drop"]
    # several bits can ruin everything; NaN outputs break the tie
    worst = summary.iloc[int(np.argmax(drop.round(6) + summary["due"] * 1e-3))]
    said = [
        f"The critical bit is {int(worst['bit'])}: flipped in every value it leaves {metric} at {worst[metric]:.1%}, "
        f"with {worst['critical_sdc']:.1%} critical SDC and {worst['due']:.1%} DUE."
    ]
    quiet = [int(bit) for bit in summary["bit"][drop < NEGLIGIBLE]]
    if quiet:
        said.append(
            f"Bits {ranges(quiet)} cost less than {percent(NEGLIGIBLE)} points each, even flipped in every value."
        )
    return said


def _drop(row: pd.Series[Any], metric: str) -> str:
    low, high = 100 * row[f"{metric}_drop_low"], 100 * row[f"{metric}_drop_high"]
    return f"by {100 * row[f'{metric}_drop']:.1f} points [{low:.1f}, {high:.1f}] to {row[metric]:.1%}"


def ranges(numbers: list[int]) -> str:
    """Whole numbers as ranges.

    Example:
        >>> ranges([0, 1, 2, 5, 7, 8])
        '0–2, 5, 7–8'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def compare(**assessments: Assessment) -> pd.DataFrame:
    """Campaigns side by side: one row a campaign and point.

    Besides the columns of `Assessment.summary`, each row says what the campaign gained over the first one at the same
    point: `accuracy_gain` with `_low` and `_high`. Where both drew the very same bits, trial by trial, the interval
    is of the paired difference; otherwise it is Welch's for two independent means. `paired` says which. `memory` is
    the stored bits relative to the first campaign's.

    Args:
        assessments: at least one, by name; the first is the baseline.

    Raises:
        ConfigError: if there is none, or they were measured on different data or by different metrics.

    Example:
        >>> import flipproof as fp, torch
        >>> net, data = torch.nn.Linear(2, 2), [(torch.eye(2), torch.tensor([0, 1]))]
        >>> setup = dict(data=data, faults=fp.BitErrorRate(0.05), trials=5)
        >>> table = fp.compare(full=fp.assess(net, **setup), half=fp.assess(net, format=fp.Float16(), **setup))
        >>> table[["campaign", "memory"]].values.tolist()
        [['full', 1.0], ['half', 0.5]]
    """
    if not assessments:
        raise ConfigError("compare takes at least one assessment by name: fp.compare(base=…, hardened=…)")
    base_name, base = next(iter(assessments.items()))
    rows: list[dict[str, Any]] = []
    for name, assessment in assessments.items():
        for what in ("data", "samples", "metrics"):
            ours, theirs = assessment.header["fingerprint"][what], base.header["fingerprint"][what]
            if ours != theirs:
                raise ConfigError(f"{name} and {base_name} cannot be compared: {what} differ ({ours!r} and {theirs!r})")
        for _, row in assessment.summary.iterrows():
            values = {str(key): value for key, value in row.items() if key != "point"}
            gains = _gains(assessment, base, int(row["point"]))
            rows.append({"campaign": name, **values, **gains, "memory": assessment.bits / base.bits})
    return pd.DataFrame(rows)


def _gains(assessment: Assessment, base: Assessment, point: int) -> dict[str, Any]:
    coordinates = assessment.header["points"][point]["coordinates"]
    match = [i for i, other in enumerate(base.header["points"]) if other["coordinates"] == coordinates]
    ours = [r for r in assessment.records if r.point == point]
    theirs = [r for r in base.records if match and r.point == match[0]]
    confidence = float(assessment.header["plan"]["confidence"])
    gains: dict[str, Any] = {}
    paired = bool(theirs) and {r.trial: r.digest for r in ours} == {r.trial: r.digest for r in theirs}
    for name in (*assessment.metrics, "critical_total"):
        mean, low, high = _difference(_values(ours, name), _values(theirs, name), paired, confidence)
        gains |= {f"{name}_gain": mean, f"{name}_gain_low": low, f"{name}_gain_high": high}
    return {**gains, "paired": paired}


def _values(records: Sequence[Trial], name: str) -> list[float]:
    return rates(records, name) if name == "critical_total" else [record.metrics[name] for record in records]


def _difference(ours: list[float], theirs: list[float], paired: bool, confidence: float) -> tuple[float, float, float]:
    nothing = float("nan")
    if not theirs:
        return nothing, nothing, nothing
    mean = float(np.mean(ours) - np.mean(theirs))
    if paired:
        differences = np.subtract(ours, theirs)
        if not differences.any():
            return 0.0, *((0.0, 0.0) if len(ours) == 1 else _no_difference(len(ours), confidence))
        return mean, *mean_interval(differences, confidence=confidence)
    if min(len(ours), len(theirs)) < 2 or float(np.ptp(ours)) == float(np.ptp(theirs)) == 0.0:
        return mean, nothing, nothing
    interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(confidence)
    return mean, float(interval.low), float(interval.high)


def _no_difference(n: int, confidence: float) -> tuple[float, float]:
    """No paired trial differed: at most this share of all trials can, by at most 1 either way."""
    high = mean_interval([0.0] * n, confidence=confidence, bounded=True)[1]
    return (-high, high)
