"""A command made of a verb: its options are the verb's own, and it is one call of the verb."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from flipproof.cli._console import out
from flipproof.cli._options import Option, Reading, arguments, effective, options_of, written
from flipproof.config import connected, read_toml
from flipproof.hardening.files import load_hardened
from flipproof.models.weights import load_weights

WEIGHTS = Option("weights", Reading((str,), str), "State dict to load: .safetensors, or .pt/.pth (never unpickled)")
CLUSTER = Option(
    "cluster",
    Reading((str,), connected, "tcp://HOST:8786, or a scheduler's JSON file"),
    "Dask scheduler whose workers do the work",
)
HARDENED = Option("hardened", Reading((str,), str), "What `flipproof harden` wrote for this model: bounds and weights")


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


def command_of(
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
    name = verb.__name__.replace("_", "-")
    asked = options_of(verb)
    keeps = asked.pop("journal", None) is not None
    results = Option("out", Reading((str,), Path), "Folder for results", folder)
    own = (WEIGHTS, HARDENED, *([CLUSTER] if "client" in inspect.signature(verb).parameters else []), *extras, results)
    options = {**asked, **{option.name: option for option in own}}

    def run(**typed: Any) -> None:
        file = typed.pop("config")
        sources = [] if file is None else [(str(file), read_toml(file))]
        given = effective(options, *sources, ("command line", typed))
        found = arguments(options, given)
        weights, hardened = found.pop("weights", None), found.pop("hardened", None)
        if weights is not None:
            load_weights(found["model"], weights)
        if hardened is not None:
            found["model"] = load_hardened(found["model"], hardened)
        where = found.pop("out", Path(folder))
        more = {option.name: found.pop(option.name, option.default) for option in extras}
        if keeps:
            found["journal"] = where / journal
        with found.pop("cluster", nullcontext()) as client:
            if client is not None:
                found["client"] = client
            called = Call(verb(**found), found, more, where)
        where.mkdir(parents=True, exist_ok=True)
        (where / (config or f"{verb.__name__}.toml")).write_text(written(name, options, given), encoding="utf-8")
        show(called)

    parameters = [_parameter(option) for option in options.values()]
    file = Annotated[Path | None, typer.Option(help="TOML file with the same options; the command line wins.")]
    parameters.append(inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=file))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    said = inspect.cleandoc(verb.__doc__ or "").partition("\nArgs:")[0].rstrip()
    run.__doc__ = f"{said}\n\n{example}".rstrip()
    return run


def _parameter(option: Option) -> inspect.Parameter:
    """An option as typer takes it. None by default: not given, since a file may have it."""
    kind: Any = list[str] if list in option.reading.kinds else option.reading.kinds[0]
    help_ = f"{option.help[:1].upper()}{option.help[1:]}."
    if option.reading.takes:
        help_ += f" Takes {option.reading.takes}."
    if list in option.reading.kinds:
        help_ += " Repeatable."
    if option.default not in (None, ()) and not isinstance(option.default, bool):
        help_ += f" [{_shown(option.default)}]"
    place = typer.Argument(help=help_) if option.name == "model" else typer.Option(help=help_)
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, place]
    )


def _shown(default: Any) -> str:
    """A default as it would be typed."""
    if isinstance(default, tuple):
        return (":" if all(isinstance(part, int) for part in default) else ", ").join(map(str, default))
    return str(default)
