"""What a fault did to each sample: masked, non-critical SDC, critical SDC or DUE (Parchekani et al. 2024, III-A)."""

from __future__ import annotations

import torch
from torch import Tensor

from flipproof.formats.base import bit_pattern
from flipproof.running.judge import Judge, holds_nan


def classify(golden: Tensor, faulty: Tensor, judge: Judge, targets: Tensor) -> Tensor:
    """The outcome of each sample as an index into `OUTCOMES`, int64 (N,).

    Example:
        >>> from flipproof.running.decision import Decision
        >>> from flipproof.running.scales import OUTCOMES
        >>> golden = torch.tensor([[1.0, 0.0]] * 4)
        >>> faulty = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 2.0], [1.0, float("nan")]])
        >>> ended = classify(golden, faulty, Decision.from_golden(golden * 2), torch.zeros(4, dtype=torch.int64))
        >>> [OUTCOMES[i] for i in ended]
        ['masked', 'non_critical_sdc', 'critical_sdc', 'due']
    """
    same = (bit_pattern(golden) == bit_pattern(faulty)).reshape(golden.shape[0], -1).all(dim=1)
    outcome = torch.where(same, 0, torch.where(judge.critical(golden, faulty, targets), 2, 1))
    return torch.where(holds_nan(faulty), 3, outcome)
