"""Tighten: bounds in closed form, one a channel, then tightened layer by layer with forward passes alone.

Not from a paper. ProAct's insight, that the smallest threshold which keeps the accuracy is the best one, needs no
gradients: a layer's bounds have one number to search for, the factor by which they shrink, and the accuracy on held-out
data falls with it. A bisection of a few forward passes a layer replaces dozens of epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from flipproof.campaigns.progress import progress_bar
from flipproof.errors import ConfigError
from flipproof.hardening.base import Hardening, Work
from flipproof.hardening.bounded import Bounded, Saturate, ZeroAbove
from flipproof.hardening.calibration import Calibration
from flipproof.hardening.profile import Per


@dataclass(frozen=True)
class Tighten(Hardening):
    """One bound a channel at the largest value seen, shrunk as far as the accuracy budget allows.

    From the last layer to the first, all bounds of a layer are multiplied by the smallest factor s in (0, 1], found by
    bisection, at which the held-out part of the calibration data loses no more than that layer's share of `budget`.
    Layers share the budget evenly, and what one does not use is left to those before it.

    Args:
        per: a bound a "channel" (of a convolution; a neuron of a linear layer), a "neuron" or a "layer".
        replace: what becomes of a value outside: "zero", or the "bound" itself.
        budget: accuracy that may be lost, a fraction, over all layers together.
        steps: of the bisection, a forward pass over the held-out part each; s is known to 2^−steps.
        held_out: share of the calibration data to accept on.
        seed: of the split.

    Example:
        >>> Tighten(steps=4)
        Tighten(per='channel', replace='zero', budget=0.01, steps=4, held_out=0.5, seed=0)
    """

    per: Per = "channel"
    replace: Literal["zero", "bound"] = "zero"
    budget: float = 0.01
    steps: int = 6
    held_out: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per not in ("layer", "channel", "neuron") or self.replace not in ("bound", "zero"):
            raise ConfigError(
                f"Tighten: per is 'layer', 'channel' or 'neuron', replace is 'bound' or 'zero', got {self!r}"
            )
        if not 0 <= self.budget < 1 or self.steps < 1 or not 0 < self.held_out < 1 or self.seed < 0:
            raise ConfigError(f"Tighten needs budget in [0, 1), steps ≥ 1, held_out in (0, 1), seed ≥ 0, got {self!r}")

    def fit(self, work: Work) -> pd.DataFrame:
        held = work.calibration.split(self.held_out, self.seed)[1]
        work.accepted_on = held
        bounds: dict[str, Bounded] = {}
        for site, seen in work.ranges.items():
            low, high = seen.of(self.per, site)
            bounds[site.name] = work.bound(site, ZeroAbove if self.replace == "zero" else Saturate, high, low)
        rows: list[dict[str, Any]] = []
        with progress_bar(len(bounds) * self.steps, 0, show=work.progress) as step:
            for done, (name, bound) in enumerate(reversed(bounds.items()), start=1):
                floor = held.accuracy - self.budget * done / len(bounds)
                shrink = partial(self._shrink, work, name, bound, held, floor)
                rows += work.stage(name, [bound], shrink, step=step, steps=0)
                step(name, self.steps)
        return pd.DataFrame(rows)

    def _shrink(self, work: Work, name: str, bound: Bounded, held: Calibration, floor: float) -> list[dict[str, Any]]:
        """Leave the bound at the smallest factor that holds the floor; 1 if none does."""
        starts = [stored.detach().clone() for stored in _stored(bound)]
        fails, holds, rows = 0.0, 1.0, []
        for _ in range(self.steps):
            factor = (fails + holds) / 2
            _scale(bound, starts, factor)
            accuracy = held.accuracy_of(work.model)
            work.spend(held, 1.0)
            accepted = accuracy >= floor
            rows.append({"stage": name, "factor": factor, "held_out_accuracy": accuracy, "accepted": accepted})
            fails, holds = (fails, factor) if accepted else (factor, holds)
        _scale(bound, starts, holds)
        return rows


def _stored(bound: Bounded) -> list[Tensor]:
    return [bound.threshold] if bound.low is None else [bound.threshold, bound.low]


def _scale(bound: Bounded, starts: list[Tensor], factor: float) -> None:
    with torch.no_grad():
        for stored, start in zip(_stored(bound), starts, strict=True):
            stored.copy_(start * factor)
