"""ProAct: hybrid smooth thresholds, from the last layer to the first (Mousavi et al. 2024, section V)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import pandas as pd
from torch import Tensor

from flipproof.errors import ConfigError
from flipproof.hardening.bounds.bounded import Smooth
from flipproof.hardening.fitting.calibration import cross_entropy, distillation
from flipproof.hardening.fitting.line import search_stages
from flipproof.hardening.fitting.profile import Per
from flipproof.hardening.fitting.training import Schedule, Stage, train_stages
from flipproof.hardening.fitting.work import Work
from flipproof.hardening.methods.base import HELD_OUT, Hardening, check_fields
from flipproof.hardening.rewriting.sites import ActivationSite


@dataclass(frozen=True)
class ProAct(Hardening):
    """HyReLU with one λ a neuron in the last ReLU executed and one a layer elsewhere, trained progressively.

    Thresholds start at `slack` times the largest values seen. From the last layer to the first, only that layer's λ
    train, on KL(student ‖ teacher) + cross entropy + γ‖λ‖² (Eq. 8); the teacher is the unbounded model. In each layer
    the smallest λ is kept that holds the accuracy budget on samples which it was not trained on (the authors' code
    accepts on test data). As that choice is fitting too, `harden` judges `clean_drop` on further samples. Defaults are
    the paper's but for `slack`; γ and the temperature, which it does not give, are those that its code starts with.

    With ``search="line"``, which is ours, the same loss is minimised in the same order, but in one variable a layer:
    its thresholds are α times where they began, and α in [0.2, 1] is searched for on a grid and then between the best
    point's neighbours, to 0.02. The α of the lowest loss that holds the budget is taken. It takes a share of the time,
    and it arrives: Adam moves a threshold by at most about `lr` a step, and optima of this loss may lie far below the
    largest values (measured in docs/hardening.md).

    Args:
        k: slope of the smooth transition.
        temperature: T of the softened outputs.
        weight_decay: γ.
        epochs_last: for the last layer.
        epochs: for each other layer.
        lr: of Adam, halved every 10 epochs.
        budget: accuracy that may be lost, a fraction, over all layers together.
        batch_size: samples a step.
        held_out: share of the calibration data that `harden` keeps to judge on; the same share of the rest decides
            which epoch is kept.
        seed: of the splits and of the order of samples.
        slack: training starts at so many times the largest values seen; 1.0 is the published method. None finds the
            smallest of 1, 1.25, 1.5, 2, 3 … that hardly disturbs samples which the bounds have not seen.
        search: how λ are found, by "training" as published, or along a "line"; then epochs and rates play no part.
        per: a bound a "layer", "channel" or "neuron" in all layers, or "hybrid", as published.

    Example:
        >>> ProAct.quick()
        ProAct(k=20.0, temperature=1.0, weight_decay=4e-05, epochs_last=5, epochs=2, lr=0.05, budget=0.01,
        batch_size=128, held_out=0.25, seed=0, slack=None, search='training', per='hybrid')
        >>> ProAct.searched("channel") == ProAct(search="line", per="channel")
        True
    """

    k: float = 20.0
    temperature: float = 1.0
    weight_decay: float = 4e-5
    epochs_last: int = 50
    epochs: int = 20
    lr: float = 0.01
    budget: float = 0.01
    batch_size: int = 128
    held_out: float = HELD_OUT
    seed: int = 0
    slack: float | None = None
    search: Literal["training", "line"] = "training"
    per: Literal["hybrid", "layer", "channel", "neuron"] = "hybrid"

    def __post_init__(self) -> None:
        self._schedule(self.epochs)
        self._schedule(self.epochs_last)
        if self.search not in ("training", "line") or self.per not in ("hybrid", "layer", "channel", "neuron"):
            raise ConfigError(
                f"ProAct: search is 'training' or 'line', per is 'hybrid', 'layer', 'channel' or 'neuron', got {self!r}"
            )
        if not self.k > 0 or not self.temperature > 0:
            raise ConfigError(f"ProAct needs k > 0 and temperature > 0, got {self!r}")
        check_fields(self)

    @classmethod
    def quick(cls) -> Self:
        """A tenth of the epochs at a learning rate to match, for a first look."""
        return cls(epochs_last=5, epochs=2, lr=0.05)

    @classmethod
    def searched(cls, per: Literal["hybrid", "layer", "channel", "neuron"] = "hybrid") -> Self:
        """The same loss, minimised by a search of one factor a layer instead of by training."""
        return cls(search="line", per=per)

    def _schedule(self, epochs: int) -> Schedule:
        return Schedule(epochs, self.lr, 10, self.batch_size, self.weight_decay, self.budget)

    def _loss(self, given: Tensor, targets: Tensor, teacher: Tensor) -> Tensor:
        return distillation(given, teacher, self.temperature) + cross_entropy(given, targets, teacher)

    def fit(self, work: Work) -> pd.DataFrame:
        parts = work.calibration.split(self.held_out, self.seed)
        last = last_rectifier(list(work.ranges))

        def grain(site: ActivationSite) -> Per:
            if self.per == "hybrid":
                return "neuron" if site is last else "layer"
            return self.per

        bounds = work.place(Smooth, grain, self.slack, slope=self.k)
        start = parts[1].accuracy_of(work.model)
        work.spend(parts[1], 1.0)
        if start < parts[1].accuracy - self.budget:
            work.notes.append(
                f"before any training the bounds already cost accuracy, {start:.2%} against {parts[1].accuracy:.2%} "
                f"unbounded: HyReLU halves a value that equals its bound"
            )
        stages = [
            Stage(site.name, [bounds[site]], self._schedule(self.epochs_last if site is last else self.epochs))
            for site in reversed(bounds)
        ]
        if self.search == "line":
            return search_stages(work, stages, parts, self._loss)
        return train_stages(work, stages, parts, self._loss, self.seed)


def last_rectifier(sites: list[ActivationSite]) -> ActivationSite:
    """The last ReLU executed, or the last activation of all where there is no ReLU."""
    rectifiers = [site for site in sites if site.function == "relu"]
    return (rectifiers or sites)[-1]
