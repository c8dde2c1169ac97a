"""`flipproof compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flipproof.campaigns.assessment import Assessment
from flipproof.cli._console import out
from flipproof.errors import ConfigError
from flipproof.reports.figures import metric_figure, save
from flipproof.reports.tables import compare, gain_text, number
from flipproof.reports.terminal import summary_table
from flipproof.running.scales import Scale


def command(
    journals: Annotated[list[str], typer.Argument(help="NAME=JOURNAL.jsonl, the baseline first.")],
    csv: Annotated[Path | None, typer.Option(help="Also write the whole table as CSV.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Also draw the metric against the rate: .png, .pdf or .svg.")
    ] = None,
) -> None:
    """Put campaigns side by side: drops, outcomes, gains over the first one with intervals."""
    assessments = loaded(journals)
    table = compare(**assessments)
    metric = next(iter(assessments.values())).metrics[0]
    for name, assessment in assessments.items():
        out.print(summary_table(assessment, title=name))
        gains = table[table["campaign"] == name]
        if name != next(iter(assessments)):
            for _, row in gains.iterrows():
                out.print("  " + _gain(row, metric, assessment.scale(metric)), markup=False, highlight=False)
    if csv:
        table.to_csv(csv, index=False)
    if figure:
        save(metric_figure(assessments, metric=metric), figure)


def _gain(row: Any, metric: str, scale: Scale) -> str:
    point = ", ".join(
        f"{name} {number(row[name])}" for name in ("ber", "bit", "count") if name in row and row[name] == row[name]
    )
    return f"{point}: {gain_text(row, metric, scale)}"


def loaded(journals: list[str]) -> dict[str, Assessment]:
    """Assessments from NAME=JOURNAL.jsonl texts; without a name, the file's.

    Raises:
        ConfigError: if two have one name.
        JournalError: if a file is no journal.
    """
    assessments: dict[str, Assessment] = {}
    for text in journals:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text).stem, text
        if name in assessments:
            raise ConfigError(f"two campaigns are called {name!r}; write NAME=JOURNAL.jsonl")
        assessments[name] = Assessment.load(path)
    return assessments
