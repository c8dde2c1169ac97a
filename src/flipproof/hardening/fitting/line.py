"""Thresholds found by a search along a line: all of a stage's are one factor times where they began.

The loss of a stage as a function of that factor has one variable. It is asked for on values that are kept up to the
stage's first bound (`Prefix`), without gradients: about twelve passes over the rest of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf, isnan
from typing import Any

import pandas as pd
import torch
from scipy.optimize import minimize_scalar

from flipproof.engine.progress import Step, progress_bar
from flipproof.hardening.fitting._prefix import Prefixes
from flipproof.hardening.fitting.calibration import Calibration, DistillationLoss
from flipproof.hardening.fitting.training import (
    Stage,
    StageRun,
    alive,
    from_the_cut,
    mean_of,
    only,
    size_of,
    write,
)
from flipproof.hardening.fitting.work import Work

GRID = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Factors that are tried first: of several dips of the loss, the lowest seen here is followed."""

TOLERANCE = 0.02
"""The factor is found to this, between the neighbours of the best on the grid."""


def lowest(loss: Callable[[float], float], grid: Sequence[float] = GRID, tolerance: float = TOLERANCE) -> None:
    """Ask a loss at all points of a grid, then where its minimum lies between the neighbours of the best of them.

    The second part is Brent's method on an interval (`scipy.optimize.minimize_scalar`): golden section, and parabolas
    where they help.

    Args:
        loss: of one variable; it keeps what it was asked. NaN counts as ∞.
        grid: ascending.
        tolerance: of the variable.

    Example:
        >>> asked = {}
        >>> lowest(lambda x: asked.setdefault(x, (x - 0.437) ** 2))
        >>> round(min(asked, key=asked.get), 1), len(asked) < 15
        (0.4, True)
    """

    def safe(x: float) -> float:
        value = loss(float(x))
        return inf if isnan(value) else value

    values = [safe(x) for x in grid]
    best = values.index(min(values))
    ends = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    if ends[0] < ends[1] and values[best] < inf:
        minimize_scalar(safe, bounds=ends, method="bounded", options={"xatol": tolerance})


def search_stages(
    work: Work, stages: Sequence[Stage], parts: tuple[Calibration, Calibration], loss: DistillationLoss
) -> pd.DataFrame:
    """Search one stage after the other; what an interrupted run has finished is taken from its journal.

    A stage's thresholds become α times what they are, with the α of the lowest loss + γ‖λ‖² among those asked that hold
    the accuracy budget on the part to accept on. If none does, they stay.

    Args:
        work: what is being hardened, with all bounds in place.
        stages: in their order; of their schedule batch size, γ and budget count.
        parts: what to fit on, what to accept on.
        loss: (logits, targets, teacher's logits) → a scalar.

    Returns:
        One row an α: `stage`, `scale`, `loss` (NaN where it was none), `held_out_accuracy` (NaN where it was not asked
        for), `mean_threshold`, `accepted`.
    """
    prefixes = Prefixes(work.model, parts)
    rows: list[dict[str, Any]] = []
    with progress_bar(len(stages), 0, show=work.progress) as step:
        for stage in stages:
            search = partial(_search, work, stage, parts, loss, prefixes, step)
            rows += work.stage(stage.label, stage.bounds, search, step=step, steps=1)
    return pd.DataFrame(rows)


def _search(
    work: Work,
    stage: Stage,
    parts: tuple[Calibration, Calibration],
    loss: DistillationLoss,
    prefixes: Prefixes,
    step: Step,
) -> list[dict[str, Any]]:
    with only(work.model, []), torch.no_grad():
        rows = from_the_cut(stage, prefixes, lambda prefix: _Line(work, stage, parts, loss, prefix).run())
    step(stage.label)
    return rows


class _Line(StageRun):
    """Thresholds as one factor times where they began."""

    def run(self) -> list[dict[str, Any]]:
        """Search, and leave the thresholds that were accepted."""
        began = [threshold.detach().clone() for threshold in self.thresholds]
        reached_at_first = self.start()
        asked: dict[float, tuple[float, float]] = {}

        def move(scale: float) -> None:
            write(self.thresholds, [scale * threshold for threshold in began])

        def loss(scale: float) -> float:
            move(scale)
            penalty = self.stage.schedule.weight_decay * size_of(self.thresholds)
            value = self._loss() + penalty if alive(self.stage.bounds) else inf
            asked[scale] = value, mean_of(self.thresholds)
            return value

        lowest(loss)
        accuracy: dict[float, float] = {1.0: reached_at_first}
        accepted = None
        for scale in sorted(asked, key=lambda scale: asked[scale][0]):
            if not asked[scale][0] < inf:
                break
            move(scale)
            if scale not in accuracy:
                accuracy[scale] = self.accuracy()
            if accuracy[scale] >= self.floor:
                accepted = scale
                break
        if accepted is None:
            write(self.thresholds, began)
        return [
            {
                "stage": self.stage.label,
                "scale": scale,
                "loss": value if value < inf else None,  # journals hold finite numbers; tables show NaN
                "held_out_accuracy": accuracy.get(scale),
                "mean_threshold": mean,
                "accepted": scale == accepted,
            }
            for scale, (value, mean) in asked.items()
        ]

    def _loss(self) -> float:
        """Mean loss over the data to fit on."""
        total, audited = 0.0, self.audited()
        for rows, inputs, targets, teacher in self.fit.ordered(self.stage.schedule.batch_size):
            total += float(self.loss_of(rows, inputs, targets, teacher)) * len(targets)
        self.spend_pass(1.0 - (0.0 if self.prefix is None else self.prefix.share), audited)
        return total / self.fit.samples
