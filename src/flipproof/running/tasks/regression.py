"""A number a sample, or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flipproof.errors import ConfigError, DataError, MetricError
from flipproof.running.data import Batches, Output, tensor_of
from flipproof.running.judge import Judge
from flipproof.running.scales import Scale, scale_of
from flipproof.running.tasks.base import Task


@dataclass(frozen=True)
class Regression(Task):
    """The model gives a number a sample, or D of them: (N,) or (N, D), and so are the targets.

    An answer is critical if any of its numbers moves by more than its tolerance, and right if all lie within it of the
    target.

    Args:
        tolerance: what does no harm, in the user's unit: one number, or D.
        unit: of the numbers, as it is written behind them ("m", "°C").

    Raises:
        ConfigError: on a tolerance that is no positive number, or a unit that is no text.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net, x = torch.nn.Linear(4, 1), torch.randn(50, 4)
        >>> result = fp.assess(net, [(x, net(x).detach())], faults=fp.BitErrorRate(1e-2), trials=5,
        ...                    task=fp.Regression(tolerance=0.1, unit="m"))
        >>> result.golden
        {'within_tolerance': 1.0, 'mean_absolute_error': 0.0}
        >>> result.scale("mean_absolute_error").unit
        'm'
    """

    tolerance: float | tuple[float, ...]
    unit: str = ""

    name: ClassVar[str] = "regression"

    def __post_init__(self) -> None:
        given: Any = self.tolerance
        several = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        right = [type(one) in (int, float) and isfinite(one) and one > 0 for one in several]
        if not several or not all(right):
            raise ConfigError(f"Regression: tolerance= takes a number above 0, or one for each output, got {given!r}")
        if not isinstance(self.unit, str):
            raise ConfigError(f"Regression: unit= takes text such as 'm', got {self.unit!r}")
        if isinstance(given, list):
            object.__setattr__(self, "tolerance", tuple(given))

    def read_targets(self, given: Any, inputs: Any, batch: int) -> Tensor:
        target = tensor_of(given, batch, "numbers, of shape (samples,) or (samples, outputs)")
        if target.dim() not in (1, 2) or target.is_complex() or not bool(torch.isfinite(target).all()):
            raise DataError(
                f"batch {batch}: targets must be finite numbers, of shape (samples,) or (samples, outputs), got "
                f"{target.dtype} of shape {tuple(target.shape)}"
            )
        return target.to(torch.float64).reshape(len(target), -1)

    def judge(self, model: nn.Module, batches: Batches, output: Output, golden: Tensor) -> Judge:
        width = golden.reshape(len(golden), -1).shape[1]
        if golden.dim() > 2 or width != batches.targets.shape[1]:
            raise DataError(
                f"the model answers {tuple(golden.shape)}, and the targets have {batches.targets.shape[1]} numbers a "
                f"sample: both need the shape (samples,) or (samples, outputs); pass output= a function that picks them"
            )
        several = self.tolerance if isinstance(self.tolerance, tuple) else (self.tolerance,) * width
        if len(several) != width:
            raise ConfigError(f"Regression: {len(several)} tolerances for {width} outputs: give one, or one for each")
        return NumberJudge(tuple(map(float, several)), self.unit)


@dataclass(frozen=True)
class NumberJudge(Judge):
    """What may happen to numbers.

    Attributes:
        tolerance: of each.
        unit: of all.
    """

    tolerance: tuple[float, ...]
    unit: str = field(default="")

    task: ClassVar[str] = Regression.name
    main: ClassVar[str] = "within_tolerance"  # type: ignore[misc]
    usual: ClassVar[tuple[str, ...]] = ("within_tolerance", "mean_absolute_error")  # type: ignore[misc]

    def describe(self) -> str:
        several = sorted(set(self.tolerance))
        said = f"{several[0]:g}" if len(several) == 1 else ", ".join(f"{one:g}" for one in self.tolerance)
        return f"numbers, critical if one moves by more than {said}{f' {self.unit}' if self.unit else ''}"

    def _near(self, one: Tensor, other: Tensor) -> Tensor:
        moved = (one.double().reshape(len(one), -1) - other.double().reshape(len(other), -1)).abs()
        return (moved <= torch.tensor(self.tolerance, dtype=torch.float64)).all(dim=1)

    def critical(self, golden: Tensor, faulty: Tensor, targets: Tensor) -> Tensor:
        return ~self._near(golden, faulty)

    def correct(self, outputs: Tensor, targets: Tensor, golden: Tensor) -> Tensor:
        return self._near(outputs, targets)

    def scale(self, name: str) -> Scale:
        found = scale_of(self.known(name, _METRICS))
        return replace(found, unit=self.unit) if name.endswith("_error") else found

    def measure(self, name: str, outputs: Tensor, targets: Tensor, golden: Tensor) -> float:
        """A metric; a NaN answer makes errors infinite, since how far it is off nobody knows."""
        error = outputs.double().reshape(targets.shape) - targets
        error = torch.where(torch.isnan(error), torch.inf, error)
        match self.known(name, _METRICS):
            case "within_tolerance":
                return int(self.correct(outputs, targets, golden).sum()) / len(targets)
            case "mean_absolute_error":
                return float(error.abs().mean())
            case "root_mean_square_error":
                return float(error.square().mean().sqrt())
        spread = (targets - targets.mean(dim=0)).square().sum(dim=0)
        if not bool((spread > 0).all()):
            raise MetricError("r2 is undefined: the targets of an output are all alike")
        return float((1 - error.square().sum(dim=0) / spread).mean())

    def lead(self, teacher: Tensor) -> float:
        """What is tolerated: of several, the least."""
        return min(self.tolerance)


_METRICS = ("within_tolerance", "mean_absolute_error", "root_mean_square_error", "r2")
