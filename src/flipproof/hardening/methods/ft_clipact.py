"""FT-ClipAct: one clipping threshold a layer, found by searching with real faults (Hoang et al. 2020)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from flipproof.campaigns.assess import assess
from flipproof.engine.progress import progress_bar
from flipproof.errors import ConfigError
from flipproof.faults import BitErrorRate
from flipproof.formats import FixedPoint, Format
from flipproof.hardening.bounds.bounded import Bounded, ZeroAbove
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.hardening.fitting.work import Work
from flipproof.hardening.methods.base import HELD_OUT, Hardening, check_fields
from flipproof.spaces.parameters import FaultSpace


@dataclass(frozen=True)
class FTClipAct(Hardening):
    """x if 0 ≤ x ≤ λ else 0, with λ from an interval search scored by the area under accuracy against log10(BER).

    Layer by layer in order of execution: split [0, max] into `points` equal parts, score each end by injecting faults
    into the whole model (thresholds included), keep the interval between the neighbours of the best, and repeat until
    a round gains less than `tolerance`, at most `rounds` times. Every candidate sees the same faults. There is no
    accuracy budget: losing clean accuracy is this method's known weakness; `clean_drop` reports it, judged on samples
    that the search has not seen, and `harden` warns. Published, the largest candidate is the largest value seen:
    `slack=1.0`. By default it is `slack` times that, so that the search can leave unseen inputs alone.

    Args:
        points: candidates a round.
        rounds: at most.
        bers: bit error rates, ascending; those that come to no bit of the model are left out.
        trials: injections for each rate and candidate.
        samples: of the calibration data to score on, drawn at random.
        tolerance: smallest gain in area (a mean accuracy, 0 to 1) that is worth another round.
        format: how parameters are stored while they are hit.
        seed: of samples and faults, and of random parts of the calibration data.
        slack: the largest candidate lies at so many times the largest value seen; 1.0 is the published method. None
            finds the smallest of 1, 1.25, 1.5, 2, 3 … that hardly disturbs samples which the bounds have not seen.
        held_out: share of the calibration data that `harden` keeps to judge on; the search sees nothing of it.

    Example:
        >>> FTClipAct(trials=5).points
        4
    """

    points: int = 4
    rounds: int = 3
    bers: Sequence[float] = (1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5)
    trials: int = 20
    samples: int = 256
    tolerance: float = 1e-3
    format: Format = field(default_factory=FixedPoint)
    seed: int = 0
    slack: float | None = None
    held_out: float = HELD_OUT

    def __post_init__(self) -> None:
        object.__setattr__(self, "bers", tuple(float(ber) for ber in self.bers))
        rising = all(a < b for a, b in zip(self.bers, self.bers[1:], strict=False))
        if min(self.points - 1, self.rounds, self.trials, self.samples) < 1 or self.tolerance < 0 or self.seed < 0:
            raise ConfigError(
                f"FTClipAct needs points ≥ 2, rounds, trials and samples ≥ 1, tolerance and seed ≥ 0, got {self!r}"
            )
        if not self.bers or not rising or not 0 < self.bers[0] <= self.bers[-1] < 1:
            raise ConfigError(f"FTClipAct needs bers that ascend within (0, 1), got {self.bers}")

        check_fields(self)

    def fit(self, work: Work) -> pd.DataFrame:
        bounds = {site.name: bound for site, bound in work.place(ZeroAbove, "layer", self.slack).items()}
        chosen = torch.randperm(work.calibration.samples, generator=torch.Generator().manual_seed(self.seed))
        part = work.calibration.some(chosen[: self.samples])
        bers = self._hitting(work)
        rows: list[dict[str, Any]] = []
        with progress_bar(len(bounds) * self.rounds, 0, show=work.progress) as step:
            for name, bound in bounds.items():
                search = partial(self._search, work, name, bound, part, bers)
                rows += work.stage(name, [bound], search, step=step, steps=0)
                step(name, self.rounds)
        return pd.DataFrame(rows)

    def _hitting(self, work: Work) -> tuple[float, ...]:
        bits = FaultSpace(work.model, format=self.format).bits
        bers = tuple(ber for ber in self.bers if round(ber * bits) > 0)
        if not bers:
            raise ConfigError(
                f"FTClipAct: none of the rates {self.bers} comes to one fault in {bits:,} bits, so no candidate can be "
                f"told from another; use bers above {1 / bits:.0e}"
            )
        if dropped := [ber for ber in self.bers if ber not in bers]:
            work.notes.append(f"FTClipAct left out the rates {dropped}, which come to no fault in {bits:,} bits")
        return bers

    def _search(
        self,
        work: Work,
        name: str,
        bound: Bounded,
        part: Calibration,
        bers: tuple[float, ...],
    ) -> list[dict[str, Any]]:
        """Find the best threshold of one layer; among equals the largest, which costs the least clean accuracy."""
        rows: list[dict[str, Any]] = []
        scores: dict[float, float] = {}
        low, high, before = 0.0, float(bound.threshold), -1.0
        for number in range(1, self.rounds + 1):
            grid = [low + (high - low) * i / self.points for i in range(self.points + 1)]
            for value in grid:
                if value > 0 and value not in scores:
                    with torch.no_grad():
                        bound.threshold.fill_(value)
                    scores[value] = self._area(work, part, bers)
                    rows.append({"stage": name, "round": number, "threshold": value, "area": scores[value]})
            best = max(scores, key=lambda value: (scores[value], value))
            if scores[best] - before < self.tolerance:
                break
            before = scores[best]
            below, above = [v for v in grid if v < best], [v for v in grid if v > best]
            low, high = (below[-1] if below else low), (above[0] if above else high)
        with torch.no_grad():
            bound.threshold.fill_(max(scores, key=lambda value: (scores[value], value)))
        return rows

    def _area(self, work: Work, part: Calibration, bers: tuple[float, ...]) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user was told of rates without effect
            result = assess(
                work.model,
                data=part.batches.pairs,
                faults=BitErrorRate(bers),
                format=self.format,
                trials=self.trials,
                seed=self.seed,
                workers=work.workers,
                output=part.output,
                task=part.task,
                metrics=part.judge.main,
                progress=False,
            )
        work.spend(part, 1.0 + self.trials * len(bers))
        return area(bers, result.summary[part.judge.main].to_numpy())


def area(bers: Sequence[float], accuracy: Any) -> float:
    """Area under accuracy against log10(BER), divided by its width: a mean accuracy.

    Example:
        >>> area([1e-6, 1e-5, 1e-4], [1.0, 1.0, 0.5])
        0.875
    """
    if len(bers) == 1:
        return float(accuracy[0])
    x = np.log10(np.asarray(bers, np.float64))
    return float(np.trapezoid(np.asarray(accuracy, np.float64), x) / (x[-1] - x[0]))
