"""The command line: one file a verb, each one call of the function of that name.

A verb's file is imported when the verb is called: `flipproof --help` needs no torch.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from flipproof.cli._console import errors, out
from flipproof.errors import FlipproofError, FlipproofWarning

VERBS = {
    "demo": "Train a small CNN, sweep the bit error rate, flip every bit position. Under a minute.",
    "assess": "How a model behaves when the memory that holds it loses bits.",
    "analyze": "Which errors in which neurons, or in which weights, change the class, layer by layer.",
    "estimate-factors": "The vulnerability factor of each layer or parameter to ± margin.",
    "estimate-rates": "How often faults do harm, to ± margin, with the trials that say most about it.",
    "inject-all": "What every single bit does when it alone flips: the ground truth, shard by shard.",
    "harden": "A copy of a model whose activations are bounded.",
    "protect": "Choose how a model is stored so that it survives a bit error rate, and prove it.",
    "explore": "Which stored form of a network is small, accurate and survives.",
    "merge": "Put the journals of a campaign's shards together into one.",
    "compare": "Put campaigns side by side: drops, outcomes, gains over the first one with intervals.",
    "report": "Write one self-contained HTML page of campaigns.",
    "reproduce": "Run a paper's experiments and print its numbers beside ours.",
    "list": "Name what can be chosen: formats, fault models, hardenings, metrics, models, data sets.",
}
"""Each verb is `command` in the file of its name."""


class _Verbs(TyperGroup):
    """Knows every verb by name and imports the one that is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, says in VERBS.items():
            self.add_command(TyperCommand(name, help=says))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        alone = typer.Typer(rich_markup_mode="markdown", add_completion=False)
        alone.command(name)(import_module(f"flipproof.cli._{str(name).replace('-', '_')}").command)
        return name, typer.main.get_command(alone), rest


app = typer.Typer(
    name="flipproof",
    cls=_Verbs,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="How a PyTorch network behaves when the memory that holds it loses bits. Start with `flipproof demo`.",
)


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
