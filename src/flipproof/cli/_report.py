"""`flipproof report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flipproof.cli._compare import loaded
from flipproof.cli._console import out
from flipproof.reports.html import report


def command(
    page: Annotated[Path, typer.Argument(help="The HTML page to write.")],
    journals: Annotated[list[str], typer.Argument(help="NAME=JOURNAL.jsonl, the baseline first.")],
) -> None:
    """Write one self-contained HTML page of campaigns: figures to hover over, every table, how to read them."""
    out.print(f"Written to {report(page, **loaded(journals))}", markup=False, highlight=False)
