"""How far the fault-free numbers can be off because the test samples are only some of all there could be."""

from __future__ import annotations

from math import exp, isnan, log

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from flipproof.campaigns.statistics import Interval, mean_interval, unseen_share, wilson_interval
from flipproof.running.decision import Decision
from flipproof.running.judge import Judge
from flipproof.running.metrics import Metric

RESAMPLES = 200
_CELLS = 2_000_000
"""So many weights are in memory at once."""


def golden_interval(
    metric: Metric, golden: Tensor, targets: Tensor, judge: Judge, confidence: float
) -> Interval | None:
    """Interval of a fault-free metric over samples.

    Shares of right answers: Wilson's. Means over samples of a quality between 0 and 1: `mean_interval`.
    AUROC and average precision: symmetric on the logit scale, mean ± z standard errors of 200
    seeded resamplings of the samples within each class; for a perfect ranking, that a share q (`unseen_share` of the
    smallest class) of its samples could be ranked last. None for any other metric: what it means for a single sample
    is not known.

    Example:
        >>> import torch
        >>> outputs, targets = torch.tensor([0.1, 0.4, 0.35, 0.8] * 10), torch.tensor([0, 0, 1, 1] * 10)
        >>> found = golden_interval(Metric("auroc"), outputs, targets, Decision.from_golden(outputs), 0.95)
        >>> [round(end, 2) for end in found]
        [0.55, 0.88]
    """
    if not isinstance(metric.function, str):
        return None
    if metric.scale.per_sample:
        right = int(judge.correct(golden, targets, golden).sum())
        return wilson_interval(right, len(targets), confidence=confidence)
    if metric.function == judge.main:
        low, high = mean_interval(judge.quality(golden, targets, golden).numpy(), confidence=confidence, bounds=(0, 1))
        return None if isnan(low) else (low, high)
    if not isinstance(judge, Decision):
        return None
    found = metric.measure(golden, targets, judge, golden)
    labels = targets.numpy()
    if found >= 1:
        counts = np.bincount(labels)
        return (1 - unseen_share(int(counts[counts > 0].min()), confidence), 1.0)
    scores = judge.scores(golden).numpy()
    columns = [(1, scores)] if scores.ndim == 1 else [(label, scores[:, label]) for label in range(scores.shape[1])]
    rng = np.random.default_rng(0)
    drawn = []
    for start in range(0, RESAMPLES, part := max(1, _CELLS // len(labels))):
        weights = _resampled(labels, min(part, RESAMPLES - start), rng)
        areas = [_areas(column, labels == label, weights, metric.function) for label, column in columns]
        drawn.append(np.mean(areas, axis=0))
    error = float(np.concatenate(drawn).std(ddof=1))
    if found <= 0 or error == 0:
        return None
    step = float(stats.norm.ppf((1 + confidence) / 2)) * error / (found * (1 - found))
    middle = log(found / (1 - found))
    return (1 / (1 + exp(step - middle)), 1 / (1 + exp(-step - middle)))


def _resampled(labels: NDArray[np.int64], times: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each sample is drawn, (times, N); each class keeps its size."""
    weights = np.empty((times, len(labels)))
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        weights[:, own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=times)
    return weights


def _areas(
    scores: NDArray[np.float64], positive: NDArray[np.bool_], weights: NDArray[np.float64], name: str
) -> NDArray[np.float64]:
    """AUROC or average precision of samples with weights (B, N), one value a row of weights."""
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    firsts = np.flatnonzero(np.r_[True, falling[1:] != falling[:-1]])
    hits = np.add.reduceat(weights[:, order] * positive[order], firsts, axis=1)
    others = np.add.reduceat(weights[:, order] * ~positive[order], firsts, axis=1)
    below, found = np.cumsum(others, axis=1), np.cumsum(hits, axis=1)
    positives, negatives = found[:, -1], below[:, -1]
    if name == "auroc":
        won = hits * (negatives[:, None] - below + others / 2)
        return np.asarray(won.sum(axis=1) / (positives * negatives))
    precision = found / np.maximum(found + below, 1)
    return np.asarray((hits * precision).sum(axis=1) / positives)
