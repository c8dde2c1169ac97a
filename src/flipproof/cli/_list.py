"""`flipproof list`."""

from __future__ import annotations

import inspect
from typing import Any

from flipproof import datasets, faults, formats, models
from flipproof.cli._console import out
from flipproof.hardening import methods
from flipproof.running.scales import METRIC_NAMES

CHOSEN = (formats.Format, faults.FaultModel, methods.Hardening)


def list_names() -> None:
    """Name what can be chosen, a line each: formats, fault models, hardenings, metrics, models, data sets."""
    groups: list[tuple[str, Any, str]] = [
        ("formats", formats, ""),
        ("fault models", faults, ""),
        ("hardenings", methods, ""),
        ("models", models, "flipproof.models:"),
        ("data sets", datasets, "flipproof.datasets:"),
    ]
    for kind, package, prefix in groups:
        out.print(f"[bold]{kind}[/]")
        for name in package.__all__:
            thing = getattr(package, name)
            chosen = isinstance(thing, type) and not inspect.isabstract(thing) and issubclass(thing, CHOSEN)
            if chosen or (prefix and name != "load_weights"):
                _line(f"{prefix}{name}", thing)
    out.print("[bold]metrics[/]")
    for name in METRIC_NAMES:
        out.print(f"  {name}", highlight=False)


def _line(name: str, thing: object) -> None:
    said = (inspect.getdoc(thing) or "").partition("\n")[0]
    line = f"  {name:34} {said}"
    out.print(line if len(line) <= 100 else f"{line[:98]} …", markup=False, highlight=False, soft_wrap=True)
