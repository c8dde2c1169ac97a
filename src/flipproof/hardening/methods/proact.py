"""ProAct: hybrid smooth thresholds, trained from the last layer to the first (Mousavi et al. 2024, section V)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import pandas as pd
from torch import Tensor

from flipproof.errors import ConfigError
from flipproof.hardening.bounds.bounded import Smooth
from flipproof.hardening.fitting.calibration import cross_entropy, distillation
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

    Example:
        >>> ProAct.quick()
        ProAct(k=20.0, temperature=1.0, weight_decay=4e-05, epochs_last=5, epochs=2, lr=0.05, budget=0.01,
        batch_size=128, held_out=0.25, seed=0, slack=None)
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

    def __post_init__(self) -> None:
        self._schedule(self.epochs)
        self._schedule(self.epochs_last)
        if not self.k > 0 or not self.temperature > 0:
            raise ConfigError(f"ProAct needs k > 0 and temperature > 0, got {self!r}")
        check_fields(self)

    @classmethod
    def quick(cls) -> Self:
        """A tenth of the epochs at a learning rate to match, for a first look."""
        return cls(epochs_last=5, epochs=2, lr=0.05)

    def _schedule(self, epochs: int) -> Schedule:
        return Schedule(epochs, self.lr, 10, self.batch_size, self.weight_decay, self.budget)

    def _loss(self, given: Tensor, targets: Tensor, teacher: Tensor) -> Tensor:
        return distillation(given, teacher, self.temperature) + cross_entropy(given, targets, teacher)

    def fit(self, work: Work) -> pd.DataFrame:
        parts = work.calibration.split(self.held_out, self.seed)
        last = last_rectifier(list(work.ranges))
        bounds = work.place(Smooth, lambda site: "neuron" if site is last else "layer", self.slack, slope=self.k)
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
        return train_stages(work, stages, parts, self._loss, self.seed)


def last_rectifier(sites: list[ActivationSite]) -> ActivationSite:
    """The last ReLU executed, or the last activation of all where there is no ReLU."""
    rectifiers = [site for site in sites if site.function == "relu"]
    return (rectifiers or sites)[-1]
