"""`flipproof demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flipproof.cli._console import out
from flipproof.demo import run_demo


def command(
    folder: Annotated[Path, typer.Option("--out", help="Folder for journals, tables and figures.")] = Path(
        "flipproof-demo"
    ),
    trials: Annotated[int, typer.Option(min=2, help="Trials at each bit error rate.")] = 300,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
) -> None:
    """Train a small CNN, sweep the bit error rate, flip every bit position. Under a minute."""
    run_demo(folder, trials=trials, workers=workers, console=out)
