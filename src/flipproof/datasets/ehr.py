"""Intensive-care timelines in one layout: MIMIC-III (a user's own copy), PhysioNet 2012, and a seeded generator."""

from __future__ import annotations

import numpy as np

from flipproof.datasets.mimic import mimic3
from flipproof.datasets.physionet import physionet2012
from flipproof.datasets.timelines import CHANNELS, LABELS_FROM, EHRData, EHRSet, Problems, Stay, timeline
from flipproof.errors import DataError

__all__ = ["EHRData", "EHRSet", "mimic3", "physionet2012", "synthetic_ehr"]


def synthetic_ehr(stays: int = 600, *, hours: int = 48, seed: int = 0) -> EHRData:
    """Made-up stays in the same layout, for tests and demonstrations: nothing in them is about anybody.

    A hidden severity drifts from hour to hour and moves every channel away from its normal value, the more the higher
    it is; channels are measured now and then. The label of an hour after the fourth is 1 if the severity, with noise,
    is in its upper part. Six tenths of the stays are training, two validation and two test.

    Args:
        stays: number of stays, at least 10.
        hours: of the longest stay, at least 6; lengths vary from half of it.
        seed: of everything.

    Raises:
        DataError: if asked for fewer.

    Example:
        >>> data = synthetic_ehr(20, hours=10)
        >>> inputs, targets = data.test.batches(2)[0]
        >>> inputs["x"].shape[2], len(data.train), len(targets) == int(inputs["at"].sum())
        (93, 12, True)
    """
    if stays < 10 or hours < LABELS_FROM + 2:
        raise DataError(f"synthetic_ehr makes at least 10 stays of 6 hours, got stays={stays}, hours={hours}")
    random = np.random.default_rng(seed)
    spread = np.array([max(abs(channel.normal), 1.0) * 0.12 for channel in CHANNELS])
    weights = random.choice([-1.0, 1.0], len(CHANNELS)) * random.uniform(0.3, 1.0, len(CHANNELS))
    how_often = random.uniform(0.1, 0.9, len(CHANNELS))
    made = [_stay(f"synthetic-{i}", hours, random, spread, weights, how_often) for i in range(stays)]
    first, second = (6 * stays) // 10, (8 * stays) // 10
    return EHRData.standardised(made[:first], made[first:second], made[second:], Problems())


def _stay(
    name: str,
    hours: int,
    random: np.random.Generator,
    spread: np.ndarray,
    weights: np.ndarray,
    how_often: np.ndarray,
) -> Stay:
    length = int(random.integers(max(hours // 2, LABELS_FROM + 2), hours + 1))
    severity = np.cumsum(random.normal(0, 0.35, length)) + random.normal(0, 1)
    measured = random.random((length, len(CHANNELS))) < how_often
    noise = random.normal(0, 0.7, measured.shape)
    step, channel = np.nonzero(measured)
    time = step.astype(np.float64) + 0.5
    normal = np.array([c.normal for c in CHANNELS])
    away = (severity[:, None] * weights + noise)[step, channel]
    values = normal[channel] + spread[channel] * away
    for i, kind in enumerate(CHANNELS):
        here = channel == i
        if kind.categories:  # the further from normal, the further down the list
            places = np.round((away[here] + 2) / 4 * (len(kind.categories) - 1))
            values[here] = np.clip(places, 0, len(kind.categories) - 1)
        else:
            values[here] = np.clip(values[here], kind.low, kind.high)
    labels = (severity + random.normal(0, 0.6, length) > 1.2).astype(np.float64)
    labels[:LABELS_FROM] = np.nan
    return Stay(name, timeline(time, channel.astype(np.int64), values, length), labels)
