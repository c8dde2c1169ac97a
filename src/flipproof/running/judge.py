"""How the answers of one model are judged, for whatever task it was made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from flipproof.errors import ConfigError, MetricError
from flipproof.formats.base import bit_pattern
from flipproof.running.scales import Scale

HALF = 0.5
"""A sample is disturbed if a score moves by more than this share of the usual lead, or its answer changes."""

WORST = 20.0
"""Nats that an answer can be away at most: what it then says is not what it was."""


class Judge(ABC):
    """What is right, tolerable and critical in the answers of one model, read once off its golden answers.

    Answers are one row a sample, as the task makes them of what the model returns. A row that holds a NaN is a detected
    error (DUE), and is wrong and critical whatever else it holds.

    Attributes:
        task: the name that people say.
        sample: what one sample is called, "sample" by default.
        main: the metric by which `harden`, `protect` and `explore` go: a share, higher is better.
        usual: the metrics of `assess` if nobody asks for others; the main one comes first.
        assumed: whether something about how answers are read had to be assumed.
        labels: how many kinds of golden answers `labels_of` tells apart.
    """

    task: ClassVar[str]
    sample: ClassVar[str] = "sample"
    main: str
    usual: tuple[str, ...]
    assumed: bool = False
    labels: int = 1

    @abstractmethod
    def describe(self) -> str:
        """How answers are read and what is critical, in words; it is part of a campaign's fingerprint."""

    @abstractmethod
    def critical(self, golden: Tensor, faulty: Tensor, targets: Tensor) -> Tensor:
        """Whether each faulty answer is another one than without faults, beyond what is tolerated; bool (N,)."""

    @abstractmethod
    def correct(self, outputs: Tensor, targets: Tensor, golden: Tensor) -> Tensor:
        """Whether each answer is right, bool (N,).

        Args:
            outputs: answers, one row a sample.
            targets: of these samples.
            golden: their answers without faults.
        """

    @abstractmethod
    def scale(self, name: str) -> Scale:
        """What the numbers of a metric mean.

        Raises:
            MetricError: if this task has no such metric.
        """

    @abstractmethod
    def measure(self, name: str, outputs: Tensor, targets: Tensor, golden: Tensor) -> float:
        """A metric over all samples.

        Raises:
            MetricError: if it is not defined on these samples.
        """

    def quality(self, outputs: Tensor, targets: Tensor, golden: Tensor) -> Tensor:
        """How right each answer is, float64 (N,) from 0 to 1; its mean is the main metric."""
        return self.correct(outputs, targets, golden).double()

    def shown(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What a user's own metric is given of the answers: here rows as they are."""
        return outputs

    def labels_of(self, golden: Tensor) -> Tensor:
        """Of which kind each golden answer is, int64 (N,) below `labels`."""
        return torch.zeros(len(golden), dtype=torch.int64)

    def check_targets(self, targets: Tensor) -> None:  # noqa: B027 (most tasks can answer whatever they could read)
        """Refuse targets that the model cannot answer.

        Raises:
            DataError: naming the first.
        """

    def as_classes(self, outputs: Tensor, targets: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, targets and the teacher's logits of everything that is one choice among classes; differentiable.

        Raises:
            ConfigError: if answers of this task are no such choices, so that no threshold can be trained by them.
        """
        raise ConfigError(
            f"thresholds are trained by cross entropy, and answers of the task {self.task!r} are no choices among "
            f"classes: take a method that trains nothing, such as fp.Ranger(), fp.Guard() or fp.FTClipAct()"
        )

    def lead(self, teacher: Tensor) -> float:
        """How far scores usually are from another answer: by default the median size of a number in a row."""
        return float(teacher.double().abs().median()) if teacher.numel() else 0.0

    def disturbed(self, outputs: Tensor, teacher: Tensor, targets: Tensor, lead: float) -> Tensor:
        """Which answers moved by more than `HALF` of a lead, or are others; bool (N,)."""
        moved = _moved(outputs, teacher)
        return ~(moved <= HALF * lead) | self.critical(teacher, outputs, targets)

    def drift(self, outputs: Tensor, teacher: Tensor, targets: Tensor) -> float:
        """How far answers are from the fault-free ones, in nats, mean over samples; at most `WORST`, as NaN counts.

        By default ½ (Δ / lead)², with Δ the largest change of a number in a row: the divergence of two normal
        distributions as wide as the lead.
        """
        moved = _moved(outputs, teacher)
        lead = self.lead(teacher)
        apart = (moved / lead).square() / 2 if lead > 0 else torch.where(moved > 0, WORST, 0.0)
        return float(torch.nan_to_num(apart, nan=WORST, posinf=WORST).clamp(0, WORST).mean())

    def has(self, name: str) -> bool:
        """Whether there is a metric of this name."""
        try:
            self.scale(name)
        except MetricError:
            return False
        return True

    def known(self, name: str, names: tuple[str, ...]) -> str:
        """The name of a metric, if it is one of these.

        Raises:
            MetricError: naming those that there are.
        """
        if name not in names:
            raise MetricError(
                f"the task {self.task!r} has no metric {name!r}: choose among {', '.join(names)}, or pass a function "
                f"(outputs, targets)"
            )
        return name


def _moved(outputs: Tensor, teacher: Tensor) -> Tensor:
    """The largest change of a number in each row, float64 (N,); equal infinities did not move."""
    gap = torch.where(outputs == teacher, 0.0, (outputs.double() - teacher.double()).abs())
    return gap.reshape(len(teacher), -1).amax(dim=1)


def holds_nan(outputs: Tensor) -> Tensor:
    """Which samples have a NaN anywhere in their output, bool (N,)."""
    return torch.isnan(outputs).reshape(outputs.shape[0], -1).any(dim=1)


def bits_of_rows(values: Tensor) -> Tensor:
    """Four numbers a row that tell its bits from any other's, float32 (N, 4): a 64-bit hash, 16 bits a number.

    Tasks that keep what was decided, and not the scores, keep this beside it: a row is masked only if every score is,
    bit by bit, as without faults. Two different rows have the same hash once in 2⁶⁴.
    """
    words = bit_pattern(values.detach().reshape(len(values), -1).contiguous()).to(torch.int64)
    place = torch.arange(words.shape[1], device=words.device) * -7046029254386353131  # 2⁶⁴ ÷ golden ratio, odd
    mixed = _mixed(words + place)
    total = _mixed(mixed.sum(dim=1))
    return torch.stack([(total >> shift) & 0xFFFF for shift in (0, 16, 32, 48)], dim=1).to(torch.float32)


def _mixed(words: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014, Figure 16), modulo 2⁶⁴."""
    words = (words ^ ((words >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    words = (words ^ ((words >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return words ^ ((words >> 31) & 0x1FFFFFFFF)
