"""Run benchmarks: `python -m benchmarks [NAME …] [--quick]`; the names are those of `BENCHMARKS`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import (
    deepvigor,
    factors,
    hardening,
    injection,
    memory,
    million,
    neurons,
    protect,
    rates,
    recurrent,
    storage,
    throughput,
    workers,
)
from benchmarks.measure import Row, Size, machine

BENCHMARKS = {
    "injection": injection,
    "throughput": throughput,
    "workers": workers,
    "memory": memory,
    "million": million,
    "hardening": hardening,
    "recurrent": recurrent,
    "storage": storage,
    "protect": protect,
    "neurons": neurons,
    "deepvigor": deepvigor,
    "factors": factors,
    "rates": rates,
}
README = Path(__file__).with_name("README.md")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios measured in one run.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"some of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; the README says so beside the results")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}: choose among {', '.join(BENCHMARKS)}")
    size = Size.QUICK if given.quick else Size.FULL
    console = Console()
    for name in given.names or BENCHMARKS:
        where = machine() + ("; quick run" if size is Size.QUICK else "")
        with console.status(f"{name} …"):
            rows = BENCHMARKS[name].run(size)
        console.print(_table(name, rows))
        for row in rows:
            if row.ratio is None:
                console.print(f"[bold red]SKIPPED[/] {row.what}: {row.note}", highlight=False)
        README.write_text(with_results(README.read_text(encoding="utf-8"), name, rows, where), encoding="utf-8")


def _table(name: str, rows: list[Row]) -> Table:
    table = Table(title=name)
    for column in ("what", "goal", "measured", "met"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        table.add_row(row.what, row.goal, row.measured, row.verdict.strip("*"))
    return table


def with_results(text: str, name: str, rows: list[Row], where: str) -> str:
    """The README with the results of one benchmark put between its markers.

    Raises:
        ValueError: if the markers are not there exactly once.
    """
    lines = ["| what | goal | measured | met |", "|---|---|---|---|"]
    for row in rows:
        note = f" ({row.note})" if row.note else ""
        lines.append(f"| {row.what} | {row.goal} | {row.measured}{note} | {row.verdict} |")
    block = "\n".join([f"<!-- {name} -->", f"*{where}.*", "", *lines, f"<!-- /{name} -->"])
    replaced, count = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _: block, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"README.md needs the markers <!-- {name} --> … <!-- /{name} --> once, found {count}")
    return replaced


if __name__ == "__main__":
    main()
