"""Analyses that take a while, for `test_module_jobs` to run in another process and kill."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor, nn

import flipproof as fp


class Deep(nn.Module):
    """Six layers that no trace goes through: every question costs a whole forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x)) if float(x.sum()) > -1e9 else -x
        return x


def samples() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(4)
    return [(torch.randn(12, 6), torch.zeros(12))]


def analysis(journal: str | None, workers: int = 1) -> list[pd.DataFrame]:
    found = fp.analyze(Deep(), samples(), journal=journal, workers=workers)
    return [found.layers, found.neurons, found.bits, found.ranges]


def estimate(journal: str | None, workers: int = 1) -> list[pd.DataFrame]:
    return [fp.estimate_factors(Deep(), samples(), margin=0.2, journal=journal, workers=workers)]


VERBS = {"analyze": analysis, "estimate_factors": estimate}
