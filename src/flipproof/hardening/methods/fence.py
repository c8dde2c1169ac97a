"""Fence: two-sided bounds behind every layer, and above every activation. Not from a paper; see docs/hardening.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

from flipproof.errors import ConfigError
from flipproof.hardening.bounds.bounded import Saturate, ZeroAbove
from flipproof.hardening.fitting.work import Work
from flipproof.hardening.methods.base import HELD_OUT, Hardening, check_fields
from flipproof.hardening.methods.guard import guard_outputs, scoring_layer


@dataclass(frozen=True)
class Fence(Hardening):
    """Keep every output of a convolution, linear or normalisation layer within what its channel spans without faults.

    For channel c of a layer, over the calibration data, all its samples and places, and slack s::

        low_c = min y_c,  high_c = max y_c,  moved out by (s − 1) · reach on either side, as all bounds here
        y_c ← y_c where low_c ≤ y_c ≤ high_c, else 0;  NaN ← 0

    A bound above an activation sees a fault late: the product of a faulty weight has gone through a normalisation and
    into a sum by then, and what is cut is the sum, with all that was right in it. Here the faulty branch alone is cut.
    And it reaches layers that no activation follows, as the convolution of `flipproof.models.StageNet`.

    A value outside is thrown away and not moved to the bound that it crossed. Clamping loses most of what the bounds
    are for: a channel that a fault has broken is then full of the largest right values, each within the bound of the
    activation behind it, which would have made them 0 (measured in docs/hardening.md).

    Activations have the bounds of `Guard`, one a channel, and class scores its guard. Layers' channels are known from
    their kind: the last dimension of a linear layer's output, so sequences (N, T, C) have one bound a feature, the one
    behind the batch of a convolution or batch normalisation. A layer that is called several times has one pair of
    bounds a channel for all its calls. What is no module's output (`F.linear`, a matrix product, the projections
    inside `nn.MultiheadAttention`) is not reached; of the latter the report says so.

    This is a method of its own and no option of `Guard`: it has other sites, two bounds at each, and other choices (no
    bound a neuron, since a layer's channels and not its places are what its weights belong to).

    Args:
        per: a pair of bounds a "channel", or a "layer".
        replace: what becomes of a layer's value outside: "zero", or the "bound" that it crossed. Activations' become 0.
        outputs: guard the class scores as `Guard` does, instead of fencing the layer that computes them.
        slack: bounds lie at so many times the extremes seen. None finds the smallest of 1, 1.25, 1.5, 2, 3 … that
            hardly disturbs samples which the bounds have not seen.
        held_out: share of the calibration data that `harden` keeps to judge on.
        seed: of random parts of the calibration data.

    Raises:
        ConfigError: if a field is none of these.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> safe = fp.harden(net, fp.Fence(), data=[(torch.randn(16, 4), torch.randint(3, (16,)))])
        >>> [(site.name, site.function) for site in fp.hardening_report(safe).sites]
        [('0:0', 'Linear'), ('1:0', 'relu')]
        >>> safe[0]
        Linear(
          in_features=4, out_features=8, bias=True
          (fence): ZeroAbove(identity, per neuron (8,))
        )
    """

    per: Literal["channel", "layer"] = "channel"
    replace: Literal["zero", "bound"] = "zero"
    outputs: bool = True
    slack: float | None = None
    held_out: float = HELD_OUT
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per not in ("channel", "layer") or self.replace not in ("bound", "zero"):
            raise ConfigError(f"Fence: per is 'channel' or 'layer', replace is 'zero' or 'bound', got {self!r}")
        check_fields(self)

    def fit(self, work: Work) -> pd.DataFrame:
        scoring = scoring_layer(work) if self.outputs else None
        work.open_layers(leave=() if scoring is None else (scoring,))
        behind = Saturate if self.replace == "bound" else ZeroAbove
        work.place(lambda site: behind if work.rewritten.layer_of(site) else ZeroAbove, self.per, self.slack)
        if self.outputs:
            work.notes.append(guard_outputs(work))
        return pd.DataFrame()
