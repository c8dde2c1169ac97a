"""The front as a result: what repaired words survive at which memory, against every published form and against bounds.

Not of a paper: it is what flipproof claims. Five networks, each at three memories and rates; the claims are goals that
were set before anything was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from rich.console import Console

from flipproof.campaigns.assess import assess, on_demand
from flipproof.errors import ConfigError, ModelError
from flipproof.faults import BitErrorRate
from flipproof.formats import BCH, Affine, FixedPoint, Float32
from flipproof.hardening.harden import harden
from flipproof.hardening.methods import Fence, Guard, Hardening, ProAct, Ranger
from flipproof.reports.figures import metric_figure, save
from flipproof.reports.front import front_figure
from flipproof.reproduce.protection_networks import NETWORKS, Trained, trained
from flipproof.reproduce.published import slug, write_table
from flipproof.storage.codes import capacity, cheapest, shannon_ratio
from flipproof.storage.protect import KEPT, Protection, protect, published
from flipproof.storage.survival import LADDER, survived

SUMMARY = "What repaired words survive at which memory, on five networks, against published forms and bounds"

GOALS = {0.0: (5e-2, 0.99), -0.5: (3e-2, 0.99), -0.75: (1e-2, 0.97)}
"""Extra memory → (bit error rate, share of the fault-free accuracy that is to be kept)."""

LIMIT_RATE, LIMIT_RATIO = 1e-2, 1.25
"""Blocks of 512 bits are to come within this ratio of the Shannon limit at this rate."""

TIMES = 10.0
"""So many times the rate of any published form of equal memory is to be survived."""

NETWORKS_OF = {"smoke": tuple(NETWORKS), "paper": tuple(NETWORKS)}
SAMPLES = {"smoke": 2000, "paper": 8000}
TRIALS = {"smoke": 10, "paper": 100}

WHOLE = {"smoke": ("resnet20", "compact_cnn", "vit", "gpt"), "paper": tuple(NETWORKS)}
"""Networks for which every rival is injected and the front is looked for; of the others the goals are measured."""

STRONGEST = (
    "WBC, bit 30",
    "MSET",
    "CEP D3P1",
    "SECDED in the word",
    "Q15.16, sign vote",
    "8 bits a channel",
    "8 bits, in-place ECC",
    "FORTUNE P-4",
)
"""At the scale `smoke`, rivals on networks other than the first: those that survive most at their memory."""

BOUNDED = {"smoke": ("resnet20",), "paper": ("resnet20", "resnet56", "compact_cnn")}
"""Networks of ReLUs, whose activations the papers bound."""

BOUNDS: dict[str, Callable[[], Hardening]] = {
    "Guard": Guard,
    "Fence": Fence,
    "Ranger a neuron": partial(Ranger, per="neuron"),
    "ProAct along a line": ProAct.searched,
}
"""Bounded activations, around values that are stored in Q15.16 and nothing else."""

RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 5e-2)
"""Of the before and after picture."""


def reproduce(
    *, scale: Literal["smoke", "paper"], data_root: Path, out: Path, workers: int, console: Console
) -> pd.DataFrame:
    """Run it. Interrupted, it resumes from `out`/journals.

    Returns:
        One row a network and goal.

    Raises:
        DataError: if data sets or checkpoints are not under `data_root`.
        ConfigError: if the scale is unknown.
    """
    if scale not in TRIALS:
        raise ConfigError(f"scale is 'smoke' or 'paper', got {scale!r}")
    goals, fronts, evidence, limits = [], [], [], []
    for name in NETWORKS_OF[scale]:
        console.print(f"[bold]{name}[/]")
        subject = trained(name, data_root, samples=SAMPLES[scale])
        folder = out / "journals" / name
        for memory, (ber, kept) in GOALS.items():
            whole = memory == 0.0 and name in WHOLE[scale]
            found = _protected(name, subject, memory, ber, whole=whole, scale=scale, folder=folder, workers=workers)
            console.print(str(found), markup=False, highlight=False)
            goals.append(_goal(name, memory, ber, kept, found))
            evidence.append(found.evidence.assign(network=name, goal=f"{100 * memory:+.0f} % at {ber:g}"))
            if whole:
                front = found.front
                if name in BOUNDED[scale]:
                    more = _bounded(subject, found, scale, folder)
                    front = pd.concat([front, more], ignore_index=True)
                fronts.append(front.assign(network=name))
                save(front_figure(front, kept=found.kept), out / f"front-{slug(name)}.png")
            if whole and name == NETWORKS_OF[scale][0]:
                _before_and_after(name, subject, found, out, scale, folder, workers)
        limits.append(_limit(name, subject, scale, folder, workers))
    return _tables(pd.DataFrame(goals), pd.concat(fronts), pd.concat(evidence), pd.DataFrame(limits), out, console)


def _protected(
    name: str,
    subject: Trained,
    memory: float,
    ber: float,
    *,
    whole: bool,
    scale: str,
    folder: Path,
    workers: int,
) -> Protection:
    every = published()
    if scale == "smoke" and name != NETWORKS_OF[scale][0]:
        every = {rival: every[rival] for rival in STRONGEST}
    return protect(
        subject.model,
        subject.calibration,
        verify=subject.test,
        ber=ber,
        memory=memory,
        rivals=every if whole else {},
        hardenings={},
        trials=TRIALS[scale],
        front=SAMPLES[scale] if whole else 0,
        journal=folder,
        workers=workers,
    )


def _goal(network: str, memory: float, ber: float, kept: float, found: Protection) -> dict[str, Any]:
    """Whether so much of the fault-free accuracy is kept, over the trials."""
    row = found.evidence[found.evidence["form"] == "protected"].iloc[0]
    low = max(float(row["accuracy_low"]), found.certain)
    wanted = kept * found.golden
    return {
        "network": network,
        "goal": f"{100 * memory:+.0f} % memory at {ber:g}",
        "memory": float(row["memory"]),
        "float": found.golden,
        "clean": float(row["clean"]),
        "accuracy": float(row["accuracy"]),
        "low": low,
        "high": float(row["accuracy_high"]),
        "samples_low": float(row["accuracy_samples_low"]),
        "samples_high": float(row["accuracy_samples_high"]),
        "kept": float(row["accuracy"]) / found.golden,
        "wanted": kept,
        "certain": found.certain,
        "detected": float(row["detected"]),
        "miscorrected": float(row["miscorrected"]),
        "time": float(row["time"]),
        "met": "yes" if low >= wanted else "no" if float(row["accuracy_high"]) < wanted else "cannot be told",
    }


def _bounded(subject: Trained, found: Protection, scale: str, folder: Path) -> pd.DataFrame:
    """The highest rate that bounded activations survive; all parameters and bounds are hit, in Q15.16."""
    rows = []
    now = sum(p.numel() for p in subject.model.parameters())
    for name, method in BOUNDS.items():
        try:
            safe = harden(
                subject.model,
                method(),
                data=subject.calibration,
                journal=folder / f"{slug(name)}.jsonl",
                progress=False,
            )
        except (ConfigError, ModelError):  # a network without activations that the method knows
            continue
        with on_demand(
            safe,
            subject.test,
            format={"*": FixedPoint()},
            faults=BitErrorRate(LADDER, exact=False),
            trials=TRIALS[scale],
            journal=folder / f"bounds-{slug(name)}.jsonl",
        ) as ask:
            reached = survived(ask, found.metric, found.least, found.golden, TRIALS[scale])
        memory = sum(p.numel() for p in safe.parameters()) / now - 1
        rows.append(
            {
                "form": f"Q15.16 + {name}",
                "ours": False,
                "memory": memory,
                "ber": reached.ber,
                "accuracy": reached.accuracy,
                "next": reached.next,
            }
        )
    return pd.DataFrame(rows)


def _before_and_after(
    network: str, subject: Trained, found: Protection, out: Path, scale: str, folder: Path, workers: int
) -> None:
    """Accuracy against the rate: float32 as it came, and the same memory in words that heal."""
    sweeps = {}
    # trials of repaired words cost no forward, and only many that agree say much
    for name, formats, times in (("float32, as it came", Float32(), 2), ("protected, same memory", found.formats, 10)):
        sweeps[name] = assess(
            subject.model,
            subject.test,
            format=formats,
            faults=BitErrorRate(RATES, exact=False),
            trials=times * TRIALS[scale],
            journal=folder / f"sweep-{slug(name)}.jsonl",
            workers=workers,
            progress=False,
        )
    save(metric_figure(sweeps), out / f"before-after-{slug(network)}.png")


def _limit(network: str, subject: Trained, scale: str, folder: Path, workers: int) -> dict[str, Any]:
    """Five bits a weight in blocks of 512 stored bits, as near to the limit as the goal asks for."""
    code = BCH(Affine(bits=5, axis=0), t=14, block=385)
    weights = {
        name: code
        for name, parameter in subject.model.named_parameters()
        if parameter.dim() >= 2 and parameter.numel() >= code.together and "weight" in name
    }
    rest = {
        name: cheapest(Float32(), LIMIT_RATE, 1e-6, words=parameter.numel()) or Float32()
        for name, parameter in subject.model.named_parameters()
        if name not in weights
    }
    found = assess(
        subject.model,
        subject.test,
        format={**weights, **rest},
        faults=BitErrorRate(LIMIT_RATE, exact=False),
        trials=TRIALS[scale],
        journal=folder / "limit.jsonl",
        workers=workers,
        progress=False,
    )
    row = found.summary.iloc[0]
    return {
        "network": network,
        "code": repr(code),
        "bits a weight": code.layout(code.together).bits / code.together,
        "limit": 5 / capacity(LIMIT_RATE),
        "ratio": shannon_ratio(code, LIMIT_RATE),
        "clean": found.golden["accuracy"],
        "accuracy": float(row["accuracy"]),
        "low": float(row["accuracy_low"]),
        "high": float(row["accuracy_high"]),
        "detected blocks": float(row["detected"]),
        "miscorrected blocks": float(row["miscorrected"]),
    }


def _tables(
    goals: pd.DataFrame, fronts: pd.DataFrame, evidence: pd.DataFrame, limits: pd.DataFrame, out: Path, console: Console
) -> pd.DataFrame:
    write_table(goals, out / "goals", title="Share of the fault-free accuracy that is kept under faults")
    write_table(
        fronts, out / "front", title=f"Highest bit error rate with {100 * KEPT:.0f} % of the fault-free accuracy"
    )
    write_table(evidence, out / "evidence", title="Every form at the rate of each goal")
    write_table(limits, out / "limit", title=f"Five bits a weight in blocks of 512 bits, bit error rate {LIMIT_RATE:g}")
    claims = [
        {"claim": f"{row['network']}: {100 * row['wanted']:.0f} % kept at {row['goal']}", "holds": row["met"]}
        for row in goals.to_dict("records")
    ]
    for network, table in fronts.groupby("network", sort=False):
        claims += _ahead(str(network), table)
    for row in limits.to_dict("records"):
        near = f"{row['ratio']:.3f} of the limit, {row['detected blocks']:.1f} blocks lost a trial"
        claims.append(
            {
                "claim": f"{row['network']}: 512 bits within {LIMIT_RATIO} × the limit at {LIMIT_RATE:g}: {near}",
                "holds": "yes" if row["ratio"] <= LIMIT_RATIO and row["low"] >= KEPT * row["clean"] else "no",
            }
        )
    table = pd.DataFrame(claims)
    write_table(table, out / "claims", title="What holds")
    console.print(table.to_string(index=False), markup=False, highlight=False)
    return goals


def _ahead(network: str, front: pd.DataFrame) -> list[dict[str, str]]:
    """For each rival: the rate that we survive with no more memory ÷ the rate that it survives."""
    ours = front[front["ours"]]
    claims = []
    for row in front[~front["ours"]].to_dict("records"):
        fair = ours[ours["memory"] <= row["memory"] + 1e-9]
        if row["form"] == "as it came" or fair.empty:
            continue
        best = float(fair["ber"].max())
        ratio = float("inf") if row["ber"] == 0 else best / row["ber"]
        claims.append(
            {
                "claim": f"{network}: ≥ {TIMES:g} × the rate of {row['form']} ({100 * row['memory']:+.1f} %): "
                f"{best:g} against {row['ber']:g}, {ratio:.3g} ×",
                "holds": "yes" if ratio >= TIMES else "no",
            }
        )
    return claims
