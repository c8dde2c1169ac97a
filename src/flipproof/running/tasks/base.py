"""What a network is for: how a batch is read, what is an answer, and what is wrong with one.

A new task is one file: a subclass of `Task`, and the `Judge` that it makes of the golden answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flipproof.errors import ConfigError, DataError
from flipproof.running.data import Batches, Output, describe, take
from flipproof.running.judge import Judge


class Task(ABC):
    """A task; subclasses are frozen dataclasses whose `repr` rebuilds them.

    Attributes:
        name: what people call it.
    """

    name: ClassVar[str]

    @abstractmethod
    def read_targets(self, given: Any, inputs: Any, batch: int) -> Tensor:
        """The targets of a batch, one row a sample, on the CPU.

        Args:
            given: as the data has them.
            inputs: of the batch.
            batch: its number, for errors.

        Raises:
            DataError: saying what they have to be.
        """

    @abstractmethod
    def judge(self, model: nn.Module, batches: Batches, output: Output, golden: Tensor) -> Judge:
        """How answers of this model are judged.

        Args:
            model: fault-free, in eval mode.
            batches: what it was run on.
            output: makes one row a sample of what the model returns (`reading`).
            golden: fault-free answers of all samples, on the CPU.

        Raises:
            DataError: if answers have no shape that can be judged, or do not fit the targets.
        """

    def join(self, parts: list[Tensor]) -> Tensor:
        """The targets of all batches.

        Raises:
            DataError: if rows of different batches differ in shape.
        """
        shapes = {tuple(part.shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise DataError(
                f"targets a sample have the shapes {', '.join(map(str, sorted(shapes)))} in different batches; the "
                f"task {self.name!r} needs one shape: resize or pad them alike"
            )
        return torch.cat(parts)

    def reading(self, output: Output, batches: Batches) -> Output:
        """What makes one row a sample of what the model returns: here the tensor that `output` picks, as it is.

        Args:
            output: the user's `output=`.
            batches: with their targets.
        """
        return output


@dataclass(frozen=True)
class Rows(ABC):
    """Makes one row a sample of what a model returns, where that is no tensor to judge as it is.

    Attributes:
        output: the user's `output=`: picks it out of what the model returns.
    """

    output: Output

    def __call__(self, raw: Any) -> Tensor:
        return self.rows(take(raw, self.output))

    @abstractmethod
    def rows(self, picked: Any) -> Tensor:
        """One row a sample, floating-point; NaN where the sample's answer holds one.

        Raises:
            DataError: if it is nothing that this task takes.
        """


def unlabelled(given: Any, inputs: Any, batch: int) -> Tensor:
    """Targets that say nothing, one 0 a sample: for data without any.

    Raises:
        DataError: if nothing says how many samples there are.
    """
    if isinstance(given, Tensor) and given.dim():
        return torch.zeros(len(given), dtype=torch.int64)
    if isinstance(given, (list, tuple)):
        return torch.zeros(len(given), dtype=torch.int64)
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return torch.zeros(len(leaf), dtype=torch.int64)
    raise DataError(
        f"batch {batch}: nothing says how many samples it has: targets are {describe(given)}, and no input is a tensor "
        f"with one row a sample"
    )


def padded(parts: list[Tensor], filling: float) -> Tensor:
    """Rows (N, L, …) of different lengths L put together, the shorter ones filled up."""
    longest = max(part.shape[1] for part in parts)
    made = []
    for part in parts:
        more = part.new_full((len(part), longest - part.shape[1], *part.shape[2:]), filling)
        made.append(torch.cat([part, more], dim=1))
    return torch.cat(made)


def check_task(task: object) -> None:
    """Refuse what is no task.

    Raises:
        ConfigError: saying what `task=` takes.
    """
    if isinstance(task, type) and issubclass(task, Task):
        raise ConfigError(f"task= takes an instance: {task.__name__}(…), not the class {task.__name__}")
    if task is not None and not isinstance(task, Task):
        raise ConfigError(
            f"task= takes what the model is for, such as fp.Classification(), fp.Tokens() or fp.Custom(wrong=…), or "
            f"None to recognise it, got {task!r}"
        )
