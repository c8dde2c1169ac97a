"""Objects in an image: boxes with a class and a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flipproof.errors import ConfigError, DataError, MetricError
from flipproof.running.data import Batches, Output, describe
from flipproof.running.judge import Judge, holds_nan
from flipproof.running.scales import Scale, scale_of
from flipproof.running.tasks.base import Rows, Task, padded


@dataclass(frozen=True)
class Detection(Task):
    """The model gives what torchvision's detectors do: for each image a mapping with `boxes`, `scores` and `labels`.

    Boxes are (x₁, y₁, x₂, y₂), (K, 4); targets are mappings with `boxes` and `labels`, one an image. What is detected
    with a score of at least `score` counts. Boxes of two answers are paired from the highest score down, each with
    the best one left of its class that overlaps it by an IoU of at least `iou`. What is not paired is a *miss* (there
    without faults, gone now) or a *ghost* (there now only).

    An answer is critical if it has a miss or a ghost against the answer without faults, and right if it has neither
    against the targets.

    Args:
        score: the least score that counts.
        iou: the least overlap of a pair.
        most: boxes that are kept of an image, those with the highest scores.

    Example:
        >>> import flipproof as fp
        >>> fp.Detection(score=0.5, iou=0.5)
        Detection(score=0.5, iou=0.5, most=100)
    """

    score: float = 0.5
    iou: float = 0.5
    most: int = 100

    name: ClassVar[str] = "detection"

    def __post_init__(self) -> None:
        for name in ("score", "iou"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
                raise ConfigError(f"Detection: {name}= takes a number from 0 to 1, got {value!r}")
        if isinstance(self.most, bool) or not isinstance(self.most, int) or self.most < 1:
            raise ConfigError(f"Detection: most= takes a whole number from 1, got {self.most!r}")

    def read_targets(self, given: Any, inputs: Any, batch: int) -> Tensor:
        if not isinstance(given, Sequence) or not all(
            isinstance(one, Mapping) and "boxes" in one and "labels" in one for one in given
        ):
            raise DataError(
                f"batch {batch}: targets must be one mapping an image with 'boxes' and 'labels', got {describe(given)}"
            )
        rows = []
        for i, one in enumerate(given):
            boxes, labels = torch.as_tensor(one["boxes"]).cpu().double(), torch.as_tensor(one["labels"]).cpu().double()
            boxes = boxes.reshape(-1, 4) if boxes.numel() == 0 else boxes
            if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
                raise DataError(
                    f"batch {batch}, image {i}: expected boxes of shape (objects, 4) and as many labels, got "
                    f"{tuple(boxes.shape)} and {tuple(labels.shape)}"
                )
            if bool((boxes[:, 2:] < boxes[:, :2]).any()):
                raise DataError(
                    f"batch {batch}, image {i}: a box ends before it begins; boxes are (x₁, y₁, x₂, y₂), not "
                    f"corner and size"
                )
            if not bool(torch.isfinite(boxes).all()) or not bool(((labels >= 0) & (labels == labels.round())).all()):
                raise DataError(f"batch {batch}, image {i}: boxes must be finite and labels whole numbers from 0")
            rows.append(torch.cat([boxes, labels[:, None]], dim=1))
        if not rows:
            return torch.zeros(0, 0, 5, dtype=torch.float64)
        return padded([row[None] for row in rows], -1.0)

    def join(self, parts: list[Tensor]) -> Tensor:
        return padded(parts, -1.0)

    def reading(self, output: Output, batches: Batches) -> Output:
        return Boxes(output, self.most)

    def judge(self, model: nn.Module, batches: Batches, output: Output, golden: Tensor) -> Judge:
        many = int((batches.targets[:, :, 4] >= 0).sum(dim=1).max()) if batches.targets.shape[1] else 0
        if many > self.most:
            raise DataError(f"an image has {many} objects, and {self.most} boxes are kept: say Detection(most={many})")
        return BoxJudge(float(self.score), float(self.iou))


@dataclass(frozen=True)
class Boxes(Rows):
    """Rows (N, most, 6): box, score and label of what was found, highest score first; −1 where there is no more.

    Attributes:
        most: boxes that are kept of an image.
    """

    most: int

    def rows(self, picked: Any) -> Tensor:
        """See `Rows`.

        Raises:
            DataError: if it is no mapping with boxes, scores and labels an image.
        """
        if not isinstance(picked, Sequence) or not all(
            isinstance(one, Mapping) and {"boxes", "scores", "labels"} <= set(one) for one in picked
        ):
            raise DataError(
                f"detection takes one mapping an image with 'boxes', 'scores' and 'labels', as torchvision's detectors "
                f"give them, got {describe(picked)}; pass output= a function that makes them"
            )
        made = []
        for one in picked:
            boxes, scores, labels = (one[key].detach().cpu().double() for key in ("boxes", "scores", "labels"))
            found = torch.cat([boxes.reshape(-1, 4), scores.reshape(-1, 1), labels.reshape(-1, 1)], dim=1)
            best = scores.reshape(-1).argsort(descending=True, stable=True)[: self.most]
            row = torch.full((self.most, 6), -1.0, dtype=torch.float64)
            row[: len(best)] = found[best]
            made.append(torch.full_like(row, torch.nan) if bool(torch.isnan(found).any()) else row)
        return torch.stack(made) if made else torch.zeros(0, self.most, 6, dtype=torch.float64)


@dataclass(frozen=True)
class BoxJudge(Judge):
    """How boxes are paired.

    Attributes:
        score: the least that counts.
        iou: the least overlap of a pair.
    """

    score: float
    iou: float

    task: ClassVar[str] = Detection.name
    sample: ClassVar[str] = "image"
    main: ClassVar[str] = "f1"  # type: ignore[misc]
    usual: ClassVar[tuple[str, ...]] = ("f1", "misses", "ghosts")  # type: ignore[misc]

    def describe(self) -> str:
        return (
            f"boxes with a score from {self.score:g}, critical if one is missed or a ghost comes up (IoU {self.iou:g}, "
            f"same class)"
        )

    def critical(self, golden: Tensor, faulty: Tensor, targets: Tensor) -> Tensor:
        found = self._paired(faulty, [self._counted(row) for row in golden])
        return torch.tensor([nan or misses + ghosts > 0 for nan, _, misses, ghosts in found], dtype=torch.bool)

    def correct(self, outputs: Tensor, targets: Tensor, golden: Tensor) -> Tensor:
        found = self._against(outputs, targets)
        return torch.tensor([not nan and misses + ghosts == 0 for nan, _, misses, ghosts in found], dtype=torch.bool)

    def quality(self, outputs: Tensor, targets: Tensor, golden: Tensor) -> Tensor:
        """F1 of each image, 2·pairs ÷ (2·pairs + misses + ghosts); 1 where there is nothing and nothing was found."""
        found = self._against(outputs, targets)
        each = [0.0 if nan else 2 * hits / (2 * hits + m + g) if hits + m + g else 1.0 for nan, hits, m, g in found]
        return torch.tensor(each, dtype=torch.float64)

    def scale(self, name: str) -> Scale:
        return scale_of(self.known(name, _METRICS))

    def measure(self, name: str, outputs: Tensor, targets: Tensor, golden: Tensor) -> float:
        """A metric; of an image whose answer holds a NaN all objects are missed."""
        self.known(name, _METRICS)
        if name == "f1":
            return float(self.quality(outputs, targets, golden).mean())
        if name == "mean_average_precision":
            return self._average_precision(outputs, targets)
        found = self._against(outputs, targets)
        if name == "ghosts":
            return sum(ghosts for *_, ghosts in found) / len(found)
        objects = sum(hits + misses for _, hits, misses, _ in found)
        return sum(misses for _, _, misses, _ in found) / objects if objects else 0.0

    def _average_precision(self, outputs: Tensor, targets: Tensor) -> float:
        """COCO's mean over classes and IoU 0.50 … 0.95 of the average precision, by torchmetrics, of all scores."""
        from torchmetrics.detection import MeanAveragePrecision

        try:
            metric = MeanAveragePrecision(backend="pycocotools")
        except ModuleNotFoundError as error:
            raise MetricError(f"mean_average_precision needs the package pycocotools ({error})") from None
        found, wanted = [], []
        for row, target in zip(outputs, targets, strict=True):
            kept = row[(row[:, 4] >= 0) & ~holds_nan(row)]
            found.append({"boxes": kept[:, :4].float(), "scores": kept[:, 4].float(), "labels": kept[:, 5].long()})
            real = target[target[:, 4] >= 0]
            wanted.append({"boxes": real[:, :4].float(), "labels": real[:, 4].long()})
        metric.update(found, wanted)
        return max(0.0, float(metric.compute()["map"]))

    def _counted(self, row: Tensor) -> Tensor:
        """Boxes and labels of what counts in an answer, (K, 5), highest score first."""
        kept = row[(row[:, 4] >= self.score) & (row[:, 5] >= 0)]
        return kept[:, [0, 1, 2, 3, 5]]

    def _against(self, outputs: Tensor, targets: Tensor) -> list[tuple[bool, int, int, int]]:
        return self._paired(outputs, [target[target[:, 4] >= 0] for target in targets])

    def _paired(self, outputs: Tensor, wanted: list[Tensor]) -> list[tuple[bool, int, int, int]]:
        """Of each image: whether the answer holds a NaN, pairs, misses, ghosts."""
        made = []
        nan = holds_nan(outputs)
        for i, there in enumerate(wanted):
            if bool(nan[i]):
                made.append((True, 0, len(there), 0))
                continue
            found = self._counted(outputs[i])
            hits = _pairs(found, there, self.iou)
            made.append((False, hits, len(there) - hits, len(found) - hits))
        return made

    def disturbed(self, outputs: Tensor, teacher: Tensor, targets: Tensor, lead: float) -> Tensor:
        """Answers with a miss or a ghost at an overlap halfway between `iou` and 1."""
        stricter = BoxJudge(self.score, (1 + self.iou) / 2)
        return stricter.critical(teacher, outputs, targets)

    def drift(self, outputs: Tensor, teacher: Tensor, targets: Tensor) -> float:
        """Misses and ghosts against the fault-free answers, mean over images."""
        found = self._paired(outputs, [self._counted(row) for row in teacher])
        return sum(misses + ghosts for _, _, misses, ghosts in found) / max(1, len(found))


_METRICS = ("f1", "misses", "ghosts", "mean_average_precision")


def _pairs(found: Tensor, there: Tensor, least: float) -> int:
    """How many boxes are paired, each found one in turn with the best one left of its class."""
    if not len(found) or not len(there):
        return 0
    overlaps = torch.where(found[:, 4:] == there[None, :, 4], _overlaps(found[:, :4], there[:, :4]), -1.0)
    hits = 0
    for i in range(len(found)):
        best = int(overlaps[i].argmax())
        if overlaps[i, best] >= least and overlaps[i, best] > 0:
            overlaps[:, best] = -1.0
            hits += 1
    return hits


def _overlaps(one: Tensor, other: Tensor) -> Tensor:
    """IoU of every box with every other, float64 (N, M); of boxes without area or without end 1 with the very same."""
    low, high = torch.maximum(one[:, None, :2], other[None, :, :2]), torch.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1) for boxes in (one, other)]
    found = torch.nan_to_num(shared / (areas[0][:, None] + areas[1][None] - shared), nan=0.0, posinf=0.0)
    return torch.where((one[:, None] == other[None]).all(dim=2), 1.0, found)
