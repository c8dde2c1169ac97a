"""`flipproof explore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from flipproof.cli.console import out
from flipproof.config import load_data, load_model
from flipproof.errors import ConfigError
from flipproof.faults import BitErrorRate
from flipproof.formats import Affine
from flipproof.reports.figures import save
from flipproof.reports.tradeoff import tradeoff_figure
from flipproof.specs import parse_decision, parse_faults, parse_format, parse_hardening, parse_output
from flipproof.storage.explore import explore as explore_model


def explore(
    model: Annotated[str, typer.Argument(help="MODULE:FACTORY or FILE.py:FACTORY of the model.")],
    data: Annotated[str, typer.Option(help="MODULE:FACTORY or FILE.py:FACTORY that gives batches (inputs, targets).")],
    accuracy: Annotated[float, typer.Option(min=0, max=1, help="Least accuracy without faults, a fraction.")],
    drop: Annotated[float, typer.Option(min=0, max=1, help="Largest mean drop at any rate, a fraction.")],
    weights: Annotated[
        Path | None, typer.Option(help="State dict to load: .safetensors, or .pt/.pth (never unpickled).")
    ] = None,
    bits: Annotated[str, typer.Option(help="Narrowest and widest width, from 2 to 8.")] = "3:8",
    faults: Annotated[str | None, typer.Option(help="Rates, e.g. `BitErrorRate([1e-5, 1e-4])`. [1e-5 to 3e-4]")] = None,
    exhaustive: Annotated[bool, typer.Option(help="Try every width instead of bisecting.")] = False,
    per_channel: Annotated[bool, typer.Option(help="One scale an output channel instead of one a tensor.")] = False,
    format: Annotated[
        list[str] | None, typer.Option(help="Another stored form, e.g. `SECDED(Affine(bits=8))`. Repeatable.")
    ] = None,
    harden: Annotated[list[str] | None, typer.Option(help="A hardening, e.g. `Guard()`. Repeatable.")] = None,
    calibration: Annotated[str | None, typer.Option(help="MODULE:FACTORY of data for the hardenings.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials a rate.")] = 100,
    seed: Annotated[int, typer.Option(help="Of all draws, and of factories that initialise at random.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
    output: Annotated[
        str | None, typer.Option(help="What to judge if it returns more: tuple index, dict key, MODULE:FUNCTION.")
    ] = None,
    decision: Annotated[
        str | None,
        typer.Option(help="How outputs become classes: logits, probabilities, argmax, or a threshold such as 0.3."),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for journals, tables and the figure.")] = Path(
        "flipproof-exploration"
    ),
) -> None:
    """The narrowest protected weights that stay accurate and survive: FORTUNE's Algorithm 1, and the front around it.

    Interrupt it and run it again: it resumes.

    Example: `flipproof explore flipproof.demo:trained_digits_cnn --data "flipproof.datasets:digits('test')"
    --accuracy 0.9 --drop 0.1 --faults "BitErrorRate([1e-4, 1e-3])"`
    """
    try:
        low, high = (int(part) for part in bits.split(":"))
    except ValueError:
        raise ConfigError(f"--bits takes NARROWEST:WIDEST, e.g. 3:8, got {bits!r}") from None
    rates = parse_faults(faults) if faults else None
    if rates is not None and not isinstance(rates, BitErrorRate):
        raise ConfigError(f"--faults of explore takes a BitErrorRate, got {faults!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = load_model(model, weights)
        batches = load_data(data)
        known = load_data(calibration) if calibration else None
    found = explore_model(
        network,
        batches,
        accuracy=accuracy,
        drop=drop,
        bits=(low, high),
        faults=rates,
        axis=0 if per_channel else None,
        search="exhaustive" if exhaustive else "bisection",
        formats=[parse_format(text) for text in format or ()],
        hardenings={text: parse_hardening(text) for text in harden or ()},
        calibration=known,
        trials=trials,
        seed=seed,
        journal=folder / "journals",
        workers=workers,
        output=parse_output(output),
        decision=parse_decision(decision),
    )
    found.candidates.to_csv(folder / "candidates.csv", index=False)
    found.rates.to_csv(folder / "rates.csv", index=False)
    save(tradeoff_figure(found), folder / "tradeoff.png")
    unprotected = repr(Affine(bits=8))
    out.print(str(found), markup=False, highlight=False)
    out.print(f"Memory and time are relative to {unprotected}. Written to {folder}/", markup=False, highlight=False)
