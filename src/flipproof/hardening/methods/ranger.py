"""Ranger: bounds are the largest values seen without faults (Mousavi et al. 2024, section III; Chen et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

from flipproof.errors import ConfigError
from flipproof.hardening.bounds.bounded import Saturate, ZeroAbove
from flipproof.hardening.fitting.work import Work
from flipproof.hardening.methods.base import HELD_OUT, Hardening, check_fields


@dataclass(frozen=True)
class Ranger(Hardening):
    """Bounds are the maximum (and, for activations other than ReLU, the minimum) over the calibration data.

    Published, the bound is the largest value seen itself: `slack=1.0`. The default differs: an unseen input exceeds the
    largest of n values with probability 1 / (n + 1) in every neuron anew, and what is cut of right values is lost
    without any fault. So bounds lie further out, as far as samples need that they were not fitted to.

    Args:
        per: one bound a "layer", or one a "neuron": an element of the activation of one sample.
        replace: what becomes of a value outside: the "bound" itself, as in Ranger's own paper, or "zero", as ProAct's
            text has it.
        slack: bounds lie at so many times the largest values seen; 1.0 is the published method. None finds the smallest
            of 1, 1.25, 1.5, 2, 3 … that hardly disturbs samples which the bounds have not seen.
        held_out: share of the calibration data that `harden` keeps to judge on.
        seed: of random parts of the calibration data.

    Example:
        >>> Ranger(per="neuron", slack=1.0)
        Ranger(per='neuron', replace='bound', slack=1.0, held_out=0.25, seed=0)
    """

    per: Literal["layer", "neuron"] = "layer"
    replace: Literal["bound", "zero"] = "bound"
    slack: float | None = None
    held_out: float = HELD_OUT
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per not in ("layer", "neuron") or self.replace not in ("bound", "zero"):
            raise ConfigError(f"Ranger: per is 'layer' or 'neuron', replace is 'bound' or 'zero', got {self!r}")
        check_fields(self)

    def fit(self, work: Work) -> pd.DataFrame:
        work.place(Saturate if self.replace == "bound" else ZeroAbove, self.per, self.slack)
        return pd.DataFrame()
