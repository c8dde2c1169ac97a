"""Figure of a protection: memory against the highest bit error rate that is survived."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from flipproof.errors import ConfigError
from flipproof.reports.figures import empty_figure, literal
from flipproof.reports.style import SERIES
from flipproof.storage.codes import ideal_rate


def front_figure(front: pd.DataFrame, *, kept: float | None = None, data: float | None = None) -> Figure:
    """Memory against the highest surviving bit error rate: what `protect` makes, what others make, and the limit.

    Args:
        front: `Protection.front`, or several of them with the same columns.
        kept: share of the accuracy without faults that counts as survival, for the title.
        data: bits a weight for which the limit is drawn, where no code can do more (Shannon 1948); none by default.

    Raises:
        ConfigError: if there is nothing to draw.
    """
    if front.empty:
        raise ConfigError("the front is empty; run protect with front=500")
    figure, axes = empty_figure()
    table = front[front["ber"] > 0]
    ours, others = table[table["ours"]].sort_values("memory"), table[~table["ours"]]
    axes.plot(ours["memory"], ours["ber"], marker="o", ms=3.5, lw=1.2, color=SERIES[0], label="protect")
    axes.plot(others["memory"], others["ber"], marker="s", ms=3, lw=0, color=SERIES[1], label="other stored forms")
    for row in others.itertuples():
        place = (float(str(row.memory)), float(str(row.ber)))
        axes.annotate(literal(str(row.form)), place, fontsize=4.5, xytext=(2, 2), textcoords="offset points")
    if data is not None:
        share = np.linspace(-0.95, 0.25, 80)
        limit = [ideal_rate(data, 32 * (1 + extra)) for extra in share]
        axes.plot(share, limit, lw=0.8, ls="--", color=SERIES[6], label=f"limit for {data:g} bits a weight")
    axes.set_yscale("log")
    axes.set_xlabel("extra memory")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("highest bit error rate survived")
    share_kept = "the mean accuracy asked for" if kept is None else f"{100 * kept:.1f} % of the fault-free accuracy"
    axes.set_title(f"survived: {share_kept} is kept", fontsize=7, loc="left")
    axes.legend(fontsize=6.5, frameon=False, loc="lower right")
    return figure
