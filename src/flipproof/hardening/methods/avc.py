"""Activation value clipping: the inputs of all activations are clamped to what they span without faults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from flipproof.hardening.bounds.bounded import ClampInput, Saturate
from flipproof.hardening.fitting.work import Work
from flipproof.hardening.methods.base import HELD_OUT, Hardening, check_fields


@dataclass(frozen=True)
class AVC(Hardening):
    """Activation value clipping (AVC), for recurrent networks and any others (Parchekani et al. 2024, III-B).

    The smallest and the largest *input* of every activation are profiled on the calibration data; at inference inputs
    are clamped to them. Outputs cannot be: sigmoid and tanh are bounded by themselves. Each gate of `nn.LSTM`,
    `nn.GRU`, `nn.RNN` and their cells gets bounds of its own, for all steps together. A NaN becomes the lower bound,
    so gates close. A ReLU clamps at its largest input; where an activation is called as a function, its output is
    clamped, the same thing for all that rise throughout (not quite for GELU, SiLU, Mish and Hardswish).

    Opening a recurrent layer costs what `fp.overhead` measures; the hardened layer's outputs equal PyTorch's up to
    rounding, and bounds count as stored values like any other.

    Published, the bounds are the extremes themselves: `slack=1.0`. The default differs as it does for `Ranger`.

    Args:
        slack: bounds lie at so many times the extremes seen; 1.0 is the published method. None finds the smallest of 1,
            1.25, 1.5, 2, 3 … that hardly disturbs samples which the bounds have not seen.
        held_out: share of the calibration data that `harden` keeps to judge on.
        seed: of random parts of the calibration data.

    Example:
        >>> import torch
        >>> import flipproof as fp
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lstm, self.out = torch.nn.LSTM(4, 8), torch.nn.Linear(8, 2)
        ...     def forward(self, x):
        ...         return self.out(self.lstm(x)[0][-1])
        >>> safe = fp.harden(Net(), fp.AVC(), data=[(torch.randn(7, 20, 4), torch.zeros(20))])
        >>> [site.name for site in fp.hardening_report(safe).sites][:2]
        ['lstm.input_gate_l0:0', 'lstm.forget_gate_l0:0']
    """

    slack: float | None = None
    held_out: float = HELD_OUT
    seed: int = 0

    open_recurrent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    def fit(self, work: Work) -> pd.DataFrame:
        work.place(lambda site: Saturate if site.function == "relu" else ClampInput, "layer", self.slack, of="input")
        return pd.DataFrame()
