"""Ranger: bounds are the largest values seen without faults (PAPERS: proact, section III; Chen et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

from flipproof.errors import ConfigError
from flipproof.hardening.base import Hardening, Work
from flipproof.hardening.bounded import Saturate, ZeroAbove


@dataclass(frozen=True)
class Ranger(Hardening):
    """Bounds are the maximum (and, for activations other than ReLU, the minimum) over the calibration data.

    Args:
        per: one bound a "layer", or one a "neuron": an element of the activation of one sample.
        replace: what becomes of a value outside: the "bound" itself, as in Ranger's own paper, or "zero", as ProAct's
            text has it.

    Example:
        >>> Ranger(per="neuron")
        Ranger(per='neuron', replace='bound')
    """

    per: Literal["layer", "neuron"] = "layer"
    replace: Literal["bound", "zero"] = "bound"

    def __post_init__(self) -> None:
        if self.per not in ("layer", "neuron") or self.replace not in ("bound", "zero"):
            raise ConfigError(f"Ranger: per is 'layer' or 'neuron', replace is 'bound' or 'zero', got {self!r}")

    def fit(self, work: Work) -> pd.DataFrame:
        for site, seen in work.ranges.items():
            low, high = seen.of(self.per, site)
            work.bound(site, Saturate if self.replace == "bound" else ZeroAbove, high, low)
        return pd.DataFrame()
