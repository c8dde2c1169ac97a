"""`flipproof harden`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from flipproof.cli.console import out
from flipproof.config import called, load_model
from flipproof.hardening import files
from flipproof.hardening.harden import harden as harden_model
from flipproof.hardening.overhead import overhead
from flipproof.hardening.report import hardening_report
from flipproof.reports.bounds import history_figure
from flipproof.reports.figures import save
from flipproof.specs import load_object, parse_decision, parse_hardening, parse_output


def harden(
    model: Annotated[str, typer.Argument(help="MODULE:FACTORY or FILE.py:FACTORY of the model.")],
    data: Annotated[
        str,
        typer.Option(help="MODULE:FACTORY of calibration batches (inputs, targets): training data, never test data."),
    ],
    method: Annotated[
        str,
        typer.Option(help="`Guard()`, `AVC()`, `Ranger(per='neuron')`, `FTClipAct()`, `FitAct()`, `ProAct.quick()`."),
    ] = "Guard()",
    weights: Annotated[
        str | None, typer.Option(help="State dict to load: .safetensors, or .pt/.pth (never unpickled).")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(help="What to judge if it returns more: tuple index, dict key, MODULE:FUNCTION."),
    ] = None,
    decision: Annotated[
        str | None,
        typer.Option(help="How outputs become classes: logits, probabilities, argmax, or a threshold such as 0.3."),
    ] = None,
    seed: Annotated[int, typer.Option(help="For factories that initialise at random.")] = 0,
    strict: Annotated[bool, typer.Option(help="Fail if an activation cannot be bounded, instead of warning.")] = False,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the hardened model and the report.")] = Path(
        "flipproof-hardened"
    ),
) -> None:
    """Bound a model's activations, so that faulty values are cut off where they arise.

    Writes OUT/hardened.safetensors, OUT/activations.csv (what is bounded and what is not) and, for methods that search
    or train, OUT/history.csv and .png and the finished layers in OUT/stages: run the same command again to resume.

    Then: `flipproof assess MODEL --hardened OUT/hardened.safetensors …`, or `fp.load_hardened(model, file)` in Python.

    Example: `flipproof harden flipproof.demo:trained_digits_cnn --data "flipproof.datasets:digits('train')"`
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = load_model(model, weights)
        batches = list(called(load_object(data)))
    safe = harden_model(
        network,
        parse_hardening(method),
        data=batches,
        strict=strict,
        output=parse_output(output),
        decision=parse_decision(decision),
        journal=folder / "stages",
    )
    report = hardening_report(safe)
    files.save_hardened(safe, folder / "hardened.safetensors")
    report.table().to_csv(folder / "activations.csv", index=False)
    if not report.history.empty:
        report.history.to_csv(folder / "history.csv", index=False)
        save(history_figure(report), folder / "history.png")
    costs = overhead(network, safe)
    out.print(str(report), markup=False, highlight=False, soft_wrap=True)
    out.print(
        f"Memory: {report.thresholds:,} thresholds beside {report.parameters:,} parameters, "
        f"{costs.memory_percent:.3g} % more. "
        + ("" if costs.time_ratio is None else f"Time: {costs.time_ratio:.2f} × a plain forward. ")
        + f"Search: {report.forwards:,.0f} forward-equivalents of the calibration data.",
        highlight=False,
    )
    out.print(f"Accuracy lost without faults, on held-out data: {100 * report.clean_drop:.2f} points", highlight=False)
    out.print(f"Written to {folder}/: hardened.safetensors, activations.csv", highlight=False)
