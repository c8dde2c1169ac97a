"""A command made of a verb: its options are the verb's own, and it is one call of the verb."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from flipproof.cli._console import out
from flipproof.config import MODEL, Option, arguments, effective, options_of, read_toml, written


@dataclass(frozen=True)
class Call:
    """What a command has called.

    Attributes:
        result: what the verb gave.
        arguments: what it was called with.
        extras: what the command itself was asked for.
        folder: for results.
    """

    result: Any
    arguments: Mapping[str, Any]
    extras: Mapping[str, Any]
    folder: Path

    def say(self, text: str) -> None:
        """Print a line as it is."""
        out.print(text, markup=False, highlight=False)


def command(
    verb: Callable[..., Any],
    show: Callable[[Call], None],
    *,
    folder: str,
    journal: str = "journal.jsonl",
    config: str = "",
    extras: tuple[Option, ...] = (),
    example: str = "",
) -> Callable[..., None]:
    """The command of a verb that takes a model and data.

    Args:
        verb: the function that is called.
        show: writes and prints what it gave.
        folder: for results, by default.
        journal: name of the verb's journal in the folder, for verbs that have one.
        config: name of the file for the effective options; the verb's name by default.
        extras: options of the command itself: they are passed to `show`.
        example: last lines of the help.
    """
    own = {option.name: option for option in extras}
    asked = options_of(verb)
    results = Option("out", str, Path, "Folder for results", folder)
    options = {**asked, **MODEL, **own, "out": results}
    keeps = "journal" in inspect.signature(verb).parameters

    def run(**given: Any) -> None:
        file = given.pop("config")
        source = "command line" if file is None else f"{file} and command line"
        typed = {name: value for name, value in given.items() if value is not None and value != []}
        values = effective(options, (read_toml(file) if file else {}) | typed, source)
        found = arguments(options, values)
        where = found.pop("out", Path(folder))
        more = {name: found.pop(name, option.default) for name, option in own.items()}
        kept = {"journal": where / journal} if keeps else {}
        called = Call(verb(**found, **kept), found, more, where)
        where.mkdir(parents=True, exist_ok=True)
        name = verb.__name__
        (where / (config or f"{name}.toml")).write_text(written(name.replace("_", "-"), values), encoding="utf-8")
        show(called)

    parameters = [_parameter(option) for option in options.values()]
    file = Annotated[Path | None, typer.Option(help="TOML file with the same options; the command line wins.")]
    parameters.append(inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=file))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__name__ = verb.__name__.replace("_", "-")
    said = inspect.cleandoc(verb.__doc__ or "").partition("\nArgs:")[0].rstrip()
    run.__doc__ = f"{said}\n\n{example}".rstrip()
    return run


def _parameter(option: Option) -> inspect.Parameter:
    """An option as typer takes it: given or not, since a file may have it."""
    kinds: dict[type, Any] = {str: str, int: int, float: float, bool: bool, list: list[str]}
    kind = kinds[option.kind] | None
    help_ = option.help[:1].upper() + option.help[1:] + "."
    if option.written_as:
        help_ += f" {option.written_as}."
    if option.kind is list:
        help_ += " Repeatable."
    if option.default not in (None, ()) and not isinstance(option.default, (bool, type)):
        default = option.default if isinstance(option.default, (tuple, list)) else [option.default]
        help_ += f" [{', '.join(map(str, default))}]"
    place = typer.Argument(help=help_) if option.name == "model" else typer.Option(help=help_)
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, place]
    )
