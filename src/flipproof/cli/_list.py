"""`flipproof list`."""

from __future__ import annotations

import inspect

from flipproof import datasets, faults, formats, models, spaces
from flipproof._literals import constructors
from flipproof.cli._console import out
from flipproof.hardening import methods
from flipproof.running.scales import METRIC_NAMES


def command() -> None:
    """Name what can be chosen, a line each: formats, spaces, fault models, hardenings, metrics, models, data sets."""
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
    for name in METRIC_NAMES:
        out.print(f"  {name}", highlight=False)


def _line(name: str, thing: object) -> None:
    said = " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split()).partition(". ")[0]
    line = f"  {name:34} {said}"
    out.print(line if len(line) <= 100 else f"{line[:98]} …", markup=False, highlight=False, soft_wrap=True)
