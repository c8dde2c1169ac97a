"""Figure of an exploration: memory against what faults cost."""

from __future__ import annotations

from matplotlib.figure import Figure

from flipproof.errors import ConfigError
from flipproof.reports.figures import empty_figure, literal
from flipproof.reports.style import SERIES
from flipproof.storage.explore import Exploration, paper_name, short_name


def tradeoff_figure(exploration: Exploration) -> Figure:
    """Memory against the largest drop, one point a stored form; those on the front are filled (Fig. 5 of FORTUNE).

    Bars are the intervals of the drop over trials.

    Raises:
        ConfigError: if no form was accurate enough to be injected.
    """
    table = exploration.candidates.dropna(subset=["drop"])
    if table.empty:
        raise ConfigError("no stored form was accurate enough to be injected; there is no drop to draw")
    figure, axes = empty_figure()
    kib = table["memory"] / 8 / 1024
    low, high = table["drop"] - table["drop_low"], table["drop_high"] - table["drop"]
    for i, name in enumerate(dict.fromkeys(table["hardening"])):
        label = "not hardened" if name == "none" else literal(str(name))
        for front in (True, False):  # filled on the front, hollow behind it
            own = (table["hardening"] == name) & (table["front"] == front)
            if not own.any():
                continue
            bars = [100 * low[own].clip(lower=0), 100 * high[own].clip(lower=0)]
            legend = f"{label}{', front' if front else ''}"
            container = axes.errorbar(
                kib[own], 100 * table["drop"][own], yerr=bars, fmt="o", label=legend, lw=0.7, ms=3
            )
            for line in (container[0], *container[2]):
                line.set_color(SERIES[i % len(SERIES)])
            container[0].set_markerfacecolor(SERIES[i % len(SERIES)] if front else "white")
    for row in table.itertuples():
        place = (float(str(row.memory)) / 8192, 100 * float(str(row.drop)))
        name = paper_name(str(row.format)) or short_name(str(row.format)).replace("Affine(bits=8)", "8")
        axes.annotate(literal(name), place, fontsize=5, xytext=(2, 2), textcoords="offset points")
    axes.set_xlabel("memory of the weights, KiB")
    axes.set_ylabel("largest drop of accuracy, points")
    axes.set_title("bars: interval over trials", fontsize=6, loc="left")
    axes.legend(fontsize=6, frameon=False)
    return figure
