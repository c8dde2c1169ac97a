"""One class a sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from flipproof.errors import ConfigError, DataError
from flipproof.running.data import Batches, Output, class_targets
from flipproof.running.decision import Decision, DecisionChoice, check_choice, decide
from flipproof.running.tasks.base import Task, check_task


@dataclass(frozen=True)
class Classification(Task):
    """The model gives one score a class, or a single score, for each sample; targets are class numbers, (N,).

    An answer is critical if the class that won without faults is not among the `top` best any more (Parchekani et al.
    2024, III-A, with top = 1), or, with `confidence_drop`, if its probability fell by more than that.

    Args:
        top: how many of the best classes count, also for accuracy.
        decision: how outputs become classes: "logits", "probabilities", "argmax", or a number, the threshold of a
            single output; None recognises it.
        confidence_drop: by how much the probability of the class may fall, between 0 and 1; None tolerates any fall.

    Raises:
        ConfigError: on values that make no sense.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net, x = torch.nn.Linear(4, 10), torch.randn(50, 4)
        >>> result = fp.assess(net, [(x, net(x).argmax(dim=1))], faults=fp.BitErrorRate(1e-2), trials=5,
        ...                    task=fp.Classification(top=5))
        >>> result.golden
        {'accuracy': 1.0}
    """

    top: int = 1
    decision: DecisionChoice = None
    confidence_drop: float | None = None

    name: ClassVar[str] = "classification"

    def __post_init__(self) -> None:
        if isinstance(self.top, bool) or not isinstance(self.top, int) or self.top < 1:
            raise ConfigError(f"Classification: top= takes a whole number from 1, got {self.top!r}")
        object.__setattr__(self, "decision", check_choice(self.decision))
        drop = self.confidence_drop
        if drop is not None and (not isinstance(drop, (int, float)) or isinstance(drop, bool) or not 0 < drop <= 1):
            raise ConfigError(f"Classification: confidence_drop= takes a number above 0, up to 1, got {drop!r}")
        if drop is not None and self.decision == "argmax":
            raise ConfigError(
                f"Classification: decision='argmax' says that the model gives class numbers, which have no probability "
                f"that could fall by confidence_drop={drop!r}; leave one of the two out"
            )

    def read_targets(self, given: Any, inputs: Any, batch: int) -> Tensor:
        return class_targets(given, batch)

    def judge(self, model: nn.Module, batches: Batches, output: Output, golden: Tensor) -> Decision:
        found = decide(model, batches, output, golden, self.decision)
        if self.top > 1 and (found.threshold is not None or self.top >= found.classes):
            raise DataError(
                f"Classification(top={self.top}) needs at least {self.top + 1} classes; this model tells "
                f"{found.classes} apart{' by a single output' if found.threshold is not None else ''}"
            )
        return replace(found, top=self.top, confidence_drop=self.confidence_drop)


def task_of(task: Task | None, decision: DecisionChoice) -> Task | None:
    """What `task=` and `decision=` say together; None if neither says anything.

    Raises:
        ConfigError: if both say something, or `task=` is no task.
    """
    check_task(task)
    if check_choice(decision) is None:
        return task
    if task is not None:
        raise ConfigError(
            f"decision= says how outputs become classes, and task= was given too: say {type(task).__name__}"
            f"(…, decision={decision!r}) if that task has classes, and leave decision= out"
        )
    return Classification(decision=decision)
