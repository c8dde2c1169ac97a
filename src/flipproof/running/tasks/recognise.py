"""What a network is for, where targets and answers leave no doubt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flipproof.errors import DataError
from flipproof.running.data import Batches, Data, Output, call, class_targets, read_batches, take
from flipproof.running.snapshots import Snapshot
from flipproof.running.tasks.base import Task
from flipproof.running.tasks.classification import Classification
from flipproof.running.tasks.detection import Detection
from flipproof.running.tasks.multi_label import MultiLabel
from flipproof.running.tasks.segmentation import Segmentation
from flipproof.running.tasks.tokens import Tokens


def read(
    model: nn.Module, data: Data, device: torch.device, task: Task | None, output: Output
) -> tuple[Batches, Task, Output]:
    """Read the data as a task has it, which is recognised where nobody said which.

    Args:
        model: fault-free, in eval mode; it is run only if the targets alone do not say what they are for.
        data: batches `(inputs, targets)`.
        device: where the model is.
        task: what the model is for; None to recognise it.
        output: picks what is judged out of what the model returns.

    Returns:
        The batches, the task, and what makes one row a sample of what the model returns.

    Raises:
        DataError: on data that are not what this task takes, or of which no task can be told.
    """
    if task is None:
        seen = Recognising(model, output)
        batches = read_batches(data, device, seen.read_targets, seen.join)
        task = seen.task
    else:
        batches = read_batches(data, device, task.read_targets, task.join)
    return batches, task, task.reading(output, batches)


class Recognising:
    """Reads targets and tells by the first batch what they are for.

    Class numbers, one a sample, are of a classification: that is the case with nothing more to see. Mappings with boxes
    and labels are of a detection. For whole numbers in more dimensions, the model is run on the batch: (N, T) beside
    scores (N, T, V) are tokens, (N, H, W) beside (N, C, H, W) a segmentation, 0 and 1 of which several or none are set
    beside scores of the same shape are labels. Anything else is refused, with what to say.

    Args:
        model: fault-free, in eval mode.
        output: picks what is judged out of what it returns.
    """

    def __init__(self, model: nn.Module, output: Output) -> None:
        self._model, self._output = model, output
        self._task: Task | None = None

    @property
    def task(self) -> Task:
        """What was recognised."""
        return Classification() if self._task is None else self._task

    def read_targets(self, given: Any, inputs: Any, batch: int) -> Tensor:
        """As `Task.read_targets`."""
        if self._task is None:
            self._task = self._recognised(given, inputs, batch)
        return self._task.read_targets(given, inputs, batch)

    def join(self, parts: list[Tensor]) -> Tensor:
        """As `Task.join`."""
        return self.task.join(parts)

    def _recognised(self, given: Any, inputs: Any, batch: int) -> Task:
        several = isinstance(given, (list, tuple)) and given
        if several and all(isinstance(one, Mapping) and "boxes" in one and "labels" in one for one in given):
            return Detection()
        try:
            target = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError):
            target = None
        if target is None or target.numel() == 0 or target.dim() < 2 or (target.dim() == 2 and target.shape[1] == 1):
            return self._classes(given, batch, target)
        if target.is_floating_point() and not bool((target == target.round()).all()):
            raise DataError(
                f"batch {batch}: targets are numbers with a fraction, of shape {tuple(target.shape)}: say what "
                f"deviation does no harm, task=fp.Regression(tolerance=…)"
            )
        answers = self._answers(inputs)
        if answers is not None and not target.is_complex():
            shape, whole = tuple(target.shape), tuple(answers.shape)
            labels = target.dim() == 2 and whole == shape and bool(((target == 0) | (target == 1)).all())
            if labels and not bool((target.sum(dim=1) == 1).all()):
                return MultiLabel()
            if len(shape) == 2 and len(whole) == 3 and whole[:2] == shape:
                return Tokens()
            if len(shape) == 3 and len(whole) == 4 and (whole[0], *whole[2:]) == shape:
                return Segmentation()
        return self._classes(given, batch, target)

    def _classes(self, given: Any, batch: int, target: Tensor | None) -> Task:
        """Class numbers, or the reason why they are none."""
        try:
            class_targets(given, batch)
        except DataError as error:
            if target is not None and target.dim() < 2 and target.is_floating_point():
                raise DataError(f"{error}. Numbers to be met: task=fp.Regression(tolerance=…)") from None
            raise DataError(
                f"{error}. If they are something else, say so: task=fp.Tokens(), fp.Segmentation(), …"
            ) from None
        return Classification()

    def _answers(self, inputs: Any) -> Tensor | None:
        """What the model gives for a batch, if that is one tensor; what it wrote is put back."""
        state = Snapshot(self._model)
        try:
            found = take(call(self._model, inputs), self._output)
        except Exception:  # the golden run will say what is wrong with this batch
            return None
        finally:
            state.restore()
        return found if isinstance(found, Tensor) else None
