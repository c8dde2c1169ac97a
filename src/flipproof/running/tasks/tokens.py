"""A class for each token of a sequence: the next token, or a tag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flipproof.errors import ConfigError, DataError
from flipproof.running.data import Batches, Output, describe, tensor_of
from flipproof.running.decision import drift
from flipproof.running.judge import Judge, bits_of_rows, holds_nan
from flipproof.running.scales import Scale, scale_of
from flipproof.running.tasks.base import Rows, Task, padded

LARGEST = 4 * 2**30
"""Bytes of scores of all sequences that are kept for perplexity."""


@dataclass(frozen=True)
class Tokens(Task):
    """The model gives scores of V classes at every position of a sequence, (N, T, V); targets are classes, (N, T).

    The sequence is the sample, not the token. An answer is critical if at fewer than a share `agreement` of the
    positions that count the same class wins as without faults, and right if the target wins at all of them.

        perplexity = exp(mean over all positions that count of −log p(target))

    Args:
        ignore: the target of positions that do not count, as PyTorch's cross entropy and Hugging Face have it.
        agreement: share of positions at which the same class has to win, above 0, up to 1.
        shift: targets are the inputs themselves, and scores at a position are of the *next* token, as in Hugging Face's
            causal models; False if targets are what each position has to answer.
        perplexity: keep all scores, N · T · V of them; False keeps only which class wins, and knows no perplexity.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20))
        >>> x = torch.randint(20, (6, 12))
        >>> result = fp.assess(net, [(x, net(x).argmax(dim=2))], faults=fp.BitErrorRate(1e-3), trials=5,
        ...                    task=fp.Tokens())
        >>> sorted(result.golden), result.golden["token_accuracy"]
        (['perplexity', 'token_accuracy'], 1.0)
    """

    ignore: int = -100
    agreement: float = 1.0
    shift: bool = False
    perplexity: bool = True

    name: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        if isinstance(self.ignore, bool) or not isinstance(self.ignore, int):
            raise ConfigError(f"Tokens: ignore= takes a whole number, got {self.ignore!r}")
        if not isinstance(self.agreement, (int, float)) or not 0 < self.agreement <= 1:
            raise ConfigError(f"Tokens: agreement= takes a number above 0, up to 1, got {self.agreement!r}")

    def read_targets(self, given: Any, inputs: Any, batch: int) -> Tensor:
        target = tensor_of(given, batch, "class numbers of tokens, of shape (samples, positions)")
        if target.dim() != 2 or target.is_floating_point() or target.is_complex():
            raise DataError(
                f"batch {batch}: targets must be class numbers of tokens, of shape (samples, positions), got "
                f"{target.dtype} of shape {tuple(target.shape)}"
            )
        target = target.to(torch.int64)
        if self.shift:
            target = torch.cat([target[:, 1:], target.new_full((len(target), 1), self.ignore)], dim=1)
        return target

    def join(self, parts: list[Tensor]) -> Tensor:
        return padded(parts, self.ignore)

    def reading(self, output: Output, batches: Batches) -> Output:
        return Positions(output, int(batches.targets.shape[1]), self.perplexity, batches.samples)

    def judge(self, model: nn.Module, batches: Batches, output: Output, golden: Tensor) -> Judge:
        counted = batches.targets != self.ignore
        if not bool(counted.any(dim=1).all()):
            sample = int((~counted.any(dim=1)).nonzero()[0, 0])
            raise DataError(f"sample {sample} has no position that counts: all of its targets are {self.ignore}")
        classes = golden.shape[2] if self.perplexity else None
        return TokenJudge(self.ignore, float(self.agreement), classes)


@dataclass(frozen=True)
class Positions(Rows):
    """Rows (N, T, V) of scores, or rows (N, 4 + T): a hash of all scores, and the class that wins at each position.

    Attributes:
        length: T; shorter sequences are filled up with zeros.
        scores: whether scores are kept.
        samples: how many sequences there are in all.
    """

    length: int
    scores: bool
    samples: int

    def rows(self, picked: Any) -> Tensor:
        """See `Rows`.

        Raises:
            DataError: if it is no tensor (N, T, V), or too large to be kept.
        """
        if not isinstance(picked, Tensor) or picked.dim() != 3 or not picked.is_floating_point():
            raise DataError(
                f"tokens take scores of the shape (samples, positions, classes), got {describe(picked)}; pass output= "
                f"what picks them, such as 'logits' for the models of Hugging Face"
            )
        if picked.shape[1] > self.length:
            raise DataError(
                f"the model answers {picked.shape[1]} positions, and the targets have {self.length}: each position "
                f"needs a target, those that do not count the one to ignore"
            )
        needed = self.samples * self.length * picked.shape[2] * picked.element_size()
        if self.scores and needed > LARGEST:
            raise DataError(
                f"scores of {self.samples:,} sequences of {self.length} positions and {picked.shape[2]:,} classes take "
                f"{needed / 2**30:.1f} GiB, more than {LARGEST / 2**30:g}: give fewer or shorter ones, or say "
                f"task=fp.Tokens(perplexity=False), which keeps only which class wins"
            )
        missing = self.length - picked.shape[1]
        if self.scores:
            return F.pad(picked, (0, 0, 0, missing))
        rows = torch.cat([bits_of_rows(picked), F.pad(picked.argmax(dim=2).to(torch.float32), (0, missing))], dim=1)
        return torch.where(holds_nan(picked)[:, None], torch.nan, rows)


_HASH = 4


@dataclass(frozen=True)
class TokenJudge(Judge):
    """How sequences are compared.

    Attributes:
        ignore: the target of positions that do not count.
        agreement: share of positions at which the same class has to win.
        classes: V, where scores are kept; None where they are not.
    """

    ignore: int
    agreement: float
    classes: int | None

    task: ClassVar[str] = Tokens.name
    sample: ClassVar[str] = "sequence"
    main: ClassVar[str] = "token_accuracy"  # type: ignore[misc]

    @property
    def usual(self) -> tuple[str, ...]:  # type: ignore[override]
        """Perplexity where there are scores."""
        return ("token_accuracy",) if self.classes is None else ("token_accuracy", "perplexity")

    def describe(self) -> str:
        share = "any position" if self.agreement == 1 else f"more than {1 - self.agreement:.3g} of the positions"
        return f"classes of tokens, critical if another one wins at {share}; targets {self.ignore} do not count"

    def winners(self, outputs: Tensor) -> Tensor:
        """The class that wins at each position, int64 (N, T); −1 where a score is NaN."""
        if self.classes is None:
            return torch.nan_to_num(outputs[:, _HASH:], nan=-1.0).to(torch.int64)
        return torch.where(torch.isnan(outputs).any(dim=2), -1, outputs.argmax(dim=2))

    def shown(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Scores, or where none are kept, `winners`."""
        return outputs if self.classes is not None else self.winners(outputs)

    def critical(self, golden: Tensor, faulty: Tensor, targets: Tensor) -> Tensor:
        counted = targets != self.ignore
        alike = ((self.winners(golden) == self.winners(faulty)) & counted).sum(dim=1) / counted.sum(dim=1)
        return ~(alike.double() >= self.agreement - 1e-12) | holds_nan(faulty)

    def correct(self, outputs: Tensor, targets: Tensor, golden: Tensor) -> Tensor:
        return ((self.winners(outputs) == targets) | (targets == self.ignore)).all(dim=1) & ~holds_nan(outputs)

    def quality(self, outputs: Tensor, targets: Tensor, golden: Tensor) -> Tensor:
        """Share of positions at which the target wins, float64 (N,)."""
        counted = targets != self.ignore
        return ((self.winners(outputs) == targets) & counted).sum(dim=1).double() / counted.sum(dim=1)

    def scale(self, name: str) -> Scale:
        return scale_of(self.known(name, self.usual))

    def measure(self, name: str, outputs: Tensor, targets: Tensor, golden: Tensor) -> float:
        """A metric; the target has no probability where a score is NaN, so that perplexity is then infinite."""
        if self.known(name, self.usual) == "token_accuracy":
            return float(self.quality(outputs, targets, golden).mean())
        total, counted = 0.0, 0
        for row, target in zip(outputs, targets, strict=True):  # one at a time: float64 scores of all are too many
            here = target != self.ignore
            total += float(_surprise(row[here].double(), target[here]).sum())
            counted += int(here.sum())
        return float(torch.tensor(total / counted, dtype=torch.float64).exp())

    def check_targets(self, targets: Tensor) -> None:
        outside = (targets != self.ignore) & ((targets < 0) | (targets >= (self.classes or 2**62)))
        if bool(outside.any()):
            sample, position = (int(each) for each in outside.nonzero()[0])
            raise DataError(
                f"sample {sample} has the class {int(targets[sample, position])} at position {position}, but the model "
                f"answers classes 0 to {(self.classes or 2**62) - 1}"
            )

    def as_classes(self, outputs: Tensor, targets: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.classes is None:
            return super().as_classes(outputs, targets, teacher)
        counted = targets != self.ignore
        return outputs[counted], targets[counted], teacher[counted]

    def lead(self, teacher: Tensor) -> float:
        """The median distance of the best score to the second, over all positions."""
        if self.classes is None or self.classes < 2:
            return 0.0
        best = teacher.topk(2, dim=2).values.double()
        return float((best[..., 0] - best[..., 1]).median())

    def disturbed(self, outputs: Tensor, teacher: Tensor, targets: Tensor, lead: float) -> Tensor:
        if self.classes is None:
            return self.critical(teacher, outputs, targets)
        return super().disturbed(outputs, teacher, targets, lead)

    def drift(self, outputs: Tensor, teacher: Tensor, targets: Tensor) -> float:
        """Divergence of the scores at positions that count, mean; where no scores are kept, the share that changed."""
        if self.classes is None:
            return 1 - float(self.quality(outputs, self.winners(teacher), teacher).mean())
        found, _, golden = self.as_classes(outputs, targets, teacher)
        return drift(found, golden)


def _surprise(scores: Tensor, targets: Tensor) -> Tensor:
    """−log p(target) of rows of scores, in the limit where they are infinite; ∞ where they are NaN."""
    top = scores.amax(dim=1, keepdim=True)
    at_top = scores == top
    limit = torch.where(at_top.gather(1, targets[:, None])[:, 0], at_top.sum(dim=1).double().log(), torch.inf)
    found = torch.where(torch.isinf(top[:, 0]), limit, -F.log_softmax(scores, dim=1).gather(1, targets[:, None])[:, 0])
    return torch.nan_to_num(found, nan=torch.inf, posinf=torch.inf)
