"""What a search decided without asking, asked after all at random: how often it was wrong, and what factors then are.

Two phases (Cochran, Sampling Techniques, 3rd ed. 1977, ch. 12): the search decides every bit flip, most of them from an
assumption; of what it did not try, a random sample is injected. The factor is then

    (flips called critical + Σ_b left_harmless,b · wrong_harmless,b / asked_harmless,b
                           − Σ_b left_critical,b · wrong_critical,b / asked_critical,b) / all flips

over bit positions b, which is unbiased whatever the search assumed. Flips whose harmlessness is proved (a closed ReLU
gives the same bits) are a stratum of their own: they are asked too, but where nothing was found wrong there, nothing is
unsure.
"""

from __future__ import annotations

from math import inf

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

TRIED, HARMLESS, CRITICAL, PROVEN = -1, 0, 1, 2
"""What a search made of a flip: it asked, it called it harmless or critical unasked, or it could prove it harmless."""

LEFT, ASKED, WRONG = 0, 1, 2

_SIGNS = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
"""A flip wrongly called harmless is one more critical flip, one wrongly called critical one less."""


def counted(left: Tensor, asked: Tensor, wrong: Tensor) -> Tensor:
    """How many flips were left untried, asked after all, and decided wrongly: int64 (3, decisions, bits).

    Args:
        left: the decision about each flip, (pairs, bits).
        asked: which were injected, bool (pairs, bits).
        wrong: and which of these contradicted the search, bool (pairs, bits).

    Example:
        >>> left = torch.tensor([[TRIED, HARMLESS], [HARMLESS, CRITICAL]])
        >>> counted(left, left == HARMLESS, torch.tensor([[False, True], [False, False]]))[:, HARMLESS].tolist()
        [[1, 1], [1, 1], [0, 1]]
    """
    rows = [[(which & (left == kind)).sum(dim=0) for kind in range(3)] for which in (left != TRIED, asked, wrong)]
    return torch.stack([torch.stack(row) for row in rows]).cpu()


def correction(counts: Tensor) -> Tensor:
    """Critical flips that the search is expected to have missed, by bit; negative where it called too many critical.

    A bit position of which nothing was asked takes the rate of all positions with the same decision.

    Args:
        counts: of `counted`, (3, decisions, bits), or several of them, (strata, 3, decisions, bits).

    Returns:
        float64 (bits,).

    Example:
        >>> counts = torch.zeros(3, 3, 2, dtype=torch.int64)
        >>> counts[:, HARMLESS] = torch.tensor([[100, 40], [10, 20], [1, 0]])  # 1 of 10 asked was critical, of 100
        >>> correction(counts).tolist()
        [10.0, 0.0]
    """
    stratum = counts.reshape(-1, *counts.shape[-3:]).double()
    left, asked, wrong = stratum.unbind(dim=1)
    pooled = wrong.sum(dim=2, keepdim=True) / asked.sum(dim=2, keepdim=True).clamp(min=1)
    rate = torch.where(asked > 0, wrong / asked.clamp(min=1), pooled)
    return (left * rate * _SIGNS[:, None]).sum(dim=(0, 1))


def distances(counts: Tensor, *, confidence: float = 0.95) -> tuple[float, float]:
    """How many critical flips fewer, and more, than `correction` says there may be.

    Clopper and Pearson's bounds of both error rates, with the finite population allowed for: where all that was left
    was asked, nothing is unsure. What was called harmless can only add flips, what was called critical only take some
    away.

    Args:
        counts: of one bit or of all, (3, decisions, bits) or (strata, 3, decisions, bits).
        confidence: two-sided.

    Example:
        >>> counts = torch.zeros(3, 3, 1, dtype=torch.int64)
        >>> counts[:, HARMLESS, 0] = torch.tensor([1000, 100, 0])
        >>> [round(flips, 1) for flips in distances(counts)]  # 0 of 100: up to 3.3 % of the 1000
        [0.0, 32.7]
    """
    left, asked, wrong = counts.reshape(-1, *counts.shape[-3:]).sum(dim=(0, 3))[:, :PROVEN].tolist()
    below_h, above_h = _off(left[HARMLESS], asked[HARMLESS], wrong[HARMLESS], confidence)
    below_c, above_c = _off(left[CRITICAL], asked[CRITICAL], wrong[CRITICAL], confidence)
    return float(np.hypot(below_h, above_c)), float(np.hypot(above_h, below_c))


def _off(left: int, asked: int, wrong: int, confidence: float) -> tuple[float, float]:
    """How far below and above left · wrong / asked the number of wrong flips may be."""
    if asked == left:
        return 0.0, 0.0
    if not asked:
        return 0.0, float(left)
    rate, tail = wrong / asked, (1 - confidence) / 2
    size = asked * (left - 1) / (left - asked)  # of a sample without a finite population that says as much
    hits = rate * size
    low = float(stats.beta.ppf(tail, hits, size - hits + 1)) if wrong else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, size - hits)) if wrong < asked else 1.0
    return left * (rate - low), left * (high - rate)


def signed(left: Tensor, wrong: Tensor, rate: float) -> Tensor:
    """What the wrong decisions that were found add to each flip's answer if each was asked with probability `rate`.

    Horvitz and Thompson's estimate, for variances over groups of flips: ± 1 ÷ rate where the search was wrong, else 0.
    """
    return wrong * _SIGNS.to(wrong.device)[left.clamp(min=0).long()] / rate


def t_distance(values: NDArray[np.float64], confidence: float) -> float:
    """Half of Student's t interval of a mean; inf for fewer than two values, which say nothing."""
    if values.size < 2:
        return inf
    return float(stats.t.ppf((1 + confidence) / 2, values.size - 1) * values.std(ddof=1) / values.size**0.5)
