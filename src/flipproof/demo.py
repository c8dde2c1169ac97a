"""`flipproof demo`: the whole chain on a network small enough to train while you wait."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from flipproof.campaigns.assess import assess
from flipproof.campaigns.assessment import Assessment
from flipproof.datasets import digits
from flipproof.faults import BitErrorRate, BitPosition
from flipproof.formats import Float32
from flipproof.models import digits_cnn
from flipproof.models.training import cached, train_classifier
from flipproof.reports.figures import bit_figure, metric_figure, outcome_figure, save
from flipproof.reports.tables import findings
from flipproof.reports.terminal import summary_table
from flipproof.running.data import Data
from flipproof.storage.protect import protect, published

RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
PROTECT_FOR = 3e-2
"""The bit error rate that the demo protects for: 3 of 100 stored bits are wrong."""


def trained_digits_cnn() -> torch.nn.Module:
    """The digits CNN, trained once (seconds) and then read from the cache."""

    def build() -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return digits_cnn()

    def train(model: torch.nn.Module) -> torch.nn.Module:
        return train_classifier(model, digits("train", batch_size=32), epochs=25, lr=2e-3)

    return cached("digits_cnn-1", build, train)


def run_demo(
    out: Path, *, trials: int = 300, workers: int = 1, console: Console | None = None
) -> dict[str, Assessment]:
    """Train, sweep the bit error rate, flip every bit position, and write what came out.

    Args:
        out: folder for journals, CSV tables and figures; a second run resumes from it.
        trials: at each of the seven rates.
        workers: processes.
        console: where to print.

    Returns:
        The assessments: "rates" and "bits" of the model as it came, "before" and "after" protection.
    """
    console = console or Console()
    began = time.perf_counter()
    console.print("[bold]flipproof demo[/]: a CNN for handwritten digits whose float32 weights lose bits")
    model = trained_digits_cnn()
    parameters = sum(p.numel() for p in model.parameters())
    data = digits("test")
    images = sum(len(targets) for _, targets in data)
    console.print(
        f"Model: {parameters:,} parameters = {32 * parameters:,} stored bits. Data: {images} images it never saw.\n"
        "Every trial flips random bits in all parameters, runs all images and restores them.\n"
    )
    run = partial(assess, model, data=data, format=Float32(), workers=workers)
    rates = run(faults=BitErrorRate(RATES), trials=trials, journal=out / "rates.jsonl")
    bits = run(faults=BitPosition(range(32)), journal=out / "bits.jsonl")

    written = [
        rates.to_csv(out / "rates.csv"),
        rates.to_csv(out / "rates-summary.csv", table="summary"),
        bits.to_csv(out / "bits-summary.csv", table="summary"),
        save(metric_figure({"digits CNN, float32": rates}), out / "accuracy.png"),
        save(outcome_figure(rates), out / "outcomes.png"),
        save(bit_figure(bits), out / "bits.png"),
    ]

    console.print(summary_table(rates, title="Random flips at a bit error rate (BER)"))
    for sentence in findings(rates):
        console.print(f"  • {sentence}", markup=False, highlight=False)
    worst = bits.summary.sort_values("accuracy_drop", ascending=False)["point"].head(8).tolist()
    console.print()
    console.print(summary_table(bits, title="One bit position flipped in every parameter: the eight worst", rows=worst))
    for sentence in findings(bits)[1:]:
        console.print(f"  • {sentence}", markup=False, highlight=False)

    sweeps = _protected(model, data, out, trials=max(trials // 10, 5), workers=workers, console=console)
    both = {"float32": sweeps["before"], "same memory, words that heal": sweeps["after"]}
    written.append(save(metric_figure(both), out / "before-after.png"))

    names = ", ".join(path.name for path in written)
    console.print(f"\nWritten to {out}/: rates.jsonl, bits.jsonl (journals; run again to resume), {names}")
    console.print(f"Done in {time.perf_counter() - began:.0f} s. Your own model: flipproof assess --help")
    return {"rates": rates, "bits": bits, **sweeps}


def _protected(
    model: torch.nn.Module, data: Data, out: Path, *, trials: int, workers: int, console: Console
) -> dict[str, Assessment]:
    """Protect the model in the memory that it has, and show what both survive."""
    batches = list(data)
    choosing, judging = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    console.print(f"\n[bold]flipproof protect[/]: the same memory, made to survive a bit error rate of {PROTECT_FOR:g}")
    safe = protect(
        model,
        choosing,
        verify=judging,
        ber=PROTECT_FOR,
        trials=trials,
        front=0,
        rivals={name: published()[name] for name in ("SECDED (72, 64)", "Q15.16, sign vote", "8 bits a channel")},
        journal=out / "protect",
        workers=workers,
    )
    safe.save(out / "protected")
    console.print(str(safe), markup=False, highlight=False)
    sweep = partial(
        assess, model, judging, faults=BitErrorRate((*RATES, 3e-3, 1e-2, 3e-2, 5e-2)), trials=trials, workers=workers
    )
    return {
        "before": sweep(format=Float32(), journal=out / "before.jsonl"),
        "after": sweep(format=safe.formats, journal=out / "after.jsonl"),
    }
