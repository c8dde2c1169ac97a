"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from flipproof.campaigns.assessment import Assessment
from flipproof.reports.tables import basis, between, change_of, change_word, interval_note, number, percent
from flipproof.running.scales import OUTCOMES, Scale

METRICS_A_TABLE = 3
"""More of them, each with an interval and a drop, do not fit 100 columns."""


def summary_table(assessment: Assessment, *, title: str | None = None, rows: list[int] | None = None) -> Group:
    """One line a point: the metric with its interval over trials, its tail, its drop, and the outcomes in percent.

    Further metrics follow in tables of their own, so that each fits 100 columns.

    Args:
        assessment: what to show.
        title: above the table.
        rows: indices of points to show; all by default.
    """
    first, *others = assessment.metrics
    tables: list[Table | Text] = [_table(assessment, [first], title, rows, outcomes=True)]
    for start in range(0, len(others), METRICS_A_TABLE):
        tables.append(_table(assessment, others[start : start + METRICS_A_TABLE], None, rows, outcomes=False))
    return Group(*tables, Text(f"{basis(assessment)}\n{interval_note(assessment)}", style="dim"))


def _table(
    assessment: Assessment, metrics: Sequence[str], title: str | None, rows: list[int] | None, *, outcomes: bool
) -> Table:
    confidence = float(assessment.header.plan.confidence)
    table = Table(
        title=None if title is None else Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        pad_edge=False,
    )  # fmt: skip
    coordinates = list(assessment.header.points[0].coordinates)
    headings = [name.upper() if name == "ber" else name for name in coordinates]
    headings += ["flips"] if outcomes else []
    for name in metrics:
        scale = assessment.scale(name)
        headings += [f"{name} {scale.unit}\n[{confidence:.0%} over trials]"]
        headings += ["tail"] if outcomes else []
        headings += [f"{change_word(scale)}\n{scale.step.strip()}"]
    headings += ["masked\n%", "SDC\n%", "critical\n%", "DUE\n%", "trials"] if outcomes else []
    for heading in headings:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for _, row in assessment.summary.iterrows():
        if rows is not None and int(row["point"]) not in rows:
            continue
        point = assessment.point(int(row["point"]))
        cells = [number(row[name]) for name in coordinates]
        cells += [f"{row['flips']:,.0f}"] if outcomes else []
        for name in metrics:
            scale = assessment.scale(name)
            kind = "" if point is None or not point.exact else "no flips" if point.fault_free else "exact"
            cells += [_with_interval(row, name, scale, kind)]
            cells += [scale.text(row[f"{name}_tail"])] if outcomes else []
            cells += [scale.text(change_of(row, name, scale)[0]) if np.isfinite(row[name]) else "–"]
        cells += [*(percent(row[outcome]) for outcome in OUTCOMES), f"{int(row['trials'])}"] if outcomes else []
        table.add_row(*map(Text, cells))
    return table


def _with_interval(row: pd.Series[Any], name: str, scale: Scale, kind: str) -> str:
    value = scale.text(row[name])
    return f"{value} ({kind})" if kind else f"{value} {between(scale, row[f'{name}_low'], row[f'{name}_high'])}"
