"""FORTUNE's exploration: how few bits a network can be stored in and still survive (PAPERS: fortune, Algorithm 1)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import nn

from flipproof._interrupts import gives_back
from flipproof.campaigns.assessment import Assessment
from flipproof.errors import ConfigError
from flipproof.faults import BitErrorRate
from flipproof.formats import Affine, Format, TripleMSB
from flipproof.hardening.harden import harden
from flipproof.hardening.methods.base import Hardening
from flipproof.running.data import Data, Output
from flipproof.running.outcomes import DecisionChoice
from flipproof.spaces.sites import Parameters
from flipproof.storage.indicators import rap
from flipproof.storage.study import BASELINE, WEIGHTS, Study

RATES = (1e-5, 3e-5, 1e-4, 3e-4)
"""Bit error rates of the paper's sweep."""


@dataclass(frozen=True)
class Exploration:
    """What was tried, and what it came to.

    Attributes:
        candidates: one row a stored form: `hardening`, `format`, `width`, `weights`, `memory` (stored bits), `coverage`
            (of all that the model stores, see `FaultSpace`), `memory_ratio` and `time_ratio` to unprotected 8 bits
            (time of a forward that decodes packed words, see `pack_`), `accuracy` without faults, `drop` (the largest
            mean drop over the rates, a fraction) with `drop_low` and `drop_high`, `rap`, `feasible`, `front`. A form
            below the accuracy threshold is not injected, as in Algorithm 1: its `drop` is empty.
        rates: one row a stored form and rate: `accuracy_drop` with its interval, `p_drop` (Eq. 6 as printed) and
            `p_drop_published` (with the drop at the highest rate, as the paper's table has it).
        chosen: the narrowest feasible format, None if none is.
        assessments: the campaigns by name, for `compare` and `report`.
    """

    candidates: pd.DataFrame
    rates: pd.DataFrame
    chosen: Format | None
    assessments: dict[str, Assessment]

    def __str__(self) -> str:
        table = self.candidates[["hardening", "format"]].copy()
        table["format"] = table["format"].map(short_name)
        table["accuracy %"] = (100 * self.candidates["accuracy"]).round(2)
        table["drop %"] = (100 * self.candidates["drop"]).round(2)
        table["memory"], table["time"] = (
            self.candidates["memory_ratio"].round(3),
            self.candidates["time_ratio"].round(2),
        )
        table["feasible"], table["front"] = self.candidates["feasible"], self.candidates["front"]
        verdict = (
            f"narrowest feasible: {self.chosen!r}" if self.chosen is not None else "no width meets both thresholds"
        )
        return f"{table.to_string(index=False)}\n{verdict}"


@gives_back
def explore(
    model: nn.Module,
    data: Data,
    *,
    accuracy: float,
    drop: float,
    bits: tuple[int, int] = (3, 8),
    faults: BitErrorRate | None = None,
    protect: Callable[[Format], Format] = TripleMSB,
    axis: Literal[0] | None = None,
    search: Literal["bisection", "exhaustive"] = "bisection",
    formats: Sequence[Format] = (),
    hardenings: Mapping[str, Hardening] | None = None,
    calibration: Data | None = None,
    where: Parameters = WEIGHTS,
    trials: int = 100,
    margin: float | None = None,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    workers: int = 1,
    output: Output = None,
    decision: DecisionChoice = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Exploration:
    """Which stored form of a network is small, accurate and survives (PAPERS: fortune, Algorithm 1 and beyond).

    The bisection tries widths between `bits` and ends with the narrowest whose protected form has an accuracy without
    faults of at least `accuracy` and loses at most `drop` at every rate. (As printed, Algorithm 1 moves by the same
    step in both directions and tests the drop before it has injected; this is its intent.) A width below the accuracy
    threshold is not injected. `search="exhaustive"` tries all widths. Every width that is tried is reported, with the
    unprotected 8-bit form beside it, to which memory and time are relative. Golden accuracy is measured.

    The wide mode adds any `formats`, and all of them again on each of the `hardenings`; the front marks the forms that
    no other one beats in accuracy, drop and memory at once.

    Args:
        model: any module that `assess` takes; stays untouched.
        data: batches `(inputs, targets)` to judge on.
        accuracy: the least accuracy without faults, a fraction.
        drop: the largest mean drop at any rate, a fraction.
        bits: the narrowest and the widest width to try, 2 to 8.
        faults: the rates; the paper's 1e-5 to 3e-4 by default.
        protect: makes the stored form of ``Affine(bits)``: `TripleMSB` is FORTUNE, ``lambda inner: inner`` protects
            nothing.
        axis: see `Affine`.
        search: "bisection" or "exhaustive".
        formats: more stored forms to try, e.g. ``[fp.SECDED(fp.Affine(bits=8))]``.
        hardenings: by name, each combined with every stored form.
        calibration: data for the hardenings, not the data that is judged on.
        where: what counts as memory and is hit. By default the weights alone, as in the paper; ``fp.Parameters()``
            takes everything, what a format does not store in its own type, and charges hardenings for their bounds.
        trials: see `assess`.
        margin: see `assess`.
        seed: of all draws.
        journal: folder of the journals: run again after an interruption and it resumes.
        workers: see `assess`.
        output: see `assess`.
        decision: see `assess`.
        device: see `assess`.
        progress: see `assess`.

    Raises:
        ConfigError: on thresholds outside [0, 1], widths outside 2 to 8, or hardenings without calibration data.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> x = torch.randn(100, 8)
        >>> data = [(x, net(x).argmax(dim=1))]
        >>> rates = fp.BitErrorRate([1e-3, 1e-2])
        >>> found = fp.explore(net, data, accuracy=0.8, drop=0.2, faults=rates, trials=20)
        >>> found.chosen, found.candidates["width"].tolist()
        (TripleMSB(inner=Affine(bits=3, axis=None), copies=2, protect=1), [8, 7, 5])
    """
    low, high = bits
    if not (0 <= accuracy <= 1 and 0 <= drop <= 1):
        raise ConfigError(f"explore takes accuracy and drop as fractions from 0 to 1, got {accuracy} and {drop}")
    if not 2 <= low <= high <= 8:
        raise ConfigError(f"explore takes bits=(narrowest, widest) from 2 to 8, got {bits}")
    if search not in ("bisection", "exhaustive"):
        raise ConfigError(f"search is 'bisection' or 'exhaustive', got {search!r}")
    if hardenings and calibration is None:
        raise ConfigError("explore hardens on calibration= data, which must not be the data that is judged on")
    study = Study(
        *(model, list(data), faults or BitErrorRate(RATES), accuracy, drop, trials, margin, seed),
        *(Path(journal) if journal is not None else None, workers, output, device, progress, where, decision),
    )
    study.try_(BASELINE, full=True)
    feasible: dict[int, bool] = {}
    while (width := _next_width(low, high, feasible, search)) is not None:
        feasible[width] = study.try_(protect(Affine(bits=width, axis=axis)))
    narrowest = min((width for width, good in feasible.items() if good), default=None)
    chosen = None if narrowest is None else protect(Affine(bits=narrowest, axis=axis))
    for extra in formats:
        study.try_(extra, full=True)
    tried = [BASELINE, *(protect(Affine(bits=width, axis=axis)) for width in feasible), *formats]
    for name, method in (hardenings or {}).items():
        assert calibration is not None
        safe = harden(model, method, data=calibration, output=output, decision=decision, progress=progress)
        for format in tried:
            study.try_(format, hardening=name, model=safe, full=True)
    candidates = _finish(pd.DataFrame(study.rows))
    return Exploration(candidates, pd.concat(study.rates, ignore_index=True), chosen, study.assessments)


def short_name(format: str) -> str:
    """The repr of a format without its defaults.

    >>> short_name("TripleMSB(inner=Affine(bits=3, axis=None), copies=2, protect=1)")
    'TripleMSB(Affine(bits=3))'
    """
    for default in ("inner=", ", axis=None", ", block=None", ", copies=2", ", protect=1)"):
        format = format.replace(default, ")" if default.endswith(")") else "")
    return format


def _next_width(low: int, high: int, feasible: Mapping[int, bool], search: str) -> int | None:
    """The width to try after those that were, None at the end.

    >>> _next_width(3, 8, {}, "bisection"), _next_width(3, 8, {5: False}, "bisection"), _next_width(3, 3, {3: True}, "")
    (5, 7, None)
    """
    if search == "exhaustive":
        return next((width for width in range(low, high + 1) if width not in feasible), None)
    low = max((width + 1 for width, good in feasible.items() if not good), default=low)
    high = min((width - 1 for width, good in feasible.items() if good), default=high)
    return (low + high) // 2 if low <= high else None


def _finish(table: pd.DataFrame) -> pd.DataFrame:
    base = table.iloc[0]
    table["memory_ratio"] = table["memory"] / base["memory"]
    table["rap"] = [
        rap(accuracy_drop=100 * drop, memory=memory, time=seconds)
        if drop == drop and seconds == seconds
        else float("nan")
        for drop, memory, seconds in table[["drop", "memory_ratio", "time_ratio"]].to_numpy(float).tolist()
    ]
    table["front"] = _front(table)
    return table


def _front(table: pd.DataFrame) -> list[bool]:
    """True where no other row is as good in accuracy, drop and memory and better in one; never without a drop."""
    rows = table[["accuracy", "drop", "memory"]].to_numpy(float).tolist()
    points = [(-accuracy, drop, bits) for accuracy, drop, bits in rows]
    beaten = [any(q != p and all(x <= y for x, y in zip(q, p, strict=True)) for q in points) for p in points]
    return [p[1] == p[1] and not lost for p, lost in zip(points, beaten, strict=True)]
