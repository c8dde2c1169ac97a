"""Metrics of one run over all samples: accuracy, AUROC, average precision, or the user's own.

A sample whose output holds a NaN never counts as a correct answer and never leaves the denominator: accuracy counts
it as wrong, ranking metrics rank it worst (a positive below, a negative above everything else).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from flipproof.errors import MetricError
from flipproof.outcomes import Decision, holds_nan

UserMetric = Callable[[Tensor, Tensor], float | Tensor]
"""``metric(outputs, targets)`` over all samples at once; outputs as the model gave them, NaN included."""

Metrics = str | UserMetric | Sequence[str | UserMetric] | Mapping[str, UserMetric]


@dataclass(frozen=True)
class Metric:
    """A named number of one run.

    Attributes:
        name: the column it gets.
        measure: (outputs, targets, decision) → value.
        bounded: True if it cannot leave [0, 1], which intervals make use of.
        ranking: True for metrics whose distribution over trials is skewed; their intervals are bootstrapped.
    """

    name: str
    measure: Callable[[Tensor, Tensor, Decision], float]
    bounded: bool = False
    ranking: bool = False


def accuracy(outputs: Tensor, targets: Tensor, decision: Decision) -> float:
    """Share of samples whose class is the target; a NaN output is a wrong answer."""
    return int((decision.classes_of(outputs) == targets).sum()) / targets.numel()


def auroc(outputs: Tensor, targets: Tensor, decision: Decision) -> float:
    """Area under the ROC curve; for several classes the mean over one-vs-rest (macro).

    Scores are ranked before torchmetrics sees them: the area depends on order alone, and torchmetrics would send
    values outside [0, 1] through a float32 sigmoid that ties everything above 17.

    Raises:
        MetricError: if a class has no sample, or all of them.
    """
    return _one_vs_rest("auroc", binary_auroc, outputs, targets, decision)


def average_precision(outputs: Tensor, targets: Tensor, decision: Decision) -> float:
    """Area under the precision-recall curve as a step function; for several classes the macro mean.

    Raises:
        MetricError: if a class has no sample, or all of them.
    """
    return _one_vs_rest("average_precision", binary_average_precision, outputs, targets, decision)


def _one_vs_rest(name: str, area: Callable[..., Tensor], outputs: Tensor, targets: Tensor, decision: Decision) -> float:
    scores = decision.scores(outputs)
    nan = holds_nan(outputs)
    columns = [(1, scores)] if scores.dim() == 1 else list(enumerate(scores.unbind(dim=1)))
    areas = []
    for label, column in columns:
        positive = targets == label
        if not bool(positive.any()) or bool(positive.all()):
            raise MetricError(
                f"{name} is undefined: {int(positive.sum())} of {targets.numel()} targets are of class {label}. "
                f"Use data with every class of the model's {decision.classes}, or metrics=('accuracy',)"
            )
        ranks = 1 + torch.unique(torch.where(nan, 0.0, column), return_inverse=True)[1]
        ranks = torch.where(nan, torch.where(positive, 0, ranks.max() + 1), ranks)  # worst, even beyond infinite scores
        shares = ranks.to(torch.float64) / int(ranks.max())
        areas.append(float(area(shares, positive.to(torch.int64))))
    return sum(areas) / len(areas)


_NAMED = {
    "accuracy": Metric("accuracy", accuracy, bounded=True),
    "auroc": Metric("auroc", auroc, bounded=True, ranking=True),
    "average_precision": Metric("average_precision", average_precision, bounded=True, ranking=True),
}
METRIC_NAMES = tuple(_NAMED)


def resolve(metrics: Metrics) -> tuple[Metric, ...]:
    """Named metrics, callables and torchmetrics objects as `Metric`s.

    Raises:
        MetricError: on unknown, nameless or repeated names.

    Example:
        >>> [m.name for m in resolve(("accuracy", torchmetrics.classification.MulticlassF1Score(num_classes=3)))]
        ['accuracy', 'multiclass_f1_score']
    """
    if isinstance(metrics, Mapping):
        found = [_of_user(metric, name) for name, metric in metrics.items()]
    else:
        several = [metrics] if isinstance(metrics, str) or callable(metrics) else list(metrics)
        found = [_by_name(metric) if isinstance(metric, str) else _of_user(metric) for metric in several]
    names = [metric.name for metric in found]
    if not names or len(set(names)) != len(names):
        raise MetricError(f"metrics= needs at least one metric and no name twice, got {names}")
    return tuple(found)


def _by_name(name: str) -> Metric:
    if name not in _NAMED:
        raise MetricError(f"unknown metric {name!r}: choose among {list(_NAMED)} or pass a function (outputs, targets)")
    return _NAMED[name]


_RESERVED = {
    "point", "trial", "ber", "bit", "count", "stuck_at", "faults", "flips", "samples", "seconds", "trials", "error",
    "masked", "non_critical_sdc", "critical_sdc", "due", "critical_total", "digest",
}  # fmt: skip


def _of_user(metric: UserMetric, name: str | None = None) -> Metric:
    if not callable(metric):
        raise MetricError(f"a metric is a name or a function (outputs, targets) → number, got {metric!r}")
    if name is None:
        name = getattr(metric, "__name__", None) or _snake(type(metric).__name__)
    if not name.isidentifier() or name in _RESERVED or name in _NAMED:
        raise MetricError(
            f"a metric needs a column name of its own, got {name!r}; pass metrics={{'my_name': function}}"
        )

    def measure(outputs: Tensor, targets: Tensor, decision: Decision) -> float:
        if isinstance(metric, torchmetrics.Metric):
            metric.reset()
        value = metric(outputs, targets)
        return float(value)

    return Metric(name, measure)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
