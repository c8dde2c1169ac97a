"""Areas under curves of ranked scores.

Scores are ranked before torchmetrics sees them: an area depends on order alone, and torchmetrics would send values
outside [0, 1] through a float32 sigmoid that ties everything above 17.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flipproof.errors import MetricError


def area_of(name: str, scores: Tensor, positive: Tensor, nan: Tensor, what: str) -> float:
    """Area under the ROC curve ("auroc"), or under the precision-recall curve as a step function ("average_precision").

    A sample whose answer holds a NaN ranks worst: a positive below, a negative above everything else.

    Args:
        name: which of the two.
        scores: (N,).
        positive: whether the sample is one, bool (N,).
        nan: whether its answer holds a NaN, bool (N,).
        what: the positives, for the error.

    Raises:
        MetricError: if no sample is positive, or all are.
    """
    from torchmetrics.functional import classification

    if not bool(positive.any()) or bool(positive.all()):
        raise MetricError(
            f"{name} is undefined: {int(positive.sum())} of {len(positive)} targets are of {what}. Use data with every "
            f"class that the model tells apart, or leave this metric out of metrics="
        )
    ranks = 1 + torch.unique(torch.where(nan, 0.0, scores), return_inverse=True)[1]
    ranks = torch.where(nan, torch.where(positive, 0, ranks.max() + 1), ranks)  # worst, even beyond infinite scores
    shares = ranks.to(torch.float64) / int(ranks.max())
    if name == "auroc":
        return float(classification.binary_auroc(shares, positive.to(torch.int64)))
    return float(classification.binary_average_precision(shares, positive.to(torch.int64)))
