"""Distances of ProAct: activation distributions with and without faults (Figs. 3, 6) and Eq. 9 (Table V)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from torch import Tensor, nn

from flipproof.analysis.propagation import propagation
from flipproof.faults import BitErrorRate
from flipproof.formats import Format
from flipproof.hardening.report import hardening_report
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Parameters

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
