"""`flipproof reproduce`."""

from __future__ import annotations

from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from flipproof.cli._console import out as console
from flipproof.errors import ConfigError

PAPERS = {
    "deepvigor": "flipproof.reproduce.deepvigor",
    "exhaustive": "flipproof.reproduce.exhaustive",
    "fortune": "flipproof.reproduce.fortune",
    "lstm-beyond": "flipproof.reproduce.lstm_beyond",
    "lstm-clipping": "flipproof.reproduce.lstm_clipping",
    "proact": "flipproof.reproduce.proact",
    "protection": "flipproof.reproduce.protection",
}
"""Name on the command line → module with `SUMMARY` and `reproduce`."""


class Scale(StrEnum):
    """How much of the paper is run."""

    smoke = "smoke"
    paper = "paper"


def command(
    paper: Annotated[str, typer.Argument(help=f"{' | '.join(PAPERS)}")],
    scale: Annotated[Scale, typer.Option(help="smoke: minutes on two cores; paper: what was published.")] = Scale.smoke,
    data_root: Annotated[
        Path, typer.Option(help="Folder with the data sets, as torchvision fills it; nothing is downloaded.")
    ] = Path("data"),
    out: Annotated[Path | None, typer.Option(help="Folder for tables and figures. [results/PAPER]")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
) -> None:
    """Run a paper's experiments and print its numbers beside ours. Interrupt it and run it again: it resumes."""
    if paper not in PAPERS:
        raise ConfigError(f"no paper is called {paper!r}; there are {', '.join(PAPERS)}")
    module = import_module(PAPERS[paper])
    folder = out or Path("results") / paper
    module.reproduce(scale=scale.value, data_root=data_root, out=folder, workers=workers, console=console)
