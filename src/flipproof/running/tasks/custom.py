"""Whatever else a network may be for: the user says when an answer is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flipproof.errors import ConfigError, DataError, MetricError
from flipproof.running.data import Batches, Output, describe
from flipproof.running.judge import Judge, holds_nan
from flipproof.running.scales import Scale, scale_of
from flipproof.running.tasks.base import Task, unlabelled

Wrong = Callable[[Tensor, Tensor], Tensor]
"""``wrong(golden, faulty)`` → bool (N,): which answers do harm."""

Right = Callable[[Tensor, Tensor], Tensor]
"""``right(outputs, targets)`` → bool (N,)."""


@dataclass(frozen=True)
class Custom(Task):
    """The model gives any tensor with one row a sample, and functions say what is wrong with it.

    Args:
        wrong: function (golden, faulty) → bool (N,): which faulty answers are critical. Answers are tensors on the
            CPU, as `output=` picks them. Rows that hold a NaN are DUE whatever it says.
        right: function (outputs, targets) → bool (N,): which answers are right; None judges by `wrong` alone, and
            targets may then be anything.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net, x = torch.nn.Linear(4, 2), torch.randn(50, 4)
        >>> def turned(golden, faulty):
        ...     return (golden * faulty).sum(dim=1) < 0
        >>> result = fp.assess(net, [(x, None)], faults=fp.BitErrorRate(1e-2), trials=5, task=fp.Custom(wrong=turned))
        >>> result.golden
        {'unchanged': 1.0}
    """

    wrong: Wrong
    right: Right | None = None

    name: ClassVar[str] = "custom"

    def __post_init__(self) -> None:
        for name in ("wrong", "right"):
            value = getattr(self, name)
            if not callable(value) and (name == "wrong" or value is not None):
                raise ConfigError(f"Custom: {name}= takes a function of two tensors, got {value!r}")

    def read_targets(self, given: Any, inputs: Any, batch: int) -> Tensor:
        if isinstance(given, Tensor) and given.dim():
            return given.detach().cpu()
        if self.right is None:
            return unlabelled(given, inputs, batch)
        try:
            target = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"batch {batch}: targets must be a tensor with one row a sample, got {describe(given)} ({error})"
            ) from error
        if not target.dim():
            raise DataError(f"batch {batch}: targets must have one row a sample, got a single number")
        return target

    def judge(self, model: nn.Module, batches: Batches, output: Output, golden: Tensor) -> Judge:
        found = UserJudge(self.wrong, self.right)
        if bool(found.critical(golden, golden.clone(), batches.targets).any()):
            raise ConfigError("Custom: wrong(golden, faulty) calls answers wrong that are the golden ones themselves")
        return found


@dataclass(frozen=True)
class UserJudge(Judge):
    """What the user's functions say."""

    wrong: Wrong
    right: Right | None

    task: ClassVar[str] = Custom.name

    @property
    def main(self) -> str:  # type: ignore[override]
        """Against targets if the user says what is right, else against the answers without faults."""
        return "unchanged" if self.right is None else "accuracy"

    @property
    def usual(self) -> tuple[str, ...]:  # type: ignore[override]
        """The main one."""
        return (self.main,)

    def describe(self) -> str:
        return f"answers, critical if {getattr(self.wrong, '__qualname__', type(self.wrong).__name__)}(golden, faulty)"

    def critical(self, golden: Tensor, faulty: Tensor, targets: Tensor) -> Tensor:
        return _verdicts(self.wrong, "wrong", golden, faulty) | holds_nan(faulty)

    def correct(self, outputs: Tensor, targets: Tensor, golden: Tensor) -> Tensor:
        if self.right is None:
            return ~self.critical(golden, outputs, targets)
        return _verdicts(self.right, "right", outputs, targets) & ~holds_nan(outputs)

    def scale(self, name: str) -> Scale:
        return scale_of(self.known(name, (self.main, "unchanged")))

    def measure(self, name: str, outputs: Tensor, targets: Tensor, golden: Tensor) -> float:
        if self.known(name, (self.main, "unchanged")) == self.main:
            return float(self.correct(outputs, targets, golden).double().mean())
        return float((~self.critical(golden, outputs, targets)).double().mean())


def _verdicts(function: Callable[[Tensor, Tensor], Tensor], name: str, one: Tensor, other: Tensor) -> Tensor:
    """What a function of the user's says of each row; it gets copies.

    Raises:
        MetricError: if it is not one truth value a row.
    """
    try:
        found: Any = function(one.clone(), other.clone())
    except Exception as error:  # the user's own code
        raise MetricError(f"Custom: {name}= raises {type(error).__name__}: {error}") from error
    if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape != (len(one),):
        raise MetricError(
            f"Custom: {name}= has to give one truth value a sample, torch.bool of shape ({len(one)},), and gives "
            f"{describe(found)}"
        )
    return found.cpu()
