"""How a model's outputs become classes: what the user says, or what the outputs and the network itself tell."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flipproof.errors import ConfigError, DataError, FlipproofWarning
from flipproof.running.data import Batches, Output, call, pick
from flipproof.running.judge import WORST, Judge, holds_nan
from flipproof.running.ranking import area_of
from flipproof.running.scales import Scale, scale_of
from flipproof.running.sources import Source, Sources

DecisionChoice = Literal["logits", "probabilities", "argmax"] | float | None
"""How outputs are to be read; None recognises it and warns where it cannot be told. See `Decision.from_golden`."""


@dataclass(frozen=True)
class Decision(Judge):
    """How this model's outputs become classes and scores, read once off its golden outputs.

    An answer is right if the target is among the `top` best scores, and critical if the best class without faults is
    not among them any more, or, with `confidence_drop`, if its probability fell by more than that.

    Attributes:
        outputs: whether they are "logits" or "probabilities" (all in [0, 1], and rows of several classes sum to 1).
        classes: number of classes; 2 for a single output.
        threshold: for a single output, class 1 is `output > threshold`: 0.5 for probabilities, 0 for logits, or what
            the user said. None for several outputs, where the largest wins (the first of equals).
        assumed: True if the outputs alone could be either, and nobody said which. It plays no part in comparisons.
        top: how many of the best classes count; 1 for a single output.
        confidence_drop: by how much the probability of the class may fall, 0 to 1; None if any fall is tolerated.

    Example:
        >>> Decision.from_golden(torch.tensor([[2.0, -1.0], [0.5, 3.0]]))
        Decision(outputs='logits', classes=2, threshold=None)
        >>> Decision.from_golden(torch.tensor([0.2, 0.9])).classes_of(torch.tensor([0.6, float("nan")]))
        tensor([ 1, -1])
    """

    outputs: Literal["logits", "probabilities"]
    classes: int
    threshold: float | None
    assumed: bool = field(default=False, compare=False, repr=False)
    top: int = field(default=1, repr=False)
    confidence_drop: float | None = field(default=None, repr=False)

    task: ClassVar[str] = "classification"
    main: ClassVar[str] = "accuracy"  # type: ignore[misc]
    usual: ClassVar[tuple[str, ...]] = ("accuracy",)  # type: ignore[misc]

    @classmethod
    def from_golden(cls, golden: Tensor, choice: DecisionChoice = None) -> Decision:
        """Read the convention off fault-free outputs of shape (N,), (N, 1) or (N, C).

        Args:
            golden: fault-free outputs.
            choice: "logits" or "probabilities" say what the outputs are; a number is the threshold of a single output
                (class 1 is `output > threshold`); "argmax" says that the largest of several wins. None takes outputs in
                [0, 1] (and, of several classes, rows that sum to 1) for probabilities, all others for logits.

        Raises:
            DataError: for any other shape, or a choice that these outputs contradict.
            ConfigError: for a choice of another kind.

        Example:
            >>> Decision.from_golden(torch.tensor([0.29, 0.31]), "logits").classes_of(torch.tensor([0.3, -0.3]))
            tensor([1, 0])
        """
        choice = check_choice(choice)
        if golden.dim() not in (1, 2) or golden.shape[-1] == 0:
            raise DataError(
                f"outputs must have the shape (samples,), (samples, 1) or (samples, classes), got "
                f"{tuple(golden.shape)}; pass output= a function that picks or reshapes them"
            )
        inside = bool(((golden >= 0) & (golden <= 1)).all())
        if choice == "probabilities" and not inside:
            low, high = (float(end) for end in torch.aminmax(golden.detach()))
            raise DataError(
                f"decision='probabilities', but the fault-free outputs reach from {low:.4g} to {high:.4g}; say "
                f"decision='logits', or output= a function that gives probabilities"
            )
        if golden.dim() == 1 or golden.shape[1] == 1:
            if choice == "argmax":
                raise DataError(
                    "decision='argmax' needs one output a class, and this model gives a single one: say 'logits', "
                    "'probabilities' or a threshold"
                )
            if isinstance(choice, float):
                return cls("probabilities" if inside and 0 < choice < 1 else "logits", 2, choice)
            if choice is not None:
                return cls("logits", 2, 0.0) if choice == "logits" else cls("probabilities", 2, 0.5)
            return cls("probabilities", 2, 0.5, assumed=True) if inside else cls("logits", 2, 0.0)
        if isinstance(choice, float):
            raise DataError(
                f"decision={choice:g} is a threshold for a single output, and this model gives {golden.shape[1]}; pass "
                f"output= a function that picks one, or leave decision= out"
            )
        if choice == "logits":
            return cls("logits", golden.shape[1], None)
        # half-precision softmax sums to 1 within about 1e-2; logits that pass this test in every row are a fluke
        total = golden.to(torch.float64).sum(dim=1)
        probabilities = inside and bool(((total - 1).abs() < 2e-2).all())
        if choice == "probabilities" and not probabilities:
            raise DataError(
                f"decision='probabilities', but rows of the fault-free outputs sum to {float(total.min()):.4g} … "
                f"{float(total.max()):.4g} instead of 1; say decision='logits' (or 'argmax')"
            )
        assumed = probabilities and choice is None
        return cls("probabilities" if probabilities else "logits", golden.shape[1], None, assumed=assumed)

    def settled(self, source: Source) -> Decision:
        """What an assumption comes to, once it is known what computed the outputs.

        A sigmoid or softmax settles that they are probabilities. What comes straight from a linear layer is a logit: of
        several classes, whose largest wins in either case, nothing stays assumed; of a single output its threshold.
        """
        if not self.assumed or source == "squashing":
            return replace(self, assumed=False)
        if source == "linear":
            several = self.threshold is None
            return replace(self, outputs="logits", threshold=None if several else 0.0, assumed=not several)
        return self

    @property
    def choice(self) -> DecisionChoice:
        """What `decision=` takes to mean the same.

        Example:
            >>> Decision("logits", 2, 0.3).choice, Decision("logits", 2, 0.0).choice
            (0.3, 'logits')
        """
        usual = {"logits": 0.0, "probabilities": 0.5}[self.outputs]
        return self.outputs if self.threshold in (None, usual) else self.threshold

    def describe(self) -> str:
        """How outputs become classes, in words.

        Example:
            >>> Decision("logits", 2, 0.0).describe()
            'logits, class 1 above 0'
        """
        if self.threshold is None:
            wins = "the largest" if self.top == 1 else f"the {self.top} largest"
            said = f"{self.outputs}, {wins} of {self.classes} {'wins' if self.top == 1 else 'win'}"
        else:
            said = f"{self.outputs}, class 1 above {self.threshold:g}"
        if self.confidence_drop is not None:
            said += f", critical too if its probability falls by more than {self.confidence_drop:g}"
        return said

    def classes_of(self, outputs: Tensor) -> Tensor:
        """The class of each sample, int64 (N,); −1 where the output holds a NaN."""
        if self.threshold is None:
            chosen = outputs.argmax(dim=1)
        else:
            chosen = (outputs.reshape(-1) > self.threshold).to(torch.int64)
        return torch.where(holds_nan(outputs), -1, chosen)

    def scores(self, outputs: Tensor) -> Tensor:
        """Scores for ranking metrics, float64: (N,) for one output, (N, C) class probabilities for several.

        Softmax is taken in float64 and in the limit: infinite logits share the whole probability. NaN rows stay NaN.
        """
        values = outputs.to(torch.float64)
        if self.threshold is not None:
            return values.reshape(-1)
        if self.outputs == "probabilities":
            return values
        top = values.amax(dim=1, keepdim=True)
        at_top = (values == top).to(torch.float64)
        limit = at_top / at_top.sum(dim=1, keepdim=True)
        return torch.where(torch.isinf(top), limit, torch.softmax(values, dim=1))

    @property
    def labels(self) -> int:  # type: ignore[override]
        """A golden answer is of its class."""
        return self.classes

    def labels_of(self, golden: Tensor) -> Tensor:
        return self.classes_of(golden)

    def critical(self, golden: Tensor, faulty: Tensor, targets: Tensor) -> Tensor:
        before = self.classes_of(golden)
        found = self.classes_of(faulty) != before if self.top == 1 else ~self.among(faulty, before)
        if self.confidence_drop is not None:
            fell = self._probability(golden, before) - self._probability(faulty, before)
            found = found | ~(fell <= self.confidence_drop)
        return found

    def correct(self, outputs: Tensor, targets: Tensor, golden: Tensor) -> Tensor:
        return self.classes_of(outputs) == targets if self.top == 1 else self.among(outputs, targets)

    def among(self, outputs: Tensor, classes: Tensor) -> Tensor:
        """Whether each sample's class is among the `top` best of its scores (the first of equals), bool (N,).

        Example:
            >>> Decision("logits", 3, None, top=2).among(torch.tensor([[1.0, 3.0, 1.0]] * 3), torch.tensor([0, 1, 2]))
            tensor([ True,  True, False])
        """
        own = outputs.gather(1, classes.clamp(min=0)[:, None])
        place = torch.arange(outputs.shape[1])
        before = (outputs > own) | ((outputs == own) & (place < classes[:, None]))
        return (before.sum(dim=1) < self.top) & ~holds_nan(outputs) & (classes >= 0)

    def _probability(self, outputs: Tensor, classes: Tensor) -> Tensor:
        """Of these classes, float64 (N,)."""
        if self.threshold is None:
            return self.scores(outputs).gather(1, classes.clamp(min=0)[:, None])[:, 0]
        one = outputs.double().reshape(-1)
        one = one if self.outputs == "probabilities" else torch.sigmoid(one)
        return torch.where(classes == 1, one, 1 - one)

    def scale(self, name: str) -> Scale:
        return scale_of(self.known(name, CLASS_METRICS))

    def measure(self, name: str, outputs: Tensor, targets: Tensor, golden: Tensor) -> float:
        if self.known(name, CLASS_METRICS) == "accuracy":
            return int(self.correct(outputs, targets, golden).sum()) / len(targets)
        scores, nan = self.scores(outputs), holds_nan(outputs)
        columns = [(1, scores)] if scores.dim() == 1 else list(enumerate(scores.unbind(dim=1)))
        areas = [area_of(name, column, targets == label, nan, f"class {label}") for label, column in columns]
        return sum(areas) / len(areas)

    def check_targets(self, targets: Tensor) -> None:
        outside = (targets < 0) | (targets >= self.classes)
        if bool(outside.any()):
            first = int(outside.nonzero()[0, 0])
            raise DataError(
                f"sample {first} has the label {int(targets[first])}, but the model answers classes 0 to "
                f"{self.classes - 1} ({int(outside.sum())} such samples)"
            )

    def as_classes(self, outputs: Tensor, targets: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.logits(outputs), targets, self.logits(teacher)

    def logits(self, outputs: Tensor) -> Tensor:
        """Outputs as logits (N, classes), whichever convention the model follows; differentiable.

        Example:
            >>> Decision("probabilities", 2, None).logits(torch.tensor([[0.5, 0.5]])).softmax(dim=1)
            tensor([[0.5000, 0.5000]])
        """
        if self.threshold is not None:
            single = outputs.reshape(-1)
            border = torch.full_like(single, self.threshold)
            if self.outputs == "probabilities":
                single, border = (torch.logit(part, eps=torch.finfo(part.dtype).tiny) for part in (single, border))
            return torch.stack([border, single], dim=1)
        if self.outputs == "probabilities":
            return outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()
        return outputs

    def lead(self, teacher: Tensor) -> float:
        """The median distance of the best score to the second, or of a single score to its threshold."""
        scores = teacher.double()
        if self.threshold is not None:
            return float((scores.reshape(-1) - self.threshold).abs().median())
        best = scores.topk(2, dim=1).values if scores.shape[1] > 1 else torch.zeros(len(scores), 2)
        return float((best[:, 0] - best[:, 1]).median())

    def drift(self, outputs: Tensor, teacher: Tensor, targets: Tensor) -> float:
        """Σ_j p_j · log(p_j / q_j), mean over samples, in nats; p is the softmax without faults, q that of the others.

        Example:
            >>> rule, none = Decision("logits", 2, None), torch.zeros(1, dtype=torch.int64)
            >>> rule.drift(torch.zeros(1, 2), torch.zeros(1, 2), none)
            0.0
            >>> rule.drift(torch.full((1, 2), float("nan")), torch.zeros(1, 2), none)
            20.0
        """
        return drift(self.logits(outputs), self.logits(teacher))


CLASS_METRICS = ("accuracy", "auroc", "average_precision")


def drift(outputs: Tensor, golden: Tensor) -> float:
    """Divergence of two rows of logits, mean over rows, in nats; at most `WORST`, as NaN counts."""
    p, q = F.log_softmax(golden.double(), dim=1), F.log_softmax(outputs.double(), dim=1)
    apart = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(dim=1)  # what has no probability adds nothing
    return float(torch.nan_to_num(apart, nan=WORST, posinf=WORST).clamp(0, WORST).mean())


def check_choice(choice: object) -> DecisionChoice:
    """The choice if it is one; a whole number becomes a float.

    Raises:
        ConfigError: saying what `decision=` takes.
    """
    if choice is None or choice in ("logits", "probabilities", "argmax"):
        return choice
    if isinstance(choice, (int, float)) and not isinstance(choice, bool) and math.isfinite(choice):
        return float(choice)
    raise ConfigError(
        f"decision= takes None, 'logits', 'probabilities', 'argmax' or a number (the threshold of a single output), "
        f"got {choice!r}"
    )


def decide(
    model: nn.Module, batches: Batches, output: Output, golden: Tensor, choice: DecisionChoice = None
) -> Decision:
    """The decision rule, with a warning where it had to be assumed.

    Outputs in [0, 1] may be probabilities (class 1 above 0.5) or logits that happen to lie there (class 1 above 0).
    If nobody says, one batch is run again: what a sigmoid or softmax gave are probabilities, and that is all. What a
    linear layer gave is taken for logits, anything else for probabilities; both are warned about, but for logits of
    several classes, whose largest wins in either case.

    Args:
        model: fault-free, in eval mode.
        batches: what it was run on.
        output: picks the tensor to judge.
        golden: fault-free outputs.
        choice: what the user says.

    Raises:
        DataError: if the outputs have no shape that can be judged, or contradict `choice`.
    """
    decision = Decision.from_golden(golden, choice)
    if not decision.assumed:
        return decision
    with Sources() as sources:
        judged = pick(call(model, batches.inputs[0]), output)
    decision = decision.settled(sources.of(judged))
    if decision.assumed:
        low, high = float(golden.min()), float(golden.max())
        other = "logits" if decision.outputs == "probabilities" else "probabilities"
        warnings.warn(
            f"all fault-free outputs lie in [{low:.4g}, {high:.4g}] and could be probabilities or logits; they are "
            f"read as {decision.describe()}. Say which: decision={decision.outputs!r} for this reading, "
            f"decision={other!r} for the other"
            + (", or a number as the threshold" if decision.threshold is not None else ""),
            FlipproofWarning,
            stacklevel=3,
        )
    return decision
