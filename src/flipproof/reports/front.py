"""Figure of a protection: memory against the highest bit error rate that is survived."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from flipproof.errors import ConfigError
from flipproof.reports.figures import COLUMN, empty_figure, literal
from flipproof.reports.style import SERIES

_NEAR = 0.06
"""Extra memory: forms at one rate that lie so near share a place, and a label."""


def front_figure(front: pd.DataFrame, *, kept: float | None = None) -> Figure:
    """Memory against the highest surviving bit error rate: what `protect` makes, what others make, and the limit.

    Other forms are numbered; the list beside names them. The limit is that of Shannon 1948: what the data bits that a
    form of ours keeps could survive in its memory at best, whatever the code.

    Args:
        front: `Protection.front`, or several of them with the same columns.
        kept: share of the accuracy without faults that counts as survival, for the title.

    Raises:
        ConfigError: if there is nothing to draw.
    """
    if front.empty:
        raise ConfigError("the front is empty; run protect with front=500")
    figure, axes = empty_figure()
    figure.set_size_inches(COLUMN[0] + 1.7, COLUMN[1] + 0.9)
    ours = front[front["ours"] & (front["ber"] > 0)].sort_values("memory")
    others = front[~front["ours"]].reset_index(drop=True)
    others.index += 1
    axes.plot(ours["memory"], ours["ber"], marker="o", ms=3.5, lw=1.2, color=SERIES[0], label="protect")
    axes.plot(
        ours["memory"],
        ours["limit"],
        lw=0.8,
        ls="--",
        marker="_",
        ms=5,
        color=SERIES[6],
        label="its limit (Shannon)",
    )
    reached = others[others["ber"] > 0]
    axes.plot(reached["memory"], reached["ber"], marker="s", ms=3, lw=0, color=SERIES[1], label="other forms")
    for place, numbers in _places(reached).items():
        label = ", ".join(map(str, numbers))
        axes.annotate(label, place, fontsize=5.5, xytext=(3, 0), textcoords="offset points", va="center")
    axes.set_yscale("log")
    axes.set_xlabel("extra memory")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("highest bit error rate survived")
    share_kept = "the mean accuracy asked for" if kept is None else f"{100 * kept:.1f} % of the fault-free accuracy"
    axes.set_title(f"survived: {share_kept} is kept", fontsize=7, loc="left")
    figure.legend(
        handles=[*axes.lines, *(_named(number, row) for number, row in others.iterrows())],
        fontsize=6,
        frameon=False,
        loc="outside right center",
        handlelength=1.6,
        labelspacing=0.35,
    )
    return figure


def _places(front: pd.DataFrame) -> dict[tuple[float, float], list[int]]:
    """(memory, rate) → numbers of the forms that are drawn there, or so near that labels would cover each other."""
    found: dict[tuple[float, float], list[int]] = {}
    for number, row in front.sort_values("memory", ascending=False).iterrows():
        memory, ber = float(row["memory"]), float(row["ber"])
        near = [place for place in found if place[1] == ber and abs(place[0] - memory) <= _NEAR]
        found.setdefault(near[0] if near else (memory, ber), []).append(int(str(number)))
    return {place: sorted(numbers) for place, numbers in found.items()}


def _named(number: object, row: pd.Series) -> Line2D:
    """The entry of a form in the list beside."""
    none = "" if row["ber"] > 0 else ": at no rate"
    return Line2D([], [], lw=0, label=literal(f"{number}  {row['form']}{none}"))
