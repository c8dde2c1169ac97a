"""Every estimator held against every single bit: a part of ResNet-20 whose truth is known whole.

    python -m flipproof.reproduce.judged --data-root DATA --out docs/results/exhaustive/judged

The part is the normalisation layers of the last two stages, and the classifier: what can be done whole within an hour.
All of their bits are flipped, one at a time, on the hundred images of `flipproof.reproduce.exhaustive`; then each
estimator is asked for the same rates, with several seeds. It resumes: the truth from its journal.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import nn

from flipproof.analysis.bit_table import BitTable
from flipproof.analysis.exhaustive import inject_all
from flipproof.analysis.factors import estimate_factors
from flipproof.campaigns.assess import assess
from flipproof.campaigns.rates import estimate_rates
from flipproof.errors import FlipproofWarning
from flipproof.faults import RandomBits
from flipproof.reproduce.exhaustive import Batches, subject
from flipproof.reproduce.published import write_table
from flipproof.spaces.sites import Parameters

PART = ("layer2.*bn*", "layer3.*bn*", "linear")
"""Modules whose every bit is flipped."""
SEEDS = 20
ASKED: tuple[tuple[Literal["uniform", "stratified"], float], ...] = (
    ("uniform", 0.01),
    ("stratified", 0.01),
    ("stratified", 0.003),
)
"""How `estimate_rates` samples, and to what margin."""


def truth(model: nn.Module, images: Batches, part: tuple[str, ...], journal: Path, workers: int = 1) -> BitTable:
    """Every bit of these modules, flipped alone."""
    return inject_all(model, images, where=Parameters(include=part), journal=journal, workers=workers)


def judge(model: nn.Module, images: Batches, part: tuple[str, ...], known: BitTable, seeds: int) -> pd.DataFrame:
    """What each estimator says of the same bits and images, beside the truth.

    Returns:
        One row an estimator, seed and tensor (or "all"): `true`, `estimate`, `low`, `high`, `trials`, and `holds`,
        whether the interval does.
    """
    where = Parameters(include=part)
    rates = {str(row["site"]): _harm(row) for _, row in known.sites.iterrows()} | {"all": _harm(known.total)}
    rows = []
    for seed in range(seeds):
        for said in _asked(model, images, where, seed):
            true = rates[said.tensor]
            rows.append({**asdict(said), "seed": seed, "true": true, "holds": said.low <= true <= said.high})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Said:
    """What an estimator says of one rate."""

    estimator: str
    tensor: str
    estimate: float
    low: float
    high: float
    trials: int

    @classmethod
    def of_all(cls, estimator: str, row: pd.Series[Any]) -> Said:
        """Of a row of a summary."""
        estimate, low, high = (float(row[f"critical_total{end}"]) for end in ("", "_low", "_high"))
        return cls(estimator, "all", estimate, low, high, int(row["trials"]))


def _asked(model: nn.Module, images: Batches, where: Parameters, seed: int) -> Iterator[Said]:
    flip = RandomBits(1)
    uniform = assess(model, images, faults=flip, where=where, trials=300, seed=seed)
    yield Said.of_all("assess, 300 trials", uniform.summary.iloc[0])
    for sampling, margin in ASKED:
        found = estimate_rates(model, images, faults=flip, where=where, margin=margin, sampling=sampling, seed=seed)
        yield Said.of_all(f"estimate_rates, {sampling}, ± {100 * margin:g} %", found.table.iloc[0])
    for by in ("search", "injection"):
        factors = estimate_factors(model, images, where=where, margin=0.02, by=by, seed=seed)
        for _, row in factors.iterrows():
            factor, low, high = (float(row[end]) for end in ("factor", "given_low", "given_high"))
            name = f"estimate_factors, by {by}, ± 2 %"
            yield Said(name, str(row["layer"]), factor, low, high, int(row["pairs"]))


def _harm(row: Any) -> float:
    """Critical SDC and DUE, of all answers."""
    return float(row["critical_sdc_rate"] + row["due_rate"])


def summed_up(rows: pd.DataFrame) -> pd.DataFrame:
    """One row an estimator: how often its intervals hold the truth, and how far its estimates lie from it on average.

    `bias` is the mean of estimate − truth, in standard errors of that mean over seeds (and tensors).
    """
    found = []
    for name, part in rows.groupby("estimator", sort=False):
        off = part["estimate"] - part["true"]
        error = float(off.std(ddof=1) / len(off) ** 0.5) if len(off) > 1 else float("nan")
        found.append(
            {
                "estimator": name,
                "estimates": len(part),
                "true, %": f"{100 * part['true'].mean():.3f}",
                "mean estimate, %": f"{100 * part['estimate'].mean():.3f}",
                "bias": f"{off.mean() / error:+.1f}" if error > 0 else "–",
                "intervals that hold": f"{part['holds'].sum()} of {len(part)}",
                "half width, points": f"{100 * (part['high'] - part['low']).mean() / 2:.2f}",
                "trials": f"{part['trials'].mean():,.0f}",
            }
        )
    return pd.DataFrame(found)


def main() -> None:
    """Flip every bit of the part, then ask each estimator."""
    parser = argparse.ArgumentParser(description="Estimators beside every single bit of a part of ResNet-20.")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("results/judged"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="0 flips every bit and asks nobody")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    model, images = subject(chosen.data_root)
    known = truth(model, images, PART, chosen.out / "journal.jsonl", chosen.workers)
    print(known)
    if not chosen.seeds:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlipproofWarning)  # of what where= leaves out, and of few inputs
        rows = judge(model, images, PART, known, chosen.seeds)
    rows.to_csv(chosen.out / "estimates.csv", index=False, float_format="%.6g")
    table = summed_up(rows)
    write_table(table, chosen.out / "estimators", title="Estimators beside every single bit")
    print(table.to_string(index=False))
    print(f"{np.count_nonzero(~rows['holds'])} of {len(rows)} intervals miss the truth")


if __name__ == "__main__":
    main()
