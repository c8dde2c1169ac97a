"""Figures of bounded activations: how their bounds were found, and what faults do to their values."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from flipproof.errors import ConfigError
from flipproof.hardening.report import HardeningReport
from flipproof.reports.figures import literal
from flipproof.reports.style import SERIES


def distribution_figure(table: pd.DataFrame) -> Figure:
    """Share of values in each bin, with faults over without, for the first, a middle and the last layer.

    Args:
        table: `Propagation.distributions`.

    Raises:
        ConfigError: if it is empty.
    """
    if table.empty:
        raise ConfigError("there is no layer to draw; see `propagation`")
    layers = list(dict.fromkeys(table["layer"]))
    chosen = [layers[0], layers[len(layers) // 2], layers[-1]]
    figure = Figure(figsize=(7.0, 2.3), layout="constrained")
    for axes, layer in zip(figure.subplots(1, 3), chosen, strict=True):
        inner = table[table["layer"] == layer].iloc[1:-1]
        centres = (inner["low"] + inner["high"]) / 2
        for kind, colour, style in (("golden", SERIES[0], "-"), ("faulty", SERIES[1], "--")):
            axes.step(centres, inner[kind].clip(lower=1e-7), where="mid", color=colour, ls=style, lw=1, label=kind)
        axes.set_yscale("log")
        axes.set_title(literal(str(layer)), fontsize=7)
        axes.tick_params(labelsize=6)
        axes.set_xlabel("activation", fontsize=7)
    figure.axes[0].set_ylabel("share of values", fontsize=7)
    figure.axes[-1].legend(fontsize=6, frameon=False)
    return figure


def history_figure(report: HardeningReport) -> Figure:
    """How a method found its bounds: mean threshold and accuracy by epoch, loss by factor, or area by threshold.

    Raises:
        ConfigError: if the method is a closed form and has no history.
    """
    history = report.history
    if history.empty:
        raise ConfigError(f"{report.method} has no history: its bounds are read off the data")
    figure = Figure(figsize=(7.0, 2.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    if "epoch" in history:
        for i, (stage, rows) in enumerate(history.groupby("stage", sort=False)):
            left.plot(
                rows["epoch"], rows["mean_threshold"], color=SERIES[i % len(SERIES)], lw=0.8, label=literal(str(stage))
            )
        right.plot(np.arange(len(history)), history["held_out_accuracy"], color=SERIES[0], lw=0.8)
        left.set_xlabel("epoch of the layer", fontsize=7)
        left.set_ylabel("mean threshold", fontsize=7)
        right.set_xlabel("epoch, all layers", fontsize=7)
        right.set_ylabel("held-out accuracy", fontsize=7)
    elif "scale" in history:
        for i, (stage, rows) in enumerate(history.groupby("stage", sort=False)):
            ordered = rows.sort_values("scale")
            colour = SERIES[i % len(SERIES)]
            left.plot(ordered["scale"], ordered["loss"], "o-", ms=2, color=colour, lw=0.8, label=literal(str(stage)))
        taken = history[history["accepted"]]
        right.plot(np.arange(len(taken)), taken["scale"].to_numpy(), "o-", ms=2, color=SERIES[0], lw=0.8)
        left.set_xlabel("factor on the thresholds", fontsize=7)
        left.set_ylabel("loss", fontsize=7)
        right.set_xlabel("layer, from the last", fontsize=7)
        right.set_ylabel("factor taken", fontsize=7)
    else:
        for i, (stage, rows) in enumerate(history.groupby("stage", sort=False)):
            ordered = rows.sort_values("threshold")
            colour = SERIES[i % len(SERIES)]
            left.plot(
                ordered["threshold"], ordered["area"], "o-", ms=2, color=colour, lw=0.8, label=literal(str(stage))
            )
        best = history.groupby("stage", sort=False)["area"].max()
        right.plot(np.arange(len(best)), best.to_numpy(), "o-", ms=2, color=SERIES[0], lw=0.8)
        left.set_xlabel("threshold", fontsize=7)
        left.set_ylabel("area under accuracy", fontsize=7)
        right.set_xlabel("layer", fontsize=7)
        right.set_ylabel("best area", fontsize=7)
    for axes in (left, right):
        axes.tick_params(labelsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
