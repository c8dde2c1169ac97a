"""Training thresholds and nothing else: weights, running statistics and gradients stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flipproof.engine.progress import Step
from flipproof.errors import ConfigError, ModelError
from flipproof.hardening.bounds.bounded import Bounded
from flipproof.hardening.fitting.calibration import Calibration, Loss, logits
from flipproof.hardening.methods.base import Work
from flipproof.running.data import call, pick


@dataclass(frozen=True)
class Schedule:
    """How thresholds are trained: Adam on loss + γ‖λ‖².

    Attributes:
        epochs: passes over the part to fit on.
        lr: learning rate at first; halved every `halve_every` epochs.
        halve_every: epochs.
        batch_size: samples a step.
        weight_decay: γ.
        budget: accuracy that may be lost on the held-out part, a fraction.
    """

    epochs: int
    lr: float
    halve_every: int
    batch_size: int
    weight_decay: float
    budget: float

    def __post_init__(self) -> None:
        whole = min(self.epochs, self.halve_every, self.batch_size)
        if whole < 1 or not self.lr > 0 or self.weight_decay < 0 or not 0 <= self.budget < 1:
            raise ConfigError(
                f"training thresholds needs epochs, halve_every and batch_size ≥ 1, lr > 0, weight_decay ≥ 0 and "
                f"budget in [0, 1), got {self!r}"
            )


def train_thresholds(
    work: Work,
    bounds: Sequence[Bounded],
    parts: tuple[Calibration, Calibration],
    loss: Loss,
    schedule: Schedule,
    *,
    generator: torch.Generator,
    step: Step,
    label: str,
) -> list[dict[str, Any]]:
    """Train the thresholds of some bounds and keep the smallest that hold the accuracy budget on the held-out part.

    Smallest is by ‖λ‖² over these bounds, their values before training included. If nothing holds the budget, they stay
    as they were.

    Args:
        work: what is being hardened; its model is run in eval mode.
        bounds: which thresholds train; all others are fixed.
        parts: what to fit on, what to accept on.
        loss: (logits, targets, teacher's logits) → a scalar.
        schedule: how.
        generator: of the order of samples.
        step: called after every epoch.
        label: names this training in the history.

    Returns:
        One row an epoch.

    Raises:
        ModelError: if the loss becomes NaN or infinite.
    """
    fit, held = parts
    thresholds = [bound.threshold for bound in bounds]
    floor = held.accuracy - schedule.budget
    rows: list[dict[str, Any]] = []
    best = [threshold.detach().clone() for threshold in thresholds]
    start = held.accuracy_of(work.model)
    work.spend(held, 1.0)
    smallest = _size(best) if start >= floor else float("inf")
    cost: float | None = None
    with _only(work.model, thresholds):
        optimiser = torch.optim.Adam(thresholds, lr=schedule.lr)
        halving = torch.optim.lr_scheduler.StepLR(optimiser, schedule.halve_every, gamma=0.5)
        for epoch in range(1, schedule.epochs + 1):
            rate = float(optimiser.param_groups[0]["lr"])
            total = 0.0
            for inputs, targets, teacher in fit.shuffled(schedule.batch_size, generator):
                with FlopCounterMode(display=False) if cost is None else nullcontext() as forward:
                    value = _loss_of(work.model, fit, inputs, targets, teacher, loss)
                penalty = schedule.weight_decay * sum((threshold.square().sum() for threshold in thresholds), 0.0)
                optimiser.zero_grad(set_to_none=True)
                with FlopCounterMode(display=False) if cost is None else nullcontext() as backward:
                    torch.autograd.backward(value + penalty)
                if forward is not None and backward is not None:
                    cost = _cost_of_a_step(forward, backward)
                optimiser.step()
                with torch.no_grad():
                    for threshold in thresholds:
                        threshold.clamp_(min=0.0)  # a negative bound cuts off as much as 0 does
                total += float(value.detach()) * targets.numel()
            if not total < float("inf"):
                raise ModelError(f"{label}: the loss became {total}; use a smaller lr than {schedule.lr}")
            halving.step()
            accuracy = held.accuracy_of(work.model)
            size = _size(thresholds)
            accepted = accuracy >= floor and size < smallest and _alive(bounds)
            if accepted:
                smallest, best = size, [threshold.detach().clone() for threshold in thresholds]
            rows.append(
                {
                    "stage": label,
                    "epoch": epoch,
                    "lr": rate,
                    "loss": total / fit.samples,
                    "held_out_accuracy": accuracy,
                    "mean_threshold": _mean(thresholds),
                    "accepted": accepted,
                }
            )
            work.spend(fit, WITHOUT_COUNT if cost is None else cost)
            work.spend(held, 1.0)
            step(f"{label} {accuracy:.1%}")
        with torch.no_grad():
            for threshold, value in zip(thresholds, best, strict=True):
                threshold.copy_(value)
    return rows


WITHOUT_COUNT = 3.0
"""Forwards that a training step is charged with in a network without a matrix product or convolution to count."""


def _cost_of_a_step(forward: FlopCounterMode, backward: FlopCounterMode) -> float:
    """Multiplications of a forward and its backward pass ÷ those of the forward.

    Weights get no gradients, and nothing is propagated below the bounds that train: a backward pass costs between
    nothing and one forward, not two.
    """
    once = forward.get_total_flops()
    return (once + backward.get_total_flops()) / once if once else WITHOUT_COUNT


def _loss_of(model: nn.Module, data: Calibration, inputs: Any, targets: Tensor, teacher: Tensor, loss: Loss) -> Tensor:
    outputs = pick(call(model, inputs), data.output)
    golden = logits(teacher.to(outputs.device), data.decision)
    return loss(logits(outputs, data.decision), targets.to(outputs.device), golden)


@contextmanager
def _only(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone, in eval mode; everything is put back."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.is_leaf]
    training = [module for module in model.modules() if module.training]
    model.eval()
    for parameter in asked:
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in asked:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _size(thresholds: Sequence[Tensor]) -> float:
    return float(sum(float(threshold.detach().double().square().sum()) for threshold in thresholds))


def _mean(thresholds: Sequence[Tensor]) -> float:
    total = sum(float(threshold.detach().double().sum()) for threshold in thresholds)
    return total / sum(threshold.numel() for threshold in thresholds)


def _alive(bounds: Sequence[Bounded]) -> bool:
    """Whether every ReLU still lets something through."""
    return all(bool((bound.threshold > 0).any()) for bound in bounds if bound.rectifies)
