"""What a fault did to each sample: masked, non-critical SDC, critical SDC or DUE (PAPERS: lstm-clipping, III-A)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import torch
from torch import Tensor

from flipproof.errors import DataError
from flipproof.formats.base import word_dtype


class Outcome(StrEnum):
    """The four classes; every sample of every trial is in exactly one."""

    MASKED = "masked"
    """The output is identical to the golden run's, bit by bit."""
    NON_CRITICAL_SDC = "non_critical_sdc"
    """The output differs (even by the sign of a zero) but names the same class."""
    CRITICAL_SDC = "critical_sdc"
    """The output names another class."""
    DUE = "due"
    """Detected unrecoverable error: the output holds a NaN, or the faulty model raised."""


OUTCOMES = tuple(outcome.value for outcome in Outcome)


@dataclass(frozen=True)
class Decision:
    """How this model's outputs become classes and scores, read once off its golden outputs.

    Attributes:
        outputs: whether they are "logits" or "probabilities" (all in [0, 1], and rows of several classes sum to 1).
        classes: number of classes; 2 for a single output.
        threshold: for a single output, class 1 is `output > threshold`: 0.5 for probabilities, 0 for logits. None for
            several outputs, where the largest wins (the first of equals).

    Example:
        >>> Decision.from_golden(torch.tensor([[2.0, -1.0], [0.5, 3.0]]))
        Decision(outputs='logits', classes=2, threshold=None)
        >>> Decision.from_golden(torch.tensor([0.2, 0.9])).classes_of(torch.tensor([0.6, float("nan")]))
        tensor([ 1, -1])
    """

    outputs: Literal["logits", "probabilities"]
    classes: int
    threshold: float | None

    @classmethod
    def from_golden(cls, golden: Tensor) -> Decision:
        """Read the convention off fault-free outputs of shape (N,), (N, 1) or (N, C).

        Raises:
            DataError: for any other shape.
        """
        if golden.dim() not in (1, 2) or golden.shape[-1] == 0:
            raise DataError(
                f"outputs must have the shape (samples,), (samples, 1) or (samples, classes), got "
                f"{tuple(golden.shape)}; pass output= a function that picks or reshapes them"
            )
        inside = bool(((golden >= 0) & (golden <= 1)).all())
        if golden.dim() == 1 or golden.shape[1] == 1:
            return cls("probabilities", 2, 0.5) if inside else cls("logits", 2, 0.0)
        # half-precision softmax sums to 1 within about 1e-2; logits that pass this test in every row are a fluke
        total = golden.to(torch.float64).sum(dim=1)
        probabilities = inside and bool(((total - 1).abs() < 2e-2).all())
        return cls("probabilities" if probabilities else "logits", golden.shape[1], None)

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


def holds_nan(outputs: Tensor) -> Tensor:
    """Which samples have a NaN anywhere in their output, bool (N,)."""
    return torch.isnan(outputs).reshape(outputs.shape[0], -1).any(dim=1)


def classify(golden: Tensor, faulty: Tensor, decision: Decision) -> Tensor:
    """The outcome of each sample as an index into `OUTCOMES`, int64 (N,).

    Example:
        >>> golden = torch.tensor([[1.0, 0.0]] * 4)
        >>> faulty = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 2.0], [1.0, float("nan")]])
        >>> [OUTCOMES[i] for i in classify(golden, faulty, Decision.from_golden(golden * 2))]
        ['masked', 'non_critical_sdc', 'critical_sdc', 'due']
    """
    same = (bit_pattern(golden) == bit_pattern(faulty)).reshape(golden.shape[0], -1).all(dim=1)
    same_class = decision.classes_of(golden) == decision.classes_of(faulty)
    outcome = torch.where(same, 0, torch.where(same_class, 1, 2))
    return torch.where(holds_nan(faulty), 3, outcome)


def bit_pattern(values: Tensor) -> Tensor:
    """The bits of floating-point values as integers: −0.0 differs from 0.0, and a NaN equals itself."""
    width = values.element_size() * 8
    return values.contiguous().view(word_dtype(width))
