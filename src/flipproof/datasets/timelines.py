"""Hourly timelines of intensive-care stays: 76 features and 17 intervals (Parchekani et al. 2024, section IV)."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from flipproof.errors import DataError

Floats = NDArray[np.float64]
EHRBatch = tuple[dict[str, Tensor], Tensor]

LABELS_FROM = 4
"""Hours of a stay before its first label."""


@dataclass(frozen=True)
class Channel:
    """One of the 17 physiological variables.

    Attributes:
        name: the column's name in the MIMIC-III benchmark, spelling included.
        normal: what is assumed before the first measurement; of categories, the index.
        categories: the texts that a categorical one may hold; () for a continuous one.
        low: the smallest value that a body and the usual unit allow; anything below is no measurement.
        high: the largest.
    """

    name: str
    normal: float
    categories: tuple[str, ...] = ()
    low: float = float("-inf")
    high: float = float("inf")


_EYES = (
    *("To Pain", "3 To speech", "1 No Response", "4 Spontaneously"),
    *("None", "To Speech", "Spontaneously", "2 To pain"),
)
_MOTOR = (
    *("1 No Response", "3 Abnorm flexion", "Abnormal extension", "No response", "4 Flex-withdraws", "Localizes Pain"),
    *("Flex-withdraws", "Obeys Commands", "Abnormal Flexion", "6 Obeys Commands", "5 Localizes Pain"),
    "2 Abnorm extensn",
)
_TOTAL = ("11", "10", "13", "12", "15", "14", "3", "5", "4", "7", "6", "9", "8")
_VERBAL = (
    *("1 No Response", "No Response", "Confused", "Inappropriate Words", "Oriented", "No Response-ETT", "5 Oriented"),
    *("Incomprehensible sounds", "1.0 ET/Trach", "4 Confused", "2 Incomp sounds", "3 Inapprop words"),
)

CHANNELS = (
    Channel("Capillary refill rate", 0, ("0.0", "1.0")),
    Channel("Diastolic blood pressure", 59.0, low=1, high=375),
    Channel("Fraction inspired oxygen", 0.21, low=0.2, high=1.0),
    Channel("Glascow coma scale eye opening", _EYES.index("4 Spontaneously"), _EYES),
    Channel("Glascow coma scale motor response", _MOTOR.index("6 Obeys Commands"), _MOTOR),
    Channel("Glascow coma scale total", _TOTAL.index("15"), _TOTAL),
    Channel("Glascow coma scale verbal response", _VERBAL.index("5 Oriented"), _VERBAL),
    Channel("Glucose", 128.0, low=1, high=2200),
    Channel("Heart Rate", 86.0, low=1, high=390),
    Channel("Height", 170.0, low=40, high=250),
    Channel("Mean blood pressure", 77.0, low=1, high=375),
    Channel("Oxygen saturation", 98.0, low=1, high=100),
    Channel("Respiratory rate", 19.0, low=1, high=330),
    Channel("Systolic blood pressure", 118.0, low=1, high=375),
    Channel("Temperature", 36.6, low=14.2, high=47),
    Channel("Weight", 81.0, low=0.5, high=700),
    Channel("pH", 7.4, low=6.3, high=8.4),
)
"""In the benchmark's order: 12 continuous and 5 categorical ones with 2 + 8 + 12 + 13 + 12 = 47 categories."""

INDEX = {channel.name: i for i, channel in enumerate(CHANNELS)}
WIDTHS = [len(channel.categories) or 1 for channel in CHANNELS]
FIRSTS = np.concatenate([[0], np.cumsum(WIDTHS)])
CONTINUOUS = [int(FIRSTS[i]) for i, channel in enumerate(CHANNELS) if not channel.categories]
FEATURES = int(FIRSTS[-1]) + len(CHANNELS)
"""76: 12 values, 47 categories, 17 masks; 17 intervals follow them."""


@dataclass
class Problems:
    """What was wrong with the files and left out, by kind; nothing wrong becomes a number."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def note(self, kind: str, where: str) -> None:
        """Count one more; the first three of a kind are kept with their place."""
        self.counts[kind] += 1
        if len(self.examples[kind]) < 3:
            self.examples[kind].append(where)

    def table(self) -> pd.DataFrame:
        """One row a kind: `problem`, `count`, `examples`."""
        rows = [(kind, count, "; ".join(self.examples[kind])) for kind, count in self.counts.most_common()]
        return pd.DataFrame(rows, columns=["problem", "count", "examples"])


@dataclass
class Stay:
    """One stay, hour by hour.

    Attributes:
        name: of the record.
        x: (T, 93) float32; continuous values still in their units until `standardise`.
        labels: (T,), NaN where there is none.
    """

    name: str
    x: NDArray[np.float32]
    labels: Floats


def timeline(hours: Floats, channels: NDArray[np.int64], values: Floats, length: int) -> NDArray[np.float32]:
    """Measurements to hourly features.

    Within an hour the last value counts; an hour without one keeps the value before, or the channel's normal value; the
    mask says which. An interval is the time since the last measurement, or since admission, in days.

    Args:
        hours: since admission, ≥ 0, any order.
        channels: index into `CHANNELS` of each measurement.
        values: numbers, or category indices.
        length: hours T.

    Returns:
        (T, 93).

    Example:
        >>> x = timeline(np.array([0.5, 2.1]), np.array([8, 8]), np.array([70.0, 90.0]), 4)
        >>> x.shape, x[:, FIRSTS[8]].tolist()
        ((4, 93), [70.0, 70.0, 90.0, 90.0])
    """
    order = np.argsort(hours, kind="stable")
    hour = hours[order].astype(np.int64)
    order, hour = order[hour < length], hour[hour < length]
    seen = np.full((length, len(CHANNELS)), np.nan)
    seen[hour, channels[order]] = values[order]
    mask = ~np.isnan(seen)
    steps = np.arange(length)[:, None]
    last = np.maximum.accumulate(np.where(mask, steps, -1), axis=0)
    normal = np.array([channel.normal for channel in CHANNELS])
    filled = np.where(last >= 0, np.take_along_axis(seen, np.maximum(last, 0), axis=0), normal)
    x = np.zeros((length, FEATURES + len(CHANNELS)), np.float32)
    for i, channel in enumerate(CHANNELS):
        if channel.categories:
            x[np.arange(length), FIRSTS[i] + filled[:, i].astype(np.int64)] = 1
        else:
            x[:, FIRSTS[i]] = filled[:, i]
    x[:, FIRSTS[-1] : FEATURES] = mask
    x[:, FEATURES:] = np.where(last >= 0, steps - last, steps + 1) / 24
    return x


@dataclass(frozen=True)
class EHRSet:
    """Stays of one part of the data.

    Attributes:
        stays: standardised.
    """

    stays: tuple[Stay, ...]

    def __len__(self) -> int:
        return len(self.stays)

    @property
    def labels(self) -> Tensor:
        """All labels, stay by stay, int64."""
        return torch.from_numpy(np.concatenate([s.labels[~np.isnan(s.labels)] for s in self.stays])).long()

    def batches(self, batch_size: int = 64, *, shuffle: bool = False, seed: int = 0) -> list[EHRBatch]:
        """Batches `(inputs, targets)` for `assess`, `harden` and training.

        Stays of similar length share a batch and are padded at their end.

        Args:
            batch_size: stays N a batch.
            shuffle: mix stays (before sorting by length within 20 batches).
            seed: of that order.

        Returns:
            Inputs are ``{"x": (N, T, 93), "delta": (N, T) hours since the step before, "mask": (N, T) 1 where a step
            exists, "at": bool (N, T) where it is labelled}``, arguments of `StageNet`; targets one class a labelled
            step, row by row.
        """
        order = np.arange(len(self.stays))
        if shuffle:
            np.random.default_rng(seed).shuffle(order)
        blocks = [order[i : i + 20 * batch_size] for i in range(0, len(order), 20 * batch_size)]
        order = np.concatenate([b[np.argsort([len(self.stays[i].x) for i in b], kind="stable")] for b in blocks])
        parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        return [_batch([self.stays[i] for i in part]) for part in parts]


def _batch(stays: list[Stay]) -> EHRBatch:
    length = max(len(stay.x) for stay in stays)
    x = np.zeros((len(stays), length, stays[0].x.shape[1]), np.float32)
    mask = np.zeros((len(stays), length), np.float32)
    labels = np.full((len(stays), length), np.nan)
    for row, stay in enumerate(stays):
        x[row, : len(stay.x)], mask[row, : len(stay.x)], labels[row, : len(stay.x)] = stay.x, 1, stay.labels
    at = ~np.isnan(labels)
    inputs = {
        "x": torch.from_numpy(x),
        "delta": torch.ones(mask.shape),
        "mask": torch.from_numpy(mask),
        "at": torch.from_numpy(at),
    }
    return inputs, torch.from_numpy(labels[at]).long()


@dataclass(frozen=True)
class EHRData:
    """Training, validation and test stays, standardised with the training stays' statistics.

    Attributes:
        train: to fit weights.
        validation: to calibrate bounds and choose bits.
        test: to judge.
        problems: what was left out of the files.
        mean: of the 12 continuous values over the training stays.
        std: the same.
    """

    train: EHRSet
    validation: EHRSet
    test: EHRSet
    problems: Problems
    mean: Floats
    std: Floats

    @classmethod
    def standardised(cls, train: list[Stay], validation: list[Stay], test: list[Stay], problems: Problems) -> EHRData:
        """Z-score the continuous values of all three by the first one's mean and standard deviation.

        Raises:
            DataError: if a part has no labelled stay, with what was wrong.
        """
        for name, part in (("training", train), ("validation", validation), ("test", test)):
            if not part:
                raise DataError(
                    f"no labelled stay is left for {name}; what was wrong:\n{problems.table().to_string(index=False)}"
                )
        values = np.concatenate([stay.x[:, CONTINUOUS] for stay in train]).astype(np.float64)
        mean, std = values.mean(axis=0), values.std(axis=0)
        std = np.where(std > 0, std, 1.0)  # a channel that is never measured stays 0
        for stay in (*train, *validation, *test):
            stay.x[:, CONTINUOUS] = (stay.x[:, CONTINUOUS] - mean) / std
        return cls(EHRSet(tuple(train)), EHRSet(tuple(validation)), EHRSet(tuple(test)), problems, mean, std)


def read_value(channel: Channel, text: str, where: str, problems: Problems) -> float | None:
    """A measurement as a number or category index; None, counted, if it is neither.

    Example:
        >>> problems = Problems()
        >>> read_value(CHANNELS[14], "98.6", "stay.csv:3", problems), problems.table()["problem"].tolist()
        (None, ['Temperature outside 14.2 to 47: another unit, or no measurement'])
    """
    if channel.categories:
        if text in channel.categories:
            return float(channel.categories.index(text))
        try:  # "15" and "15.0" are the same total
            number = float(text)
        except ValueError:
            number = np.nan
        for i, known in enumerate(channel.categories):
            if known.replace(".", "").isdigit() and float(known) == number:
                return float(i)
        problems.note(f"{channel.name}: unknown category {text!r}", where)
        return None
    try:
        number = float(text)
    except ValueError:
        problems.note(f"{channel.name} is no number", f"{where} {text!r}")
        return None
    if not channel.low <= number <= channel.high:
        problems.note(
            f"{channel.name} outside {channel.low:g} to {channel.high:g}: another unit, or no measurement",
            f"{where} {text}",
        )
        return None
    return number
