"""Figures of records, sized for one column of a paper, in colours that survive colour blindness and grey printing.

Each returns a matplotlib Figure that no global state knows: `figure.savefig("name.pdf")`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from flipproof.campaigns.assessment import Assessment
from flipproof.errors import ConfigError
from flipproof.reports.style import OUTCOME_STYLE, SERIES, SWEEPS, sweep_of
from flipproof.reports.tables import number
from flipproof.running.scales import Scale

COLUMN = (3.5, 2.6)
"""Inches: one column of a two-column page."""

LEGEND_INSIDE = 4
"""More lines than these leave no room for a legend between them."""

_MARKERS = "osD^vPX"


def metric_figure(assessments: Mapping[str, Assessment], *, metric: str | None = None) -> Figure:
    """A metric against the rate of faults, one line a campaign, interval as a band, golden run as a dashed line.

    Args:
        assessments: campaigns by name.
        metric: which; the first of the first campaign by default.

    Raises:
        ConfigError: if there is none, or one has no sweep to draw.
    """
    if not assessments:
        raise ConfigError("metric_figure takes at least one assessment by name")
    name = metric or next(iter(assessments.values())).metrics[0]
    figure, axes = empty_figure()
    for i, (label, assessment) in enumerate(assessments.items()):
        summary, x = assessment.summary, sweep_of(assessment)
        colour = SERIES[i % len(SERIES)]
        again = i >= len(SERIES)  # colours come again with open markers and dotted lines
        axes.plot(
            summary[x],
            summary[name].where(np.isfinite(summary[name])),
            marker=_MARKERS[i % len(_MARKERS)],
            ms=3.5,
            lw=1.2,
            color=colour,
            label=literal(label),
            ls=":" if again else "-",
            mfc="white" if again else colour,
        )
        axes.fill_between(
            summary[x].astype(float), summary[f"{name}_low"], summary[f"{name}_high"], color=colour, alpha=0.2, lw=0
        )
        axes.axhline(assessment.golden[name], color=colour, lw=0.7, ls="--")
        _label_sweep(axes, summary, x)
    confidence = float(next(iter(assessments.values())).header.plan.confidence)
    scale = next(iter(assessments.values())).scale(name)
    axes.set_ylabel(_with_unit(name.replace("_", " ").replace("auroc", "AUROC"), scale))
    if scale.unit == "%":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(f"mean; band: {confidence:.0%} interval over trials; dashed: no faults", fontsize=7, loc="left")
    if len(assessments) > LEGEND_INSIDE:
        figure.set_size_inches(COLUMN[0] + 1.5, COLUMN[1])
        figure.legend(fontsize=6.5, frameon=False, loc="outside right center")
    elif len(assessments) > 1:
        axes.legend(fontsize=7, frameon=False)
    return figure


def outcome_figure(assessment: Assessment) -> Figure:
    """How samples end at each point: masked, non-critical SDC, critical SDC and DUE, stacked to 100 %."""
    summary, x = assessment.summary, sweep_of(assessment)
    figure, axes = empty_figure()
    figure.set_size_inches(COLUMN[0], COLUMN[1] + 0.35)
    bottom = pd.Series(0.0, index=summary.index)
    places = range(len(summary))
    for outcome, (label, colour, hatch) in OUTCOME_STYLE.items():
        axes.bar(
            places,
            summary[outcome],
            bottom=bottom,
            width=0.8,
            color=colour,
            hatch=hatch,
            ec="white",
            lw=0.3,
            label=label,
        )
        bottom = bottom + summary[outcome]
    axes.set_xticks(list(places), [number(value) for value in summary[x]], fontsize=6.5)
    axes.set_xlabel(SWEEPS.get(x, x))
    axes.set_ylim(0, 1)
    axes.set_ylabel(f"share of {assessment.header.task.samples}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(loc="outside upper center", ncols=4, fontsize=6.2, frameon=False, columnspacing=0.9, handlelength=1.4)
    return figure


def bit_figure(assessment: Assessment) -> Figure:
    """What flipping each bit position in every value costs: drop of the first metric, and the share of DUE.

    Raises:
        ConfigError: if the campaign was not over bit positions.
    """
    if "bit" not in assessment.summary:
        raise ConfigError("bit_figure needs a campaign over bit positions, faults=fp.BitPosition(range(32))")
    metric = assessment.metrics[0]
    summary = assessment.summary
    figure, axes = empty_figure()
    drop = summary[f"{metric}_drop"].where(np.isfinite(summary[f"{metric}_drop"]))
    axes.bar(summary["bit"], drop, color=SERIES[0], width=0.8, label=f"{metric} drop")
    due = summary[summary["due"] > 0]
    if assessment.scale(metric).unit == "%":  # both are shares
        axes.plot(due["bit"], due["due"], "x", ms=4, color="#882255", label="DUE" if len(due) else None)
    axes.set_xlabel("bit position flipped in every value (0: least significant)")
    scale = assessment.scale(metric)
    if scale.unit == "%":
        axes.set_ylabel(f"{metric} drop, DUE")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(bottom=min(0.0, float(drop.min())), top=1.05)
    else:
        axes.set_ylabel(_with_unit(f"{metric}: golden − mean", scale))
    axes.invert_xaxis()
    axes.legend(fontsize=7, frameon=False, loc="upper right")
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG (300 dpi), PDF or SVG, by the suffix."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=300)
    return target


def _label_sweep(axes: Axes, summary: pd.DataFrame, x: str) -> None:
    if x in ("ber", "count") and len(summary) > 1 and float(summary[x].min()) > 0:
        axes.set_xscale("log")
    axes.set_xlabel(SWEEPS.get(x, x))


def literal(text: str) -> str:
    r"""A name as a label that is drawn as it stands: no mathematics, and not hidden by a leading underscore.

    Example:
        >>> literal("$x_1$"), literal("_base")
        ('\\$x_1\\$', ' _base')
    """
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _with_unit(name: str, scale: Scale) -> str:
    return literal(f"{name}, {scale.unit}" if scale.unit not in ("", "%") else name)


def empty_figure() -> tuple[Figure, Axes]:
    """A figure one column wide, in the style of all of them."""
    figure = Figure(figsize=COLUMN, layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(labelsize=7)
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", lw=0.3, color="#BBBBBB")
    axes.set_axisbelow(True)
    return figure, axes
