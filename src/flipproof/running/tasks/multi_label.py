"""Any number of labels a sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flipproof.errors import ConfigError, DataError
from flipproof.running.data import Batches, Output, tensor_of
from flipproof.running.decision import Decision, DecisionChoice, check_choice, decide
from flipproof.running.judge import Judge, holds_nan
from flipproof.running.ranking import area_of
from flipproof.running.scales import Scale, scale_of
from flipproof.running.tasks.base import Task


@dataclass(frozen=True)
class MultiLabel(Task):
    """The model gives one score a label, (N, L); targets say which labels a sample has, 0 or 1, (N, L).

    An answer is right if all its labels are, and critical if any label comes or goes.

    Args:
        decision: how a score becomes a label: "logits" (above 0), "probabilities" (above 0.5) or a threshold; None
            takes scores that all lie in [0, 1] for probabilities.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net, x = torch.nn.Linear(4, 3), torch.randn(50, 4)
        >>> result = fp.assess(net, [(x, (net(x) > 0).int())], faults=fp.BitErrorRate(1e-2), trials=5,
        ...                    task=fp.MultiLabel())
        >>> result.golden
        {'exact_match': 1.0, 'label_accuracy': 1.0}
    """

    decision: DecisionChoice = None

    name: ClassVar[str] = "multi-label classification"

    def __post_init__(self) -> None:
        object.__setattr__(self, "decision", check_choice(self.decision))
        if self.decision == "argmax":
            raise ConfigError(
                "MultiLabel: decision='argmax' picks one class; take 'logits', 'probabilities' or a number"
            )

    def read_targets(self, given: Any, inputs: Any, batch: int) -> Tensor:
        target = tensor_of(given, batch, "0 or 1 for each label, of shape (samples, labels)")
        if target.dim() != 2 or target.is_complex() or not bool(((target == 0) | (target == 1)).all()):
            raise DataError(
                f"batch {batch}: targets must be 0 or 1 for each label, of shape (samples, labels), got {target.dtype} "
                f"of shape {tuple(target.shape)}"
            )
        return target.to(torch.int64)

    def judge(self, model: nn.Module, batches: Batches, output: Output, golden: Tensor) -> Judge:
        if golden.shape != batches.targets.shape:
            raise DataError(
                f"the model answers {tuple(golden.shape)}, and the targets have the shape "
                f"{tuple(batches.targets.shape)}: one score for each label of each sample is needed"
            )
        one = decide(model, batches, output, golden.reshape(-1, 1), self.decision)
        return LabelJudge(one, golden.shape[1])


@dataclass(frozen=True)
class LabelJudge(Judge):
    """How rows of scores become labels.

    Attributes:
        each: how one score does.
        count: labels a sample.
    """

    each: Decision
    count: int = field(repr=False)

    task: ClassVar[str] = MultiLabel.name
    main: ClassVar[str] = "exact_match"  # type: ignore[misc]
    usual: ClassVar[tuple[str, ...]] = ("exact_match", "label_accuracy")  # type: ignore[misc]

    @property
    def assumed(self) -> bool:  # type: ignore[override]
        """Whether scores could be read otherwise too."""
        return self.each.assumed

    def describe(self) -> str:
        return f"{self.count} labels, {self.each.outputs}, each present above {self.each.threshold:g}"

    def found(self, outputs: Tensor) -> Tensor:
        """Which labels are given, int64 (N, L); −1 where the score is NaN."""
        return self.each.classes_of(outputs.reshape(-1, 1)).reshape(outputs.shape)

    def critical(self, golden: Tensor, faulty: Tensor, targets: Tensor) -> Tensor:
        return (self.found(golden) != self.found(faulty)).any(dim=1)

    def correct(self, outputs: Tensor, targets: Tensor, golden: Tensor) -> Tensor:
        return (self.found(outputs) == targets).all(dim=1)

    def scale(self, name: str) -> Scale:
        return scale_of(self.known(name, _METRICS))

    def measure(self, name: str, outputs: Tensor, targets: Tensor, golden: Tensor) -> float:
        found = self.found(outputs)
        match self.known(name, _METRICS):
            case "exact_match":
                return int(self.correct(outputs, targets, golden).sum()) / len(targets)
            case "label_accuracy":
                return int((found == targets).sum()) / targets.numel()
            case "f1":
                return self._f1(found, targets)
        scores, nan = self.each.scores(outputs.reshape(-1, 1)).reshape(outputs.shape), holds_nan(outputs)
        areas = [area_of(name, scores[:, i], targets[:, i] == 1, nan, f"label {i}") for i in range(self.count)]
        return sum(areas) / len(areas)

    def _f1(self, found: Tensor, targets: Tensor) -> float:
        """The mean over labels of 2·TP ÷ (2·TP + FP + FN); a NaN score is wrong, whatever the target is."""
        from torchmetrics.functional.classification import multilabel_f1_score

        answered = torch.where(found < 0, 1 - targets, found)
        return float(multilabel_f1_score(answered, targets, num_labels=self.count, average="macro"))

    def as_classes(self, outputs: Tensor, targets: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.each.logits(outputs.reshape(-1)), targets.reshape(-1), self.each.logits(teacher.reshape(-1))

    def lead(self, teacher: Tensor) -> float:
        return self.each.lead(teacher)


_METRICS = ("exact_match", "label_accuracy", "f1", "auroc", "average_precision")
