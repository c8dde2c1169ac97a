"""Metrics of one run over all samples: those of a task by their names, or the user's own.

A sample whose output holds a NaN never counts as a correct answer and never leaves the denominator: accuracy counts
it as wrong, ranking metrics rank it worst (a positive below, a negative above everything else).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from math import inf

from torch import Tensor

from flipproof.errors import MetricError
from flipproof.running.judge import Judge
from flipproof.running.scales import METRICS, Scale, scale_of

UserMetric = Callable[[Tensor, Tensor], float | Tensor]
"""``metric(outputs, targets)`` over all samples at once; copies of the outputs as the model gave them, NaN included."""


class Metric:
    """A number of one run over all samples, and what it means: its unit, its range, and which way is better.

    A bare function in `metrics=` has no unit and no range, and nobody knows which way is better: its numbers are
    printed as they are, its interval is not cut, and a change of it is neither called gain nor loss. This says more.

    Args:
        function: `(outputs, targets)` → number over all samples at once, a torchmetrics object, or a built-in name.
        name: the column it gets; the function's own name by default.
        unit: "%" if it is a fraction to be shown times 100, else what is written behind a number ("m", "" for none).
        range: lowest and highest possible value; either may be None.
        higher_is_better: which way is better.

    Raises:
        MetricError: on a name that is taken or no identifier, or a range that is none.

    Example:
        >>> import flipproof as fp, torch
        >>> def distance(outputs, targets):
        ...     return (outputs.argmax(dim=1) - targets).abs().float().mean()
        >>> metric = fp.Metric(distance, unit="classes", range=(0, None), higher_is_better=False)
        >>> net, data = torch.nn.Linear(2, 2), [(torch.eye(2), torch.tensor([0, 1]))]
        >>> result = fp.assess(net, data=data, faults=fp.RandomBits(1), trials=3, metrics=[metric, "accuracy"])
        >>> result.metrics, result.scale("distance").unit
        (['distance', 'accuracy'], 'classes')
    """

    def __init__(
        self,
        function: str | UserMetric,
        *,
        name: str | None = None,
        unit: str = "",
        range: tuple[float | None, float | None] | None = None,
        higher_is_better: bool | None = True,
    ) -> None:
        self.function = function
        if isinstance(function, str):
            if function not in METRICS:
                raise MetricError(
                    f"unknown metric {function!r}: choose among {', '.join(METRICS)} (each task has some of them), or "
                    f"pass a function (outputs, targets), on the command line MODULE:FUNCTION"
                )
            self.scale = scale_of(function)
            if unit not in ("", "%") or range not in (None, (0, 1)) or higher_is_better is not True:
                raise MetricError(f"what {function} means is known; give only a name= with it")
            self.name = function if name is None else _column(name)
            return
        if not callable(function):
            raise MetricError(f"a metric is a name or a function (outputs, targets) → number, got {function!r}")
        own = getattr(function, "__name__", None) or _snake(type(function).__name__)
        self.name = _column(own if name is None else name)
        self.scale = Scale(str(unit), _limits(self.name, range), higher_is_better)

    def measure(self, outputs: Tensor, targets: Tensor, judge: Judge, golden: Tensor) -> float:
        """The value of one run.

        Args:
            outputs: answers, one row a sample.
            targets: of these samples.
            judge: of the task.
            golden: answers without faults.
        """
        if isinstance(self.function, str):
            return judge.measure(self.function, outputs, targets, golden)
        library = sys.modules.get("torchmetrics")
        if library is not None and isinstance(self.function, library.Metric):
            self.function.reset()
        value = self.function(judge.shown(outputs, targets).clone(), targets.clone())  # what it writes to is its own
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise MetricError(f"the metric {self.name} gives {value!r}, expected one number ({error})") from error

    def __repr__(self) -> str:
        scale = self.scale
        return f"Metric({self.name!r}, unit={scale.unit!r}, range={scale.range}, better={scale.higher_is_better})"


Metrics = str | UserMetric | Metric | Sequence[str | UserMetric | Metric] | Mapping[str, UserMetric | Metric]


def resolve(metrics: Metrics | None) -> tuple[Metric, ...]:
    """Named metrics, callables and torchmetrics objects as `Metric`s; none for None, which asks for the task's own.

    Raises:
        MetricError: on unknown, nameless or repeated names.

    Example:
        >>> import torchmetrics
        >>> [m.name for m in resolve(("accuracy", torchmetrics.classification.MulticlassF1Score(num_classes=3)))]
        ['accuracy', 'multiclass_f1_score']
    """
    if metrics is None:
        return ()
    if isinstance(metrics, Mapping):
        found = [_named(metric, name) for name, metric in metrics.items()]
    else:
        if not isinstance(metrics, (str, Metric, Iterable)) and not callable(metrics):
            raise MetricError(f"metrics= takes names, functions (outputs, targets) or fp.Metric, got {metrics!r}")
        several = [metrics] if isinstance(metrics, (str, Metric)) or callable(metrics) else list(metrics)
        found = [metric if isinstance(metric, Metric) else _bare(metric) for metric in several]
    names = [metric.name for metric in found]
    if not names or len(set(names)) != len(names):
        raise MetricError(f"metrics= needs at least one metric and no name twice, got {names}")
    taken = {f"{name}{end}" for name in (*names, *_RESERVED) for end in _ENDS}
    if both := sorted(taken.intersection(names)):
        raise MetricError(
            f"{both[0]!r} is the name of a column that tables make of another one; call the metric otherwise"
        )
    return tuple(found)


def judged_by(metrics: tuple[Metric, ...], judge: Judge) -> tuple[Metric, ...]:
    """The metrics as a task understands them: its own where none are given, in its units.

    Raises:
        MetricError: if a name is none of this task's, or one of the user's own is.
    """
    found = []
    for metric in metrics or tuple(Metric(name) for name in judge.usual):
        if isinstance(metric.function, str):
            metric = copy(metric)
            metric.scale = judge.scale(str(metric.function))
        elif judge.has(metric.name):
            raise MetricError(
                f"{metric.name!r} is a metric of the task {judge.task!r}; call yours otherwise: "
                f"metrics={{'my_{metric.name}': function}}"
            )
        found.append(metric)
    return tuple(found)


def _bare(metric: str | UserMetric, name: str | None = None) -> Metric:
    """A name, or a function of which nothing is known; torchmetrics objects know which way is better."""
    if isinstance(metric, str):
        return Metric(metric, name=name)
    better = getattr(metric, "higher_is_better", None)
    return Metric(metric, name=name, higher_is_better=better if isinstance(better, bool) else None)


def _named(metric: UserMetric | Metric, name: str) -> Metric:
    if not isinstance(metric, Metric):
        if isinstance(metric, str):
            raise MetricError(
                f"a metric is a name or a function (outputs, targets) → number, got {metric!r} for {name!r}"
            )
        return _bare(metric, name)
    found = copy(metric)
    found.name = _column(name)
    return found


_RESERVED = {
    "point", "trial", "ber", "bit", "count", "stuck_at", "faults", "flips", "samples", "seconds", "trials", "error",
    "masked", "non_critical_sdc", "critical_sdc", "due", "critical_total", "digest", "audited",
    "corrected", "detected", "miscorrected", "coverage", "campaign", "layer", "memory", "gain_trials", "fault_free",
    "draws",
}  # fmt: skip

_ENDS = tuple(
    f"_{part}{end}" if part else end
    for part in ("", "drop", "gain")
    for end in ("", "_low", "_high", "_samples_low", "_samples_high", "_both_low", "_both_high", "_tail")
    if part or end
)
"""How the columns end that tables have beside each metric and outcome."""


def _column(name: str) -> str:
    if not name.isidentifier() or name in _RESERVED or name in ("accuracy", "auroc", "average_precision"):
        raise MetricError(
            f"a metric needs a column name of its own, got {name!r}; pass metrics={{'my_name': function}}"
        )
    return name


def _limits(name: str, limits: tuple[float | None, float | None] | None) -> tuple[float, float]:
    if limits is None:
        return (-inf, inf)
    try:
        low, high = limits
        found = (-inf if low is None else float(low), inf if high is None else float(high))
    except (TypeError, ValueError):
        raise MetricError(f"{name}: range= takes (lowest, highest), either may be None, got {limits!r}") from None
    if not found[0] < found[1]:
        raise MetricError(f"{name}: range= takes (lowest, highest), either may be None, got {limits!r}")
    return found


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
