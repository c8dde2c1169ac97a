"""Figures of ProAct: activation distributions with and without faults (Figs. 3, 6), and how thresholds were found."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor, nn

from flipproof.analysis import propagation
from flipproof.faults import BitErrorRate, FaultSpace, Parameters
from flipproof.formats import Format
from flipproof.hardening import hardening_report
from flipproof.reports.figures import SERIES

LAYER_WISE = 1e-4
"""Bit error rate of Table V; a layer too small for one flip at it is left out."""


def distances(
    safe: nn.Module, model: nn.Module, batch: tuple[Tensor, Tensor], format: Format
) -> tuple[pd.DataFrame, float]:
    """Distributions of the bounded activations at BER 3e-5, and Eq. 9's L2 with faults in one layer at a time.

    Args:
        safe: the hardened model.
        model: the original, whose layers are hit one after the other.
        batch: images and targets, of which the first 50 are run.
        format: how parameters are stored.
    """
    images, targets = batch
    data = [(images[:50], targets[:50])]
    bounded = [site.module for site in hardening_report(safe).sites]
    found = propagation(safe, data, faults=BitErrorRate(3e-5), format=format, trials=10, include=bounded, bins=40)
    terms = []
    for name, module in model.named_modules():
        where = Parameters(include=f"{name}.weight")
        if isinstance(module, (nn.Conv2d, nn.Linear)) and _hit(safe, where, format):
            one = propagation(
                safe, data, faults=BitErrorRate(LAYER_WISE), format=format, where=where, trials=2, include=bounded
            )
            terms.append(one.l2())
    return found.distributions, float(np.mean(terms))


def _hit(model: nn.Module, where: Parameters, format: Format) -> bool:
    return round(LAYER_WISE * FaultSpace(model, where=where, format=format).bits) > 0


def draw_distributions(table: pd.DataFrame) -> Figure:
    """Share of values in each bin, faulty over golden, for the first, a middle and the last bounded activation."""
    layers = list(dict.fromkeys(table["layer"]))
    chosen = [layers[0], layers[len(layers) // 2], layers[-1]]
    figure = Figure(figsize=(7.0, 2.3), layout="constrained")
    for axes, layer in zip(figure.subplots(1, 3), chosen, strict=True):
        inner = table[table["layer"] == layer].iloc[1:-1]
        centres = (inner["low"] + inner["high"]) / 2
        for kind, colour, style in (("golden", SERIES[0], "-"), ("faulty", SERIES[1], "--")):
            axes.step(centres, inner[kind].clip(lower=1e-7), where="mid", color=colour, ls=style, lw=1, label=kind)
        axes.set_yscale("log")
        axes.set_title(layer, fontsize=7)
        axes.tick_params(labelsize=6)
        axes.set_xlabel("activation", fontsize=7)
    figure.axes[0].set_ylabel("share of values", fontsize=7)
    figure.axes[-1].legend(fontsize=6, frameon=False)
    return figure


def draw_history(safe: nn.Module) -> Figure:
    """How a method went: mean threshold and held-out accuracy by epoch (Fig. 2), or the area by threshold."""
    history = hardening_report(safe).history
    figure = Figure(figsize=(7.0, 2.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    if "epoch" in history:
        for i, (stage, rows) in enumerate(history.groupby("stage", sort=False)):
            left.plot(rows["epoch"], rows["mean_threshold"], color=SERIES[i % len(SERIES)], lw=0.8, label=str(stage))
        right.plot(np.arange(len(history)), history["held_out_accuracy"], color=SERIES[0], lw=0.8)
        left.set_xlabel("epoch of the layer", fontsize=7)
        left.set_ylabel("mean threshold", fontsize=7)
        right.set_xlabel("epoch, all layers", fontsize=7)
        right.set_ylabel("held-out accuracy", fontsize=7)
    else:
        for i, (stage, rows) in enumerate(history.groupby("stage", sort=False)):
            ordered = rows.sort_values("threshold")
            colour = SERIES[i % len(SERIES)]
            left.plot(ordered["threshold"], ordered["area"], "o-", ms=2, color=colour, lw=0.8, label=str(stage))
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
