"""The options of a command are those of its verb: declared once, by the verb's signature and docstring.

A verb such as `fp.assess` says by its parameters what it takes, by their types how a text is read, and by its docstring
what they mean. A TOML file and the command line offer the same names with the same texts.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import tomli_w
import torch
from torch import nn

from flipproof._literals import read_typed
from flipproof.config import load_data, load_model, read_decision, read_formats, read_metrics, read_output, read_task
from flipproof.errors import ConfigError, FlipproofError
from flipproof.faults import FaultModel, parse_faults
from flipproof.formats import Format, parse_format
from flipproof.hardening.methods import Hardening, parse_hardening
from flipproof.running.data import Data, Output
from flipproof.running.decision import DecisionChoice
from flipproof.running.metrics import Metrics
from flipproof.running.scales import METRICS
from flipproof.running.tasks.base import Task
from flipproof.spaces import Neurons, Parameters, Where, parse_where
from flipproof.spaces.tensors import FormatChoice

LARGEST = 2**53
"""Whole numbers below this are floating-point numbers too."""


class Reading(NamedTuple):
    """How an option is read."""

    kinds: tuple[type, ...]
    """What a file may hold: str, int, float, bool, list or dict (of texts). The command line takes the first."""
    read: Callable[[Any], Any]
    """From that to what the verb takes."""
    takes: str = ""
    """Its text, by example."""


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: of the verb's parameter.
        reading: how it is read.
        help: one sentence.
        default: as the verb has it.
        required: whether it has to be given.
    """

    name: str
    reading: Reading
    help: str
    default: Any = None
    required: bool = False

    def checked(self, value: Any, place: str) -> Any:
        """The value, if it is of a kind that is taken. One text may stand for a list, a whole number for a float.

        Raises:
            ConfigError: saying what is taken, what came, and where.
        """
        kinds = self.reading.kinds
        if float in kinds and type(value) is int and abs(value) < LARGEST:
            value = float(value)
        if list in kinds and isinstance(value, str):
            value = [value]
        parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        if type(value) not in kinds or not all(isinstance(part, str) for part in parts):
            raise ConfigError(f"{place}: {self.name} takes {' or '.join(WORDS[kind] for kind in kinds)}, got {value!r}")
        return value


WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "texts",
    dict: "a table {pattern: text}",
}
"""What a file holds, in words."""


class Given(NamedTuple):
    """A value that was given, as a file holds it, and where."""

    value: Any
    place: str


def options_of(verb: Callable[..., Any]) -> dict[str, Option]:
    """The options that a verb declares: its parameters whose type can be read from a text.

    Example:
        >>> def count(model: nn.Module, *, trials: int = 3, then: Callable[[], None] | None = None) -> int:
        ...     '''Count.
        ...
        ...     Args:
        ...         model: whose parameters; all of them.
        ...         trials: how often. At least once.
        ...         then: what is called. No text stands for a function.
        ...     '''
        >>> [(o.name, o.required, o.default, o.help) for o in options_of(count).values()]
        [('model', True, None, 'whose parameters'), ('trials', False, 3, 'how often')]
    """
    hints, said = get_type_hints(verb), _said_of(verb)
    found = {}
    for name, parameter in inspect.signature(verb).parameters.items():
        reading = _reading(hints.get(name))
        if reading is not None and parameter.kind is not parameter.VAR_POSITIONAL:
            required = parameter.default is parameter.empty
            default = None if required else parameter.default
            found[name] = Option(name, reading, said.get(name, ""), default, required)
    return found


def effective(options: Mapping[str, Option], *sources: tuple[str, Mapping[str, Any]]) -> dict[str, Given]:
    """What was given, checked by name and kind, in the order of the options.

    Args:
        options: that there are.
        sources: (place, values) of each; later ones win. None counts as not given.

    Raises:
        ConfigError: naming the option, where it comes from and what it takes.
    """
    found = {}
    for place, values in sources:
        if unknown := sorted(values.keys() - options.keys()):
            raise ConfigError(f"{place}: unknown {', '.join(unknown)}; known are {', '.join(options)}")
        for name, value in values.items():
            if value is not None:
                found[name] = Given(options[name].checked(value, place), place)
    if missing := [name for name, option in options.items() if option.required and name not in found]:
        places = " and ".join(place for place, _ in sources)
        raise ConfigError(f"{places}: {', '.join(missing)} must be given")
    return {name: found[name] for name in options if name in found}


def arguments(options: Mapping[str, Option], given: Mapping[str, Given]) -> dict[str, Any]:
    """What a verb takes, read from what `effective` gave.

    Models and data are made with torch's generator seeded by the option `seed`, if there is one: a factory may
    initialise at random, and the same file gives the same model.

    Raises:
        ConfigError: if something cannot be read or loaded, naming the option, what it takes, what came, and where.
    """
    seed = given["seed"].value if "seed" in given else options["seed"].default if "seed" in options else 0
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, (value, place) in given.items():
            reading = options[name].reading
            try:
                found[name] = reading.read(value)
            except FlipproofError as error:
                taken = f" takes {reading.takes}, got {value!r}" if reading.takes else ""
                raise ConfigError(f"{place}: {name}{taken}: {error}") from error
    return found


def written(command: str, options: Mapping[str, Option], given: Mapping[str, Given]) -> str:
    """The effective options as TOML, plain defaults included: `flipproof COMMAND --config` on it repeats the run."""
    defaults = {name: option.default for name, option in options.items() if type(option.default) in (int, float, str)}
    values = {
        name: given[name].value if name in given else defaults[name]
        for name in options
        if name in {**defaults, **given}
    }
    return f"# flipproof {command} --config THIS_FILE repeats or resumes this run\n{tomli_w.dumps(values)}"


def _said_of(verb: Callable[..., Any]) -> dict[str, str]:
    """The first sentence that a docstring says of each argument."""
    text = inspect.cleandoc(verb.__doc__ or "")
    match = re.search(r"^Args:\n((?:    .*\n|\n)*)", text + "\n", re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", match.group(1) if match else "", re.MULTILINE)
    return {name: re.split(r"[.;:](?:\s|$)", " ".join(said.split()))[0] for name, said in entries}


def _parts(hint: Any) -> frozenset[Any]:
    """The types that a parameter takes, None aside: it is what a parameter is that is not given."""
    return frozenset(get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)) - {NoneType, None}


def _widths(text: str) -> tuple[int, int]:
    try:
        low, high = (int(part) for part in text.split(":"))
    except ValueError:
        raise ConfigError(f"expected NARROWEST:WIDEST, e.g. 3:8, got {text!r}") from None
    return low, high


def _hardenings(texts: Sequence[str]) -> dict[str, Hardening]:
    return {text: parse_hardening(text) for text in texts}


def _formats(texts: Sequence[str]) -> list[Format]:
    return [parse_format(text) for text in texts]


def _named_formats(texts: Sequence[str]) -> dict[str, Format]:
    found = {}
    for text in texts:
        name, equals, format = text.partition("=") if "(" not in text.partition("=")[0] else (text, "", text)
        found[name] = parse_format(format if equals else text)
    return found


FACTORY = "MODULE:FACTORY or FILE.py:FACTORY"
DECISION = "logits, probabilities, argmax, or a threshold such as 0.3"
READINGS: dict[frozenset[Any], Reading] = {
    _parts(nn.Module): Reading((str,), load_model, FACTORY),
    _parts(Data): Reading((str,), load_data, FACTORY),
    _parts(FormatChoice): Reading(
        (list, dict), read_formats, "Float16, Affine(bits=4); or PATTERN=FORMAT, repeated; or a formats.json"
    ),
    _parts(Output): Reading((str, int), read_output, "a dict key, a tuple index, or MODULE:FUNCTION"),
    _parts(DecisionChoice): Reading((str, float), read_decision, DECISION),
    _parts(Metrics): Reading((list,), read_metrics, f"{', '.join(METRICS)}, or MODULE:FUNCTION"),
    _parts(Mapping[str, Format]): Reading((list,), _named_formats, "SECDED(Float32(), block=64), or NAME=FORMAT"),
    _parts(Sequence[Format]): Reading((list,), _formats, "SECDED(Affine(bits=8))"),
    _parts(Mapping[str, Hardening]): Reading((list,), _hardenings, "Guard(), ProAct.quick()"),
    _parts(tuple[int, int]): Reading((str,), _widths, "3:8"),
    _parts(str | os.PathLike[str]): Reading((str,), str, "a path"),
    _parts(str | torch.device): Reading((str,), str, "cpu, cuda, cuda:1"),
    **{_parts(kind): Reading((kind,), kind) for kind in (str, int, float, bool)},
}
"""By the type of a parameter."""

BASES: tuple[tuple[type | tuple[type, ...], Callable[[str], Any], str], ...] = (
    (FaultModel, parse_faults, "BitErrorRate([1e-6, 1e-5])"),
    (Format, parse_format, "Float16 or Affine(bits=4)"),
    (Hardening, parse_hardening, "Guard() or ProAct.quick()"),
    (Task, read_task, "Tokens() or Regression(tolerance=0.5)"),
    (Parameters, parse_where, "Parameters(include='conv*')"),
    ((Parameters, Neurons, Where), parse_where, "Parameters(include='conv*') or Neurons()"),
)
"""Kinds of which a package exports several: base, reader, example."""


def _reading(hint: Any) -> Reading | None:
    """How a parameter of this type is read; None if no text can stand for it."""
    parts = _parts(hint)
    if parts in READINGS:
        return READINGS[parts]
    if all(get_origin(part) is Literal for part in parts):
        values = [value for part in parts for value in get_args(part)]
        return Reading((str,), partial(_among, values), " or ".join(map(str, values)))
    kinds = tuple(part for part in parts if isinstance(part, type))
    if len(kinds) < len(parts):
        return None
    for base, parse, example in BASES:
        if all(issubclass(kind, base) for kind in kinds):
            return Reading((str,), partial(_of_kind, kinds, parse), example)
    if all(is_dataclass(kind) for kind in kinds):
        example = " or ".join(f"{kind.__name__}(…)" for kind in kinds)
        return Reading((str,), lambda text: read_typed(text, kinds, kinds, example), example)
    return None


def _of_kind(kinds: tuple[type, ...], parse: Callable[[str], Any], text: str) -> Any:
    value = parse(text)
    if not isinstance(value, kinds):
        raise ConfigError(f"expected a {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
    return value


def _among(values: Sequence[Any], text: str) -> Any:
    found = [value for value in values if str(value) == text]
    if not found:
        raise ConfigError(f"expected {' or '.join(map(str, values))}, got {text!r}")
    return found[0]
