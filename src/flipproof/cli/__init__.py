"""The command line: one file a verb, each one call of the function of that name."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from flipproof.cli._analyze import analyze
from flipproof.cli._assess import assess
from flipproof.cli._compare import compare
from flipproof.cli._console import errors, out
from flipproof.cli._demo import demo
from flipproof.cli._estimate import estimate_factors
from flipproof.cli._explore import explore
from flipproof.cli._harden import harden
from flipproof.cli._list import list_names
from flipproof.cli._report import report
from flipproof.cli._reproduce import reproduce
from flipproof.errors import FlipproofError, FlipproofWarning

app = typer.Typer(
    name="flipproof",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="How a PyTorch network behaves when the memory that holds it loses bits. Start with `flipproof demo`.",
)
app.command()(demo)
app.command()(assess)
app.command()(analyze)
app.command(name="estimate-factors")(estimate_factors)
app.command()(harden)
app.command()(explore)
app.command()(compare)
app.command(name="list")(list_names)
app.command()(report)
app.command()(reproduce)


@app.callback(invoke_without_command=True)
def about(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Options of the program itself."""
    if show:
        out.print(f"flipproof {version('flipproof')}", highlight=False)
        raise typer.Exit


def main() -> None:
    """Run the command line; what flipproof refuses is printed without a traceback, exit status 2."""
    with warnings.catch_warnings():
        warnings.showwarning = _show
        try:
            app()
        except FlipproofError as error:
            errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
            errors.print(str(error), markup=False, highlight=False)
            sys.exit(2)
        except KeyboardInterrupt:
            errors.print("interrupted; every finished job is in the journal, the same command resumes")
            sys.exit(130)


def _show(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    name = "warning" if issubclass(category, FlipproofWarning) else category.__name__
    errors.print(f"[yellow]{name}[/]: ", end="")
    errors.print(str(message), markup=False, highlight=False)
