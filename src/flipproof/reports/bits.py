"""Figures of stored bits, and of what each does when it flips."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from flipproof.analysis.bit_table import BitTable
from flipproof.errors import ConfigError
from flipproof.reports.figures import empty_figure, literal
from flipproof.reports.style import SERIES


def profile_figure(profiles: Mapping[str, pd.Series]) -> Figure:
    """How often each bit is 1 (Fig. 4 of the LSTM paper): constant bits lie on 0 and 1.

    Args:
        profiles: what `bit_profile` gave, by name.

    Raises:
        ConfigError: if there is none.

    Example:
        >>> import flipproof as fp, torch
        >>> figure = profile_figure({"linear": fp.bit_profile(torch.nn.Linear(9, 5))})
        >>> figure.axes[0].get_ylabel()
        'share of words with this bit set'
    """
    if not profiles:
        raise ConfigError("profile_figure takes at least one profile by name")
    figure, axes = empty_figure()
    for i, (name, profile) in enumerate(profiles.items()):
        axes.plot(profile.index, profile, "os^Dv"[i % 5], ms=3, alpha=0.7, color=SERIES[i % len(SERIES)], label=name)
    axes.set_xlabel("bit position (0: least significant)")
    axes.set_ylabel("share of words with this bit set")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(fontsize=6, frameon=False)
    return figure


def bit_table_figure(found: BitTable) -> Figure:
    """Heat map of the answers that a single flip makes critical or a DUE: one row a tensor, bit 0 at the right.

    The scale is logarithmic; grey is none of the answers that were tried, and what was not tried stays white. Biases
    and norms are left out where there are weights: their rows would be most.

    Args:
        found: of `inject_all`.
    """
    table = found.table
    weights = table[table["kind"] == "weight"]
    table = table if weights.empty else weights
    harm = (table["critical_sdc_rate"] + table["due_rate"]).to_numpy()
    names, width = list(dict.fromkeys(table["site"])), int(table["bit"].max()) + 1
    grid = np.full((len(names), width), np.nan)
    rows = {name: row for row, name in enumerate(names)}
    grid[table["site"].map(rows), width - 1 - table["bit"]] = harm
    figure = Figure(figsize=(5.5, 0.9 + 0.17 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["viridis"].with_extremes(under="#E5E5E5", bad="white")
    least = 100 / (found.samples * max(1, int(table["tried"].max())))  # per cent: one answer of those tried
    percent = np.where(grid == 0, least / 10, 100 * grid)
    norm = LogNorm(min(least, 10.0), 100.0)
    image = axes.imshow(percent, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(names)), [literal(name) for name in names], fontsize=6)
    places = range(0, width, 4)
    axes.set_xticks([width - 1 - bit for bit in places], [str(bit) for bit in places], fontsize=7)
    axes.set_xlabel("bit position (0: least significant)", fontsize=8)
    figure.colorbar(image, ax=axes).set_label("answers that become wrong or NaN, %", fontsize=8)
    return figure
