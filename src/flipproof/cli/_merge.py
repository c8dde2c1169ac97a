"""`flipproof merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flipproof.campaigns.merge import merge
from flipproof.cli._console import out
from flipproof.reports.terminal import summary_table


def command(
    into: Annotated[Path, typer.Argument(help="The journal to write.")],
    journals: Annotated[list[Path], typer.Argument(help="Those of the shards, in any order.")],
    partial: Annotated[bool, typer.Option("--partial", help="Although trials are missing.")] = False,
) -> None:
    """Put the journals of a campaign's shards together into one.

    Each was made by `flipproof assess … --shard 3/100`. What is missing, there twice or of another campaign is named,
    and nothing is written.
    """
    found = merge(*journals, into=into, partial=partial)
    out.print(summary_table(found))
    out.print(f"Written to {into}: {len(found.records):,} trials", markup=False, highlight=False)
