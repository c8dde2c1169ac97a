"""Training thresholds and nothing else: weights, running statistics and gradients stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flipproof.engine.progress import Step, progress_bar
from flipproof.errors import ConfigError, ModelError
from flipproof.hardening.bounds.bounded import Bounded
from flipproof.hardening.fitting._prefix import Prefix, PrefixDiffers, Prefixes
from flipproof.hardening.fitting.calibration import Calibration, DistillationLoss
from flipproof.hardening.fitting.work import Work
from flipproof.running.data import call, pick
from flipproof.running.values import same

T = TypeVar("T")


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


@dataclass(frozen=True)
class Stage:
    """Bounds that train together.

    Attributes:
        label: names the stage in history and journal.
        bounds: whose thresholds train; all others are fixed.
        schedule: how.
    """

    label: str
    bounds: Sequence[Bounded]
    schedule: Schedule


def train_stages(
    work: Work, stages: Sequence[Stage], parts: tuple[Calibration, Calibration], loss: DistillationLoss, seed: int
) -> pd.DataFrame:
    """Train one stage after the other; what an interrupted run has finished is taken from its journal.

    Args:
        work: what is being hardened, with all bounds in place.
        stages: in their order.
        parts: what to fit on, what to accept on.
        loss: (logits, targets, teacher's logits) → a scalar.
        seed: of the order of samples.

    Returns:
        One row an epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    prefixes = Prefixes(work.model, parts)
    rows: list[dict[str, Any]] = []
    with progress_bar(sum(stage.schedule.epochs for stage in stages), 0, show=work.progress) as step:
        for stage in stages:
            train = partial(
                train_thresholds, work, stage, parts, loss, prefixes=prefixes, generator=generator, step=step
            )
            rows += work.stage(
                stage.label, stage.bounds, train, step=step, steps=stage.schedule.epochs, generator=generator
            )
    return pd.DataFrame(rows)


def train_thresholds(
    work: Work,
    stage: Stage,
    parts: tuple[Calibration, Calibration],
    loss: DistillationLoss,
    *,
    prefixes: Prefixes,
    generator: torch.Generator,
    step: Step,
) -> list[dict[str, Any]]:
    """Train the thresholds of some bounds and keep the smallest that hold the accuracy budget on the held-out part.

    Smallest is by ‖λ‖² over these bounds, their values before training included. If nothing holds the budget, they stay
    as they were. What the model computes before these bounds is kept from epoch to epoch (`Prefix`), where that is
    known to give the same bits.

    Args:
        work: what is being hardened; its model is run in eval mode.
        stage: what trains, and how.
        parts: what to fit on, what to accept on.
        loss: (logits, targets, teacher's logits) → a scalar.
        prefixes: where the model can be cut.
        generator: of the order of samples.
        step: called after every epoch.

    Returns:
        One row an epoch.

    Raises:
        ModelError: if the loss becomes NaN or infinite.
    """
    order = generator.get_state()

    def run(prefix: Prefix | None) -> list[dict[str, Any]]:
        generator.set_state(order)
        return _Training(work, stage, parts, loss, prefix).run(generator, step)

    with only(work.model, [bound.threshold for bound in stage.bounds]):
        return from_the_cut(stage, prefixes if stage.schedule.epochs > 1 else None, run)


def from_the_cut(stage: Stage, prefixes: Prefixes | None, run: Callable[[Prefix | None], T]) -> T:
    """Run a stage on kept values where they prove to be right, else from its start with whole forwards.

    Args:
        stage: what is run; its thresholds are put back before it runs a second time.
        prefixes: where the model can be cut; None cuts nothing.
        run: the stage, given where it begins.
    """
    thresholds = [bound.threshold for bound in stage.bounds]
    before = [threshold.detach().clone() for threshold in thresholds]
    prefix = None if prefixes is None else prefixes.before(stage.bounds, stage.schedule.batch_size)
    if prefix is not None:
        try:
            return run(prefix)
        except PrefixDiffers:
            write(thresholds, before)
    return run(None)


class StageRun:
    """One stage under way: the model from the cut on, on what it is fitted to and on what it is accepted on."""

    def __init__(
        self,
        work: Work,
        stage: Stage,
        parts: tuple[Calibration, Calibration],
        loss: DistillationLoss,
        prefix: Prefix | None,
    ) -> None:
        self.work, self.stage, self.loss, self.prefix = work, stage, loss, prefix
        self.fit, self.held = parts
        self.thresholds = [bound.threshold for bound in stage.bounds]

    @property
    def floor(self) -> float:
        """The least accuracy that is accepted."""
        return self.held.accuracy - self.stage.schedule.budget

    def start(self) -> float:
        """Accuracy at first, by the whole model; the two parts of a prefix must give the same answers."""
        whole = self.held.outputs(self.work.model)
        self.work.spend(self.held, 1.0)
        if self.prefix is not None:
            self.work.spend(self.fit, self.prefix.share)
            self.work.spend(self.held, 1.0)
            if not same(whole, self.prefix.outputs(self.held)):
                raise PrefixDiffers
        return self.held.accuracy_from(whole)

    def accuracy(self) -> float:
        """On what the stage is accepted on."""
        if self.prefix is None:
            self.work.spend(self.held, 1.0)
            return self.held.accuracy_of(self.work.model)
        self.work.spend(self.held, 1.0 - self.prefix.share)
        return self.held.accuracy_from(self.prefix.outputs(self.held))

    def loss_of(self, rows: Tensor | None, inputs: Any, targets: Tensor, teacher: Tensor) -> Tensor:
        """The mean loss of some samples, without γ‖λ‖²."""
        prefix = self.prefix
        raw = call(self.work.model, inputs) if prefix is None or rows is None else prefix.run(inputs, rows)
        outputs = pick(raw, self.fit.output)
        place = outputs.device
        return self.loss(*self.fit.judge.as_classes(outputs, targets.to(place), teacher.to(place)))

    def spend_pass(self, cost: float, audited: int) -> None:
        """Count a pass over the data to fit on.

        Args:
            cost: forward-equivalents without what is kept.
            audited: `Prefix.audited` before it.
        """
        self.work.spend(self.fit, cost)
        if self.prefix is not None:
            self.work.spend(self.fit, self.prefix.share * (self.prefix.audited - audited) / self.fit.samples)

    def audited(self) -> int:
        """Samples whose prefix was computed anew so far."""
        return 0 if self.prefix is None else self.prefix.audited


class _Training(StageRun):
    """Adam on the thresholds."""

    cost: float | None = None
    """Forward-equivalents of a step on all data to fit on, without what is kept; None before the first step."""

    def run(self, generator: torch.Generator, step: Step) -> list[dict[str, Any]]:
        """Train, and leave the thresholds that were accepted last."""
        schedule, thresholds = self.stage.schedule, self.thresholds
        best = [threshold.detach().clone() for threshold in thresholds]
        smallest = size_of(best) if self.start() >= self.floor else float("inf")
        rows: list[dict[str, Any]] = []
        optimiser = torch.optim.Adam(thresholds, lr=schedule.lr)
        halving = torch.optim.lr_scheduler.StepLR(optimiser, schedule.halve_every, gamma=0.5)
        for epoch in range(1, schedule.epochs + 1):
            rate = float(optimiser.param_groups[0]["lr"])
            loss = self._epoch(optimiser, generator)
            if not loss < float("inf"):
                raise ModelError(f"{self.stage.label}: the loss became {loss}; use a smaller lr than {schedule.lr}")
            halving.step()
            reached = self.accuracy()
            size = size_of(thresholds)
            accepted = reached >= self.floor and size < smallest and alive(self.stage.bounds)
            if accepted:
                smallest, best = size, [threshold.detach().clone() for threshold in thresholds]
            rows.append(
                {
                    "stage": self.stage.label,
                    "epoch": epoch,
                    "lr": rate,
                    "loss": loss,
                    "held_out_accuracy": reached,
                    "mean_threshold": mean_of(thresholds),
                    "accepted": accepted,
                }
            )
            step(f"{self.stage.label} {reached:.1%}")
        write(thresholds, best)
        return rows

    def _epoch(self, optimiser: torch.optim.Optimizer, generator: torch.Generator) -> float:
        """Once through the data to fit on; the mean loss."""
        total, audited = 0.0, self.audited()
        for rows, inputs, targets, teacher in self.fit.shuffled(self.stage.schedule.batch_size, generator):
            value = self._step(optimiser, rows, inputs, targets, teacher)
            total += value * len(targets)
        assert self.cost is not None
        self.spend_pass(self.cost, audited)
        return total / self.fit.samples

    def _step(
        self,
        optimiser: torch.optim.Optimizer,
        rows: Tensor | None,
        inputs: Any,
        targets: Tensor,
        teacher: Tensor,
    ) -> float:
        with FlopCounterMode(display=False) if self.cost is None else nullcontext() as forward:
            value = self.loss_of(rows, inputs, targets, teacher)
        penalty = self.stage.schedule.weight_decay * sum((each.square().sum() for each in self.thresholds), 0.0)
        optimiser.zero_grad(set_to_none=True)
        with FlopCounterMode(display=False) if self.cost is None else nullcontext() as backward:
            torch.autograd.backward(value + penalty)
        if forward is not None and backward is not None:
            # the first step of a stage is audited, so its forward is whole
            self.cost = _cost_of_a_step(forward, backward) - (0.0 if self.prefix is None else self.prefix.share)
        optimiser.step()
        with torch.no_grad():
            for threshold in self.thresholds:
                threshold.clamp_(min=0.0)  # a negative bound cuts off as much as 0 does
        return float(value.detach())


WITHOUT_COUNT = 3.0
"""Forwards that a training step is charged with in a network without a matrix product or convolution to count."""


def _cost_of_a_step(forward: FlopCounterMode, backward: FlopCounterMode) -> float:
    """Multiplications of a forward and its backward pass ÷ those of the forward.

    Weights get no gradients, and nothing is propagated below the bounds that train: a backward pass costs between
    nothing and one forward, not two.
    """
    once = forward.get_total_flops()
    return (once + backward.get_total_flops()) / once if once else WITHOUT_COUNT


@contextmanager
def only(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
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


def write(thresholds: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Set thresholds in place."""
    with torch.no_grad():
        for threshold, value in zip(thresholds, values, strict=True):
            threshold.copy_(value)


def size_of(thresholds: Sequence[Tensor]) -> float:
    """‖λ‖²."""
    return float(sum(float(threshold.detach().double().square().sum()) for threshold in thresholds))


def mean_of(thresholds: Sequence[Tensor]) -> float:
    """The mean λ."""
    total = sum(float(threshold.detach().double().sum()) for threshold in thresholds)
    return total / sum(threshold.numel() for threshold in thresholds)


def alive(bounds: Sequence[Bounded]) -> bool:
    """Whether every ReLU still lets something through."""
    return all(bool((bound.threshold > 0).any()) for bound in bounds if bound.rectifies)
