"""Shares of critical flips of a layer, a bit and a neuron: the audited estimate and its interval."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from flipproof.analysis.audit import ASKED, CRITICAL, HARMLESS, LEFT, WRONG, correction, distances
from flipproof.analysis.layer import LayerVulnerability
from flipproof.campaigns.statistics import mean_interval

CONFIDENCE = 0.95


class Share(NamedTuple):
    """An estimate between its bounds."""

    value: float
    low: float
    high: float


def layer_factor(layer: LayerVulnerability, bit: int | None = None) -> Share:
    """LVF, or BVF of one bit, with an interval over inputs, over neurons if not all were analysed, and over the audit.

    The three parts are independent; distances to the bounds add as squares.
    """
    inputs = int(layer.inputs.sum())
    bits = slice(None) if bit is None else slice(bit, bit + 1)
    column = -1 if bit is None else bit
    critical, audit = layer.critical[:, bits].double(), layer.audit[..., bits]
    flips = critical.numel() * inputs
    value = (float(critical.sum()) + float(correction(audit).sum())) / flips
    below, above = (off / flips for off in distances(audit, confidence=CONFIDENCE))
    over_inputs = float(t_of_powers(layer.powers[:, column].numpy(), inputs))
    low, high = np.hypot(below, over_inputs), np.hypot(above, over_inputs)
    if layer.neurons.numel() < layer.total:
        shares = critical.mean(dim=1).numpy() / inputs
        over_neurons = mean_interval(shares, confidence=CONFIDENCE, bounds=(0.0, 1.0))
        mean = float(shares.mean())
        low, high = np.hypot(low, mean - over_neurons[0]), np.hypot(high, over_neurons[1] - mean)
    return Share(_inside(value), _inside(value - low), _inside(value + high))


def neuron_factors(layer: LayerVulnerability) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """NVF of every analysed neuron, and its bounds over inputs and over the audit of its layer."""
    inputs, flips = int(layer.inputs.sum()), int(layer.inputs.sum()) * layer.width
    totals = layer.audit.sum(dim=(0, 3)).double()
    rates = (totals[WRONG] / totals[ASKED].clamp(min=1))[[HARMLESS, CRITICAL]]
    left = layer.left.double()
    value = (layer.critical.sum(dim=1) + left @ (rates * torch.tensor([1.0, -1.0]))).numpy() / flips
    sums = layer.critical.double().mean(dim=1)
    over_inputs = t_of_powers(np.stack([sums.numpy(), layer.squares.numpy()]), inputs)
    below, above = np.zeros_like(value), np.zeros_like(value)
    for column, kind in enumerate((HARMLESS, CRITICAL)):
        alone = torch.zeros_like(layer.audit)
        alone[:, :, kind] = layer.audit[:, :, kind]
        share = left[:, column].numpy() / max(float(totals[LEFT, kind]), 1.0) / flips
        off = distances(alone, confidence=CONFIDENCE)
        below, above = np.hypot(below, off[0] * share), np.hypot(above, off[1] * share)
    bounds = (value - np.hypot(below, over_inputs), value + np.hypot(above, over_inputs))
    return value.clip(0.0, 1.0), bounds[0].clip(0.0, 1.0), bounds[1].clip(0.0, 1.0)


def t_of_powers(powers: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Half of Student's t interval of a mean from the sums of values and of their squares, (2, …).

    inf for fewer than two values, which say nothing.

    Example:
        >>> x = np.array([1.0, 2.0, 4.0])
        >>> float(t_of_powers(np.array([x.sum(), (x**2).sum()]), 3).round(4))
        3.7946
    """
    if count < 2:
        return np.full(powers.shape[1:], np.inf)
    variance = np.maximum(powers[1] - powers[0] ** 2 / count, 0.0) / (count - 1)
    half: NDArray[np.float64] = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * np.sqrt(variance / count)
    return half


def _inside(value: float) -> float:
    return float(min(max(value, 0.0), 1.0))
