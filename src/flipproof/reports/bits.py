"""Figures of stored bits."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from flipproof.errors import ConfigError
from flipproof.reports.figures import empty_figure
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
