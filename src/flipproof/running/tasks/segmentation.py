"""A class for each pixel of an image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flipproof.errors import ConfigError, DataError, MetricError
from flipproof.running.data import Batches, Output, describe, tensor_of
from flipproof.running.judge import Judge, bits_of_rows, holds_nan
from flipproof.running.scales import Scale, scale_of
from flipproof.running.tasks.base import Rows, Task


@dataclass(frozen=True)
class Segmentation(Task):
    """The model gives scores of classes for every pixel, (N, C, H, W); targets are class numbers, (N, H, W).

    The image is the sample, not the pixel. Of several classes the best wins; a single one (C = 1) is there where its
    score is above `threshold`. With A(c) the pixels of class c in one mask and B(c) in another, the masks agree by

        mIoU(A, B) = mean over classes in A or B of |A(c) ∩ B(c)| ÷ |A(c) ∪ B(c)|

    A mask is critical if its mIoU with the mask without faults is below `agreement`, and right if it is the target's
    in every pixel that counts. Scores themselves are not kept: of a mask it is known whether any bit of them changed.

    Args:
        ignore: the class number of pixels that do not count.
        agreement: what is still the same mask, above 0, up to 1.
        threshold: of a single score: 0 for logits, 0.5 for probabilities.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net, x = torch.nn.Conv2d(3, 4, 3, padding=1), torch.randn(6, 3, 8, 8)
        >>> result = fp.assess(net, [(x, net(x).argmax(dim=1))], faults=fp.BitErrorRate(1e-2), trials=5,
        ...                    task=fp.Segmentation())
        >>> result.golden
        {'image_miou': 1.0, 'miou': 1.0, 'pixel_accuracy': 1.0}
    """

    ignore: int = 255
    agreement: float = 0.95
    threshold: float = 0.0

    name: ClassVar[str] = "segmentation"

    def __post_init__(self) -> None:
        if isinstance(self.ignore, bool) or not isinstance(self.ignore, int):
            raise ConfigError(f"Segmentation: ignore= takes a class number, got {self.ignore!r}")
        if not isinstance(self.agreement, (int, float)) or not 0 < self.agreement <= 1:
            raise ConfigError(f"Segmentation: agreement= takes a number above 0, up to 1, got {self.agreement!r}")

    def read_targets(self, given: Any, inputs: Any, batch: int) -> Tensor:
        target = tensor_of(given, batch, "class numbers of pixels, of shape (samples, height, width)")
        if target.dim() == 4 and target.shape[1] == 1:
            target = target[:, 0]
        if target.dim() != 3 or target.is_complex() or not bool((target == target.to(torch.int64)).all()):
            raise DataError(
                f"batch {batch}: targets must be class numbers of pixels, of shape (samples, height, width), got "
                f"{target.dtype} of shape {tuple(target.shape)}"
            )
        return target.to(torch.int64)

    def reading(self, output: Output, batches: Batches) -> Output:
        return Masks(output, self.threshold)

    def judge(self, model: nn.Module, batches: Batches, output: Output, golden: Tensor) -> Judge:
        expected = tuple(batches.targets.shape[1:])
        assert isinstance(output, Masks)
        if golden.shape[1] != _HASH + batches.targets[0].numel():
            raise DataError(
                f"the model answers masks of {golden.shape[1] - _HASH} pixels, and the targets have {expected}: give "
                f"targets of the model's size, or output= a function that makes scores of theirs"
            )
        counted = (batches.targets != self.ignore).flatten(1).any(dim=1)
        if not bool(counted.all()):
            raise DataError(
                f"image {int((~counted).nonzero()[0, 0])}: all pixels are of class {self.ignore}: none counts"
            )
        return MaskJudge(self.ignore, float(self.agreement), int(golden[0, _HASH - 1]))


_HASH = 5
"""Numbers before the pixels of a row: a hash of all scores, see `bits_of_rows`, and how many classes there are."""


@dataclass(frozen=True)
class Masks(Rows):
    """Rows (N, 5 + H·W): a hash of all scores, the number of classes, and the class of each pixel.

    Attributes:
        threshold: of a single score.
    """

    threshold: float

    def rows(self, picked: Any) -> Tensor:
        """See `Rows`.

        Raises:
            DataError: if it is no tensor (N, C, H, W).
        """
        if not isinstance(picked, Tensor) or picked.dim() != 4 or not picked.is_floating_point():
            raise DataError(
                f"segmentation takes scores of the shape (samples, classes, height, width), got {describe(picked)}; "
                f"pass output= what picks them, such as 'out' for the models of torchvision"
            )
        found = picked.argmax(dim=1) if picked.shape[1] > 1 else (picked[:, 0] > self.threshold)
        classes = torch.full((len(found), 1), float(max(2, picked.shape[1])), device=picked.device)
        rows = torch.cat([bits_of_rows(picked), classes, found.reshape(len(found), -1).to(torch.float32)], dim=1)
        return torch.where(holds_nan(picked)[:, None], torch.nan, rows)


@dataclass(frozen=True)
class MaskJudge(Judge):
    """How masks are compared.

    Attributes:
        ignore: class of pixels that do not count.
        agreement: the least mIoU of what is still the same mask.
        classes: how many the model tells apart.
    """

    ignore: int
    agreement: float
    classes: int

    task: ClassVar[str] = Segmentation.name
    sample: ClassVar[str] = "image"
    main: ClassVar[str] = "image_miou"  # type: ignore[misc]
    usual: ClassVar[tuple[str, ...]] = ("image_miou", "miou", "pixel_accuracy")  # type: ignore[misc]

    def describe(self) -> str:
        return (
            f"masks, critical if their mIoU with the fault-free mask is below {self.agreement:g}; pixels of class "
            f"{self.ignore} do not count"
        )

    def _alike(self, golden: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        """How far each mask is the fault-free one: their mIoU over the pixels that count, float64 (N,)."""
        counted = targets.reshape(len(targets), -1) != self.ignore
        return _miou(golden[:, _HASH:], outputs[:, _HASH:], counted)

    def critical(self, golden: Tensor, faulty: Tensor, targets: Tensor) -> Tensor:
        agree = self._alike(golden, faulty, targets)
        return ~(agree >= self.agreement) | holds_nan(faulty)

    def correct(self, outputs: Tensor, targets: Tensor, golden: Tensor) -> Tensor:
        flat = targets.reshape(len(targets), -1)
        return ((outputs[:, _HASH:] == flat) | (flat == self.ignore)).all(dim=1)

    def check_targets(self, targets: Tensor) -> None:
        outside = (targets != self.ignore) & ((targets < 0) | (targets >= self.classes))
        if bool(outside.any()):
            image = int(outside.flatten(1).any(dim=1).nonzero()[0, 0])
            raise DataError(
                f"image {image} has pixels of the class {int(targets[image][outside[image]][0])}, but the model "
                f"answers classes 0 to {self.classes - 1}; pixels that do not count have the class "
                f"{self.ignore} (ignore=)"
            )

    def quality(self, outputs: Tensor, targets: Tensor, golden: Tensor) -> Tensor:
        """MIoU of each image with its target; 0 where it is NaN."""
        flat = targets.reshape(len(targets), -1)
        return torch.where(holds_nan(outputs), 0.0, _miou(flat, outputs[:, _HASH:], flat != self.ignore))

    def shown(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Masks of class numbers, int64 (N, H, W); where scores hold a NaN every pixel is of a class that is wrong."""
        found = outputs[:, _HASH:].reshape(targets.shape)
        return torch.where(torch.isnan(found), (targets + 1) % self.classes, found).to(torch.int64)

    def scale(self, name: str) -> Scale:
        return scale_of(self.known(name, self.usual))

    def measure(self, name: str, outputs: Tensor, targets: Tensor, golden: Tensor) -> float:
        """A metric; every pixel of an image whose scores hold a NaN is wrong."""
        self.known(name, self.usual)
        if name == "image_miou":
            return float(self.quality(outputs, targets, golden).mean())
        flat = targets.reshape(len(targets), -1)
        counted = flat != self.ignore
        if not bool(counted.any()):
            raise MetricError(f"{name} is undefined: all pixels have the class {self.ignore}, which does not count")
        found = torch.nan_to_num(outputs[:, _HASH:], nan=-1.0)
        if name == "pixel_accuracy":
            return int(((found == flat) & counted).sum()) / int(counted.sum())
        return float(_miou(flat.reshape(1, -1), found.reshape(1, -1), counted.reshape(1, -1)))

    def disturbed(self, outputs: Tensor, teacher: Tensor, targets: Tensor, lead: float) -> Tensor:
        """Masks that lost more than half of what they may lose."""
        agree = self._alike(teacher, outputs, targets)
        return ~(1 - agree <= (1 - self.agreement) / 2) | self.critical(teacher, outputs, targets)

    def drift(self, outputs: Tensor, teacher: Tensor, targets: Tensor) -> float:
        """1 − mIoU with the fault-free masks, mean over images."""
        agree = self._alike(teacher, outputs, targets)
        return float(torch.where(holds_nan(outputs), 1.0, 1 - agree).mean())


def _miou(one: Tensor, other: Tensor, counted: Tensor) -> Tensor:
    """MIoU of rows of class numbers over the pixels that count; 1 where none does; float64 (N,)."""
    total = torch.zeros(len(one), dtype=torch.float64)
    classes = torch.zeros(len(one), dtype=torch.float64)
    for label in _classes(one, other, counted):
        here, there = (one == label) & counted, (other == label) & counted
        either = (here | there).sum(dim=1)
        total += torch.where(either > 0, (here & there).sum(dim=1) / either.clamp(min=1), 0.0)
        classes += either > 0
    return torch.where(classes > 0, total / classes.clamp(min=1), 1.0)


def _classes(one: Tensor, other: Tensor, counted: Tensor) -> Iterator[float]:
    """The classes of pixels that count, but for the −1 of what is NaN."""
    found = torch.unique(torch.cat([one[counted].double(), other[counted].double()]))
    return (label for label in found.tolist() if label >= 0)
