"""FitAct: one smooth threshold a neuron, all trained together (Ghavami et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import pandas as pd

from flipproof.errors import ConfigError
from flipproof.hardening.bounds.bounded import Smooth
from flipproof.hardening.fitting.calibration import cross_entropy
from flipproof.hardening.fitting.line import search_stages
from flipproof.hardening.fitting.profile import Per
from flipproof.hardening.fitting.training import Schedule, Stage, train_stages
from flipproof.hardening.fitting.work import Work
from flipproof.hardening.methods.base import HELD_OUT, Hardening, check_fields


@dataclass(frozen=True)
class FitAct(Hardening):
    """Neuron-wise y = max(0, x · (1 − σ(k (x − λ)))), trained on cross entropy + γ‖λ‖² over all λ at once.

    Thresholds start at `slack` times each neuron's largest value. The smallest that lose no more than `budget` of
    accuracy on samples which they were not trained on are kept. As that choice is fitting too, `harden` judges
    `clean_drop` on further samples.

    With ``search="line"``, which is ours, the same loss is minimised layer by layer, from the last to the first, in one
    variable each: a factor on where the layer's thresholds began (see `ProAct`).

    Args:
        epochs: passes over the part to fit on; 150, as ProAct's text has it.
        lr: of Adam, halved every 10 epochs.
        weight_decay: γ.
        slope: k.
        budget: accuracy that may be lost, a fraction.
        batch_size: samples a step.
        held_out: share of the calibration data that `harden` keeps to judge on; the same share of the rest decides
            which epoch is kept.
        seed: of the splits and of the order of samples.
        slack: training starts at so many times the largest values seen; 1.0 is the published method. None finds the
            smallest of 1, 1.25, 1.5, 2, 3 … that hardly disturbs samples which the bounds have not seen.
        search: how λ are found, by "training" as published, or along a "line"; then epochs and rates play no part.
        per: a bound a "neuron", as published, a "channel" or a "layer".

    Example:
        >>> FitAct.quick().epochs
        10
        >>> FitAct.searched() == FitAct(search="line", per="neuron")
        True
    """

    epochs: int = 150
    lr: float = 0.01
    weight_decay: float = 4e-5
    slope: float = 20.0
    budget: float = 0.01
    batch_size: int = 128
    held_out: float = HELD_OUT
    seed: int = 0
    slack: float | None = None
    search: Literal["training", "line"] = "training"
    per: Per = "neuron"

    def __post_init__(self) -> None:
        self._schedule()
        if self.search not in ("training", "line") or self.per not in ("layer", "channel", "neuron"):
            raise ConfigError(
                f"FitAct: search is 'training' or 'line', per is 'layer', 'channel' or 'neuron', got {self!r}"
            )
        if not self.slope > 0:
            raise ConfigError(f"FitAct needs slope > 0, got {self!r}")
        check_fields(self)

    @classmethod
    def quick(cls) -> Self:
        """Ten epochs with a learning rate to match: minutes instead of hours, for a first look."""
        return cls(epochs=10, lr=0.05)

    @classmethod
    def searched(cls, per: Per = "neuron") -> Self:
        """The same loss, minimised by a search of one factor a layer instead of by training."""
        return cls(search="line", per=per)

    def _schedule(self) -> Schedule:
        return Schedule(self.epochs, self.lr, 10, self.batch_size, self.weight_decay, self.budget)

    def fit(self, work: Work) -> pd.DataFrame:
        parts = work.calibration.split(self.held_out, self.seed)
        bounds = work.place(Smooth, self.per, self.slack, slope=self.slope)
        if self.search == "line":
            stages = [Stage(site.name, [bounds[site]], self._schedule()) for site in reversed(bounds)]
            return search_stages(work, stages, parts, cross_entropy)
        together = Stage("all", list(bounds.values()), self._schedule())
        history = train_stages(work, [together], parts, cross_entropy, self.seed)
        if not history["accepted"].any():
            work.notes.append(
                f"no epoch of FitAct held the budget of {self.budget:.1%}: bounds stay where training began"
            )
        return history
