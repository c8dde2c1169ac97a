"""`flipproof list`."""

from __future__ import annotations

import flipproof.datasets
import flipproof.models
from flipproof import specs
from flipproof.cli.console import out
from flipproof.running.scales import METRIC_NAMES


def list_names() -> None:
    """Name what can be chosen: formats, fault models, metrics, models, data sets."""
    for kind, names in {
        "formats": specs.FORMATS,
        "fault models": specs.FAULT_MODELS,
        "hardenings": specs.HARDENINGS,
        "metrics": METRIC_NAMES,
        "models": [f"flipproof.models:{name}" for name in flipproof.models.__all__ if name != "load_weights"],
        "data sets": [f"flipproof.datasets:{name}" for name in flipproof.datasets.__all__],
    }.items():
        out.print(f"[bold]{kind}[/]")
        for name in names:
            out.print(f"  {name}", highlight=False)
