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

RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)


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
        The two assessments, "rates" and "bits".
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

    names = ", ".join(path.name for path in written)
    console.print(f"\nWritten to {out}/: rates.jsonl, bits.jsonl (journals; run again to resume), {names}")
    console.print(f"Done in {time.perf_counter() - began:.0f} s. Your own model: flipproof assess --help")
    return {"rates": rates, "bits": bits}
