"""`flipproof list`."""

from __future__ import annotations

import inspect
from typing import Annotated

import pandas as pd
import typer

from flipproof import datasets, faults, formats, models, spaces
from flipproof._literals import constructors
from flipproof.cli._console import out
from flipproof.hardening import methods
from flipproof.running.scales import METRICS
from flipproof.storage.codes import code_table
from flipproof.storage.explore import short_name


def command(
    codes: Annotated[
        bool, typer.Option("--codes", help="Instead: the best codes that fit into a memory, found by search.")
    ] = False,
) -> None:
    """Name what can be chosen, a line each: formats, spaces, fault models, hardenings, metrics, models, data sets."""
    if codes:
        _codes()
        return
    for title, package, kind in (
        ("formats", formats, formats.Format),
        ("spaces", spaces, (spaces.Parameters, spaces.Neurons, spaces.Where)),
        ("fault models", faults, faults.FaultModel),
        ("hardenings", methods, methods.Hardening),
    ):
        out.print(f"[bold]{title}[/]")
        for name, thing in constructors(kind, map(package.__dict__.get, package.__all__)).items():
            _line(name, thing)
    for title, place in (("models", models), ("data sets", datasets)):
        out.print(f"[bold]{title}[/]")
        for name in place.__all__:
            if name != "load_weights":
                _line(f"{place.__name__}:{name}", getattr(place, name))
    out.print("[bold]metrics[/]")
    for name in METRICS:
        out.print(f"  {name}", highlight=False)


def _line(name: str, thing: object) -> None:
    said = " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split()).partition(". ")[0]
    line = f"  {name:34} {said}"
    out.print(line if len(line) <= 100 else f"{line[:98]} …", markup=False, highlight=False, soft_wrap=True)


def _codes() -> None:
    """What weights are stored in now, the memory that may be used, and the codes that fit: lines that can be copied."""
    table = code_table()
    shown = pd.DataFrame(
        {
            "stored now": table["stored"],
            "memory": [f"{100 * share:+.0f} %" for share in table["memory"]],
            "bits a value": table["bits"].round(2),
            "repairs": [f"{t} of {line}" for t, line in zip(table["corrects"], table["line"], strict=True)],
            "survives": [f"{rate:.2g}" for rate in table["ber"]],
            "stored as": [
                f"  {short_name(text).replace(', parity=True', '')}" if text else "  nothing fits"
                for text in table["format"]
            ],
        }
    )
    out.print(shown.to_string(index=False), markup=False, highlight=False, soft_wrap=True)
    out.print(
        "\nRepairs: faults a code word of so many bits. Survives: the bit error rate at which 1 of 10,000 code words "
        "is beyond repair. Of all codes of a memory those are shown that no other one beats in precision and rate.",
        markup=False,
        highlight=False,
    )
