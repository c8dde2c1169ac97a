"""Whole answers: sequences that a model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flipproof.errors import ConfigError, DataError, MetricError
from flipproof.running.data import Batches, Output, describe
from flipproof.running.judge import Judge, holds_nan
from flipproof.running.scales import Scale, scale_of
from flipproof.running.tasks.base import Rows, Task, padded, unlabelled

Scorer = Callable[[Any, Any], float]
"""``score(answer, reference)``, from 0 to 1: both as texts, or as lists of token numbers."""


@dataclass(frozen=True)
class Generation(Task):
    """The model's forward writes an answer to each sample: token numbers (N, L), or a list of texts.

    Decoding has to be greedy: what is random cannot be compared. Targets are references of the same kind (texts, or
    token numbers), or nothing.

    An answer is critical if it is another one than without faults; with a `scorer`, if its score falls by more than
    `tolerance`. It is right if it is the reference; with a scorer, if its score is 1.

    Args:
        scorer: function (answer, reference) → score from 0 to 1; None asks for an exact match.
        tolerance: by how much a score may fall.
        end: token number at which an answer ends; what follows it does not count.
        longest: characters or tokens of an answer that are kept, the same for all samples.

    Example:
        >>> import flipproof as fp, torch
        >>> class Count(torch.nn.Module):  # writes three numbers
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.step = torch.nn.Parameter(torch.ones(()))
        ...     def forward(self, x):
        ...         return (x[:, None] + self.step * torch.arange(1, 4)).round().long()
        >>> data = [(torch.tensor([1.0, 5.0]), [[2, 3, 4], [6, 7, 8]])]
        >>> result = fp.assess(Count(), data, faults=fp.RandomBits(1), trials=5, task=fp.Generation())
        >>> result.golden
        {'exact_match': 1.0}
    """

    scorer: Scorer | None = None
    tolerance: float = 0.0
    end: int | None = None
    longest: int = 512

    name: ClassVar[str] = "generation"

    def __post_init__(self) -> None:
        if self.scorer is not None and not callable(self.scorer):
            raise ConfigError(f"Generation: scorer= takes a function (answer, reference), got {self.scorer!r}")
        if not isinstance(self.tolerance, (int, float)) or not 0 <= self.tolerance <= 1:
            raise ConfigError(f"Generation: tolerance= takes a number from 0 to 1, got {self.tolerance!r}")
        if self.tolerance and self.scorer is None:
            raise ConfigError("Generation: tolerance= takes effect on a score only: give scorer= too")
        if self.end is not None and type(self.end) is not int:
            raise ConfigError(f"Generation: end= takes the number of a token, got {self.end!r}")
        if isinstance(self.longest, bool) or not isinstance(self.longest, int) or self.longest < 1:
            raise ConfigError(f"Generation: longest= takes a whole number from 1, got {self.longest!r}")

    def read_targets(self, given: Any, inputs: Any, batch: int) -> Tensor:
        if given is None:
            return torch.full((len(unlabelled(given, inputs, batch)), 3), -1.0, dtype=torch.float64)
        rows = _rows(given, self.longest, self.end, f"batch {batch}: targets")
        _check_length(rows, self.longest, f"batch {batch} has a reference")
        return rows

    def join(self, parts: list[Tensor]) -> Tensor:
        return padded(parts, -1.0)

    def reading(self, output: Output, batches: Batches) -> Output:
        return Answers(output, self.longest, self.end)

    def judge(self, model: nn.Module, batches: Batches, output: Output, golden: Tensor) -> Judge:
        _check_length(golden, self.longest, "the fault-free model writes an answer")
        missing = batches.targets[:, 0] < 0
        if bool(missing.any()) and (self.scorer is not None or not bool(missing.all())):
            raise DataError(
                f"sample {int(missing.nonzero()[0, 0])} has no reference, and others or the scorer need one: give "
                f"every sample a reference, or none and no scorer"
            )
        if not bool(missing.any()) and bool((other := batches.targets[:, 0] != golden[:, 0]).any()):
            kinds = ("token numbers", "a text")
            sample = int(other.nonzero()[0, 0])
            raise DataError(
                f"sample {sample}: the model writes {kinds[int(golden[sample, 0])]}, and its reference is "
                f"{kinds[int(batches.targets[sample, 0])]}: give references of the same kind"
            )
        return AnswerJudge(self.scorer, float(self.tolerance), not bool(missing.any()))


def _rows(given: Any, longest: int, end: int | None, what: str) -> Tensor:
    """Rows (N, 2 + L), float64: 1 for a text and 0 for token numbers, their number, the first L of them, −1 behind.

    Raises:
        DataError: if these are neither texts nor token numbers.
    """
    if isinstance(given, Tensor) and given.dim() == 2 and not given.is_floating_point():
        given = given.tolist()
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise DataError(f"{what} must be a list of texts or token numbers (samples, length), got {describe(given)}")
    rows = []
    for one in given:
        if isinstance(one, Tensor):
            one = one.tolist()
        if isinstance(one, str):
            kind, numbers = 1, [ord(letter) for letter in one]
        elif isinstance(one, (list, tuple)) and all(isinstance(n, int) for n in one):
            kind, numbers = 0, list(one)
            if end is not None and end in numbers:
                numbers = numbers[: numbers.index(end) + 1]
        else:
            raise DataError(f"{what} must be texts or token numbers, got {describe(one)}")
        kept = numbers[:longest]
        rows.append([kind, len(numbers), *kept, *[-1] * (longest - len(kept))])
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 2 + longest)


def _check_length(rows: Tensor, longest: int, what: str) -> None:
    """Refuse what is longer than is kept; under faults only, an answer may be: it is another one then.

    Raises:
        DataError: saying how long.
    """
    if len(rows) and float(rows[:, 1].max()) > longest:
        raise DataError(
            f"{what} of {int(rows[:, 1].max())} characters or tokens, and {longest} are kept: say Generation(longest=…)"
        )


@dataclass(frozen=True)
class Answers(Rows):
    """Rows (N, 1 + longest), see `_rows`."""

    longest: int
    end: int | None

    def rows(self, picked: Any) -> Tensor:
        """See `Rows`.

        Raises:
            DataError: if these are neither texts nor token numbers.
        """
        return _rows(picked, self.longest, self.end, "what the model writes")


@dataclass(frozen=True)
class AnswerJudge(Judge):
    """How answers are compared.

    Attributes:
        scorer: of an answer against its reference.
        tolerance: by how much a score may fall.
        referenced: whether every sample has a reference.
    """

    scorer: Scorer | None
    tolerance: float
    referenced: bool

    task: ClassVar[str] = Generation.name
    sample: ClassVar[str] = "answer"

    @property
    def main(self) -> str:  # type: ignore[override]
        """Against references if there are any, else against the answers without faults."""
        return "unchanged" if not self.referenced else "exact_match" if self.scorer is None else "score"

    @property
    def usual(self) -> tuple[str, ...]:  # type: ignore[override]
        """The main one."""
        return (self.main,)

    def describe(self) -> str:
        if self.scorer is None or not self.referenced:
            return "answers, critical if another one is written"
        return f"answers, critical if their score falls by more than {self.tolerance:g}"

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The user's score of each answer, float64 (N,).

        Raises:
            MetricError: if it is no number from 0 to 1.
        """
        assert self.scorer is not None
        found = []
        for row, target in zip(outputs, targets, strict=True):
            answer = _read(row)
            try:
                given = self.scorer(answer, _read(target))
            except Exception as error:  # the user's own code
                raise MetricError(
                    f"Generation: scorer= raises {type(error).__name__}: {error} on {answer!r}"
                ) from error
            if not isinstance(given, (int, float)) or not 0 <= given <= 1:
                raise MetricError(f"Generation: scorer= gives {given!r} for {answer!r}, expected a number from 0 to 1")
            found.append(float(given))
        return torch.tensor(found, dtype=torch.float64)

    def critical(self, golden: Tensor, faulty: Tensor, targets: Tensor) -> Tensor:
        other = (golden != faulty).any(dim=1)
        nan = holds_nan(faulty)
        if self.scorer is None or not self.referenced:
            return other | nan
        found = other & ~nan
        if bool(found.any()):
            lost = self.scores(golden[found], targets[found]) - self.scores(faulty[found], targets[found])
            found[found.clone()] = lost > self.tolerance
        return found | nan

    def correct(self, outputs: Tensor, targets: Tensor, golden: Tensor) -> Tensor:
        if not self.referenced:
            return ~self.critical(golden, outputs, targets)
        if self.scorer is not None:
            return self.quality(outputs, targets, golden) >= 1
        width = max(outputs.shape[1], targets.shape[1])
        one, other = (nn.functional.pad(t, (0, width - t.shape[1]), value=-1.0) for t in (outputs, targets))
        return (one == other).all(dim=1)

    def quality(self, outputs: Tensor, targets: Tensor, golden: Tensor) -> Tensor:
        if self.scorer is None or not self.referenced:
            return self.correct(outputs, targets, golden).double()
        nan = holds_nan(outputs)
        return torch.where(nan, 0.0, self.scores(torch.where(nan[:, None], 0.0, outputs), targets))

    def scale(self, name: str) -> Scale:
        return scale_of(self.known(name, (*self.usual, "unchanged")))

    def measure(self, name: str, outputs: Tensor, targets: Tensor, golden: Tensor) -> float:
        if self.known(name, (*self.usual, "unchanged")) == self.main:
            return float(self.quality(outputs, targets, golden).mean())
        return float((~self.critical(golden, outputs, targets)).double().mean())

    def disturbed(self, outputs: Tensor, teacher: Tensor, targets: Tensor, lead: float) -> Tensor:
        return self.critical(teacher, outputs, targets)

    def drift(self, outputs: Tensor, teacher: Tensor, targets: Tensor) -> float:
        """Share of answers that are others."""
        return float((teacher != outputs).any(dim=1).double().mean())


def _read(row: Tensor) -> Any:
    """An answer as the user has it: a text, or a list of token numbers."""
    count = min(int(row[1]), len(row) - 2) if row[1] == row[1] else 0
    numbers = [int(number) for number in row[2 : 2 + count].tolist()]
    return "".join(map(chr, numbers)) if row[0] == 1 else numbers
