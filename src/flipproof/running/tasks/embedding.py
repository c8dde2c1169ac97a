"""A vector a sample, by which samples are compared and found."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flipproof.errors import ConfigError, DataError, FlipproofWarning, MetricError
from flipproof.running.data import Batches, Output, class_targets
from flipproof.running.judge import Judge, holds_nan
from flipproof.running.scales import Scale, scale_of
from flipproof.running.tasks.base import Task, unlabelled

_PART = 1024
"""Rows that are compared with all others at a time."""


@dataclass(frozen=True)
class Embedding(Task):
    """The model gives a vector a sample, (N, D); targets are what the sample shows, as a number (N,), or nothing.

    An answer is critical if its cosine with the vector without faults is below `cosine`. `recall_at_1` is the share of
    samples whose nearest other sample, by cosine among the vectors of the same run, has the same target; it takes a
    target for each sample, and two that are alike.

    Args:
        cosine: the least that is still the same vector, above −1, up to 1.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net, x = torch.nn.Linear(4, 8), torch.randn(50, 4)
        >>> result = fp.assess(net, [(x, None)], faults=fp.BitErrorRate(1e-2), trials=5, task=fp.Embedding())
        >>> result.golden
        {'unchanged': 1.0, 'cosine': 1.0}
    """

    cosine: float = 0.99

    name: ClassVar[str] = "embedding"

    def __post_init__(self) -> None:
        if not isinstance(self.cosine, (int, float)) or not -1 < self.cosine <= 1:
            raise ConfigError(f"Embedding: cosine= takes a number above −1, up to 1, got {self.cosine!r}")

    def read_targets(self, given: Any, inputs: Any, batch: int) -> Tensor:
        if given is None:
            return torch.full_like(unlabelled(given, inputs, batch), -1)
        return class_targets(given, batch)

    def judge(self, model: nn.Module, batches: Batches, output: Output, golden: Tensor) -> Judge:
        if golden.dim() != 2:
            raise DataError(
                f"embeddings must have the shape (samples, numbers), got {tuple(golden.shape)}; pass output= a "
                f"function that picks or pools them"
            )
        empty = (golden.double().norm(dim=1) == 0).nonzero()
        if len(empty):
            raise DataError(f"sample {int(empty[0, 0])} has an embedding of zeros, which has no direction")
        labels = batches.targets
        known = labels[labels >= 0]
        several = len(known) == len(labels) > 1 and len(torch.unique(labels)) < len(labels)
        if len(known) and not several:
            why = "no two samples show the same" if len(known) == len(labels) else "some samples have no target"
            warnings.warn(f"recall_at_1 is left out: {why}", FlipproofWarning, stacklevel=6)
        return VectorJudge(float(self.cosine), several)


@dataclass(frozen=True)
class VectorJudge(Judge):
    """How vectors are compared.

    Attributes:
        cosine: the least that is still the same vector.
        labelled: whether targets say what samples show, so that finding them again can be judged.
    """

    cosine: float
    labelled: bool

    task: ClassVar[str] = Embedding.name
    main: ClassVar[str] = "unchanged"  # type: ignore[misc]

    @property
    def usual(self) -> tuple[str, ...]:  # type: ignore[override]
        """Retrieval where there are labels."""
        return ("unchanged", "cosine", "recall_at_1") if self.labelled else ("unchanged", "cosine")

    def describe(self) -> str:
        return f"vectors, critical if their cosine with the fault-free one is below {self.cosine:g}"

    def cosines(self, golden: Tensor, outputs: Tensor) -> Tensor:
        """With the vectors without faults, float64 (N,); −1 for what has no direction."""
        one, other = _directions(golden), _directions(outputs)
        return torch.where(torch.isnan(other).any(dim=1), -1.0, (one * other).sum(dim=1).clamp(-1, 1))

    def critical(self, golden: Tensor, faulty: Tensor, targets: Tensor) -> Tensor:
        same = (golden == faulty).all(dim=1)  # whose cosine is 1, but for rounding
        return ~(same | (self.cosines(golden, faulty) >= self.cosine)) | holds_nan(faulty)

    def correct(self, outputs: Tensor, targets: Tensor, golden: Tensor) -> Tensor:
        return ~self.critical(golden, outputs, targets)

    def scale(self, name: str) -> Scale:
        return scale_of(self.known(name, self.usual))

    def measure(self, name: str, outputs: Tensor, targets: Tensor, golden: Tensor) -> float:
        match self.known(name, self.usual):
            case "unchanged":
                return float(self.correct(outputs, targets, golden).double().mean())
            case "cosine":
                same = (golden == outputs).all(dim=1)
                return float(torch.where(same, 1.0, self.cosines(golden, outputs)).mean())
        return self._recall(outputs, targets)

    def _recall(self, outputs: Tensor, targets: Tensor) -> float:
        if len(outputs) < 2:
            raise MetricError("recall_at_1 is undefined for a single sample")
        directions = _directions(outputs)
        nan = torch.isnan(directions).any(dim=1)
        directions = torch.nan_to_num(directions)
        right = 0
        for start in range(0, len(outputs), _PART):
            part = torch.arange(start, min(start + _PART, len(outputs)))
            near = directions[part] @ directions.T
            near[:, nan] = -torch.inf  # what has no direction is found by nobody
            near[torch.arange(len(part)), part] = -torch.inf
            best = near.argmax(dim=1)
            right += int(((targets[best] == targets[part]) & ~nan[part] & ~nan[best]).sum())
        return right / len(outputs)

    def disturbed(self, outputs: Tensor, teacher: Tensor, targets: Tensor, lead: float) -> Tensor:
        """Vectors that turned by more than half of what they may."""
        return VectorJudge((1 + self.cosine) / 2, False).critical(teacher, outputs, targets)

    def drift(self, outputs: Tensor, teacher: Tensor, targets: Tensor) -> float:
        """1 − cosine, mean over samples."""
        return float((1 - self.cosines(teacher, outputs)).mean())


def _directions(vectors: Tensor) -> Tensor:
    """Rows of length 1, float64; NaN where there is no direction: zeros, infinities, NaN."""
    wide = vectors.double()
    return torch.where(torch.isfinite(wide).all(dim=1, keepdim=True), F.normalize(wide, dim=1, eps=0.0), torch.nan)
