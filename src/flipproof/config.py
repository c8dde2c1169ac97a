"""A verb's options as text: in a file, on the command line. They are declared once, by the verb's own signature.

A verb such as `fp.assess` says by its parameters what it takes, by their types how a text is read, and by its docstring
what they mean. A TOML file and the command line offer the same names with the same texts.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w
import torch
from torch import nn

from flipproof._fields import read_json
from flipproof._literals import build, parse, read_typed
from flipproof.analysis.deepvigor import DeepVigor
from flipproof.errors import ConfigError, FlipproofError
from flipproof.faults import FaultModel, parse_faults
from flipproof.formats import Format, parse_format
from flipproof.hardening.files import load_hardened
from flipproof.hardening.methods import Hardening, parse_hardening
from flipproof.models.weights import load_weights
from flipproof.running.data import Data, Output
from flipproof.running.metrics import Metrics
from flipproof.running.outcomes import DecisionChoice, check_choice
from flipproof.running.scales import METRIC_NAMES
from flipproof.spaces.sites import Neurons, Parameters
from flipproof.spaces.tensors import FormatChoice


@dataclass(frozen=True)
class Option:
    """One option of a verb.

    Attributes:
        name: of the parameter.
        kind: what a file holds: str, int, float, bool, or list for several texts.
        read: from that to what the verb takes.
        help: one sentence.
        default: as the verb has it.
        required: whether it has to be given.
        mapping: whether a file may hold {pattern: text} instead.
        written_as: how its text looks, by example.
    """

    name: str
    kind: type
    read: Callable[[Any], Any]
    help: str
    default: Any = None
    required: bool = False
    mapping: bool = False
    written_as: str = ""

    def fitting(self, value: Any, source: str) -> Any:
        """The value, if it is of the option's kind; one text may stand for several, a whole number for a float.

        Raises:
            ConfigError: saying what is taken, what came, and where.
        """
        if self.kind is list and isinstance(value, (str, list, tuple)):
            value = [value] if isinstance(value, str) else list(value)
            fits = all(isinstance(part, str) for part in value)
        elif self.kind is float and type(value) in (int, float):
            fits = type(value) is float or abs(value) < 2**53  # a file can hold whole numbers that no float can
            value = float(value) if fits else value
        elif self.mapping and isinstance(value, dict):
            fits = all(isinstance(part, str) for part in (*value.keys(), *value.values()))
        elif self.kind is str and self.name in ("output", "decision") and type(value) in (int, float):
            fits = True
        else:
            fits = type(value) is self.kind
        if not fits:
            raise ConfigError(f"{source}: {self.name} takes {self.takes}, got {value!r}")
        return value

    @property
    def takes(self) -> str:
        """What a file holds, in words."""
        words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "texts"}
        return f"{words[self.kind]} or a table {{pattern: text}}" if self.mapping else words[self.kind]


MODEL = {
    "weights": Option("weights", str, str, "State dict to load: .safetensors, or .pt/.pth (never unpickled)"),
    "hardened": Option("hardened", str, str, "What `flipproof harden` wrote for this model: its bounds and weights"),
}
"""What a model is loaded with, besides its factory."""


def options_of(verb: Callable[..., Any]) -> dict[str, Option]:
    """The options that a verb declares: all parameters whose type can be read from a text.

    Example:
        >>> def count(model: nn.Module, *, trials: int = 3) -> int:
        ...     '''Count.
        ...
        ...     Args:
        ...         model: whose parameters; all of them.
        ...         trials: how often. At least once.
        ...     '''
        >>> [(o.name, o.required, o.default, o.help) for o in options_of(count).values()]
        [('model', True, None, 'whose parameters'), ('trials', False, 3, 'how often')]
    """
    hints, said = get_type_hints(verb), _said_of(verb)
    found = {}
    for name, parameter in inspect.signature(verb).parameters.items():
        known = _reader(name, hints.get(name))
        if known is None or name == "journal":
            continue
        kind, read, written_as = known
        required = parameter.default is parameter.empty
        default = None if required else parameter.default
        mapping = hints[name] == FormatChoice
        found[name] = Option(name, kind, read, said.get(name, ""), default, required, mapping, written_as)
    return found


def effective(options: Mapping[str, Option], given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What was given, checked by name and kind; None counts as not given.

    Raises:
        ConfigError: naming the option, where it comes from and what it takes.
    """
    if unknown := sorted(given.keys() - options.keys()):
        raise ConfigError(f"{source}: unknown {', '.join(unknown)}; known are {', '.join(options)}")
    values = {name: value for name, value in given.items() if value is not None and value != []}
    if missing := [name for name, option in options.items() if option.required and name not in values]:
        raise ConfigError(f"{source}: {', '.join(missing)} must be given")
    return {name: options[name].fitting(value, source) for name, value in values.items()}


def arguments(options: Mapping[str, Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """What a verb takes, read from what `effective` gave.

    Models and data are made with torch's generator seeded by the option `seed`, if there is one: a factory may
    initialise at random, and the same file gives the same model.

    Raises:
        ConfigError: if something cannot be read or loaded.
    """
    seed = values.get("seed", options["seed"].default if "seed" in options else 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        found = {name: options[name].read(value) for name, value in values.items()}
    weights, hardened = found.pop("weights", None), found.pop("hardened", None)
    if weights is not None:
        load_weights(found["model"], weights)
    if hardened is not None:
        found["model"] = load_hardened(found["model"], hardened)
    return found


def written(verb: str, values: Mapping[str, Any]) -> str:
    """The effective options as TOML: `flipproof VERB --config` on it repeats the run."""
    return f"# flipproof {verb} --config THIS_FILE repeats or resumes this run\n" + tomli_w.dumps(dict(values))


def _said_of(verb: Callable[..., Any]) -> dict[str, str]:
    """The first sentence that a docstring says of each argument."""
    text = inspect.cleandoc(verb.__doc__ or "")
    match = re.search(r"^Args:\n((?:    .*\n|\n)*)", text + "\n", re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", match.group(1) if match else "", re.MULTILINE)
    return {name: re.split(r"[.;:](?:\s|$)", " ".join(said.split()))[0] for name, said in entries}


FACTORY = "MODULE:FACTORY or FILE.py:FACTORY"


def _reader(name: str, hint: Any) -> tuple[type, Callable[[Any], Any], str] | None:
    """What a file holds for a parameter of this type, how it is read, and how it is written; None if it cannot be."""
    for known, kind, read, written_as in (
        (Data, str, load_data, FACTORY),
        (Data | None, str, load_data, FACTORY),
        (FormatChoice, list, read_formats, "Float16, Affine(bits=4); or PATTERN=FORMAT, repeated; or a formats.json"),
        (Output, str, read_output, "a dict key, a tuple index, or MODULE:FUNCTION"),
        (DecisionChoice, str, read_decision, "logits, probabilities, argmax, or a threshold such as 0.3"),
        (Metrics, list, _metrics, f"{', '.join(METRIC_NAMES)}, or MODULE:FUNCTION"),
        (tuple[int, int], str, _two_numbers, "3:8"),
        (Sequence[Format], list, lambda texts: [parse_format(text) for text in texts], "SECDED(Affine(bits=8))"),
        (
            Mapping[str, Hardening] | None,
            list,
            lambda texts: {text: parse_hardening(text) for text in texts},
            "Guard(), ProAct.quick()",
        ),
    ):
        if hint == known:
            return kind, read, written_as
    literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
    if literals:
        values = [value for part in literals for value in get_args(part)]
        return str, partial(_among, name, values), " or ".join(map(str, values))
    if get_origin(hint) not in (None, Union, UnionType):
        return None
    parts = {*get_args(hint)} - {NoneType} or {hint}
    if parts == {nn.Module}:
        return str, load_model, FACTORY
    if parts & {Parameters, Neurons}:  # a space of one's own cannot be written as text
        parts &= {Parameters, Neurons}
        example = " or ".join(f"{kind.__name__}(include='conv*')" for kind in (Parameters, Neurons) if kind in parts)
        return str, lambda text: read_typed(text, tuple(parts), parts, example), example
    parsers: dict[type, tuple[Callable[[str], Any], str]] = {
        FaultModel: (parse_faults, "BitErrorRate([1e-6, 1e-5])"),
        Format: (parse_format, "Float16"),
        Hardening: (parse_hardening, "Guard()"),
    }
    for base, (parse_one, example) in parsers.items():
        if all(isinstance(part, type) and issubclass(part, base) for part in parts):
            return str, partial(_parsed, name, parse_one, parts), example
    if parts == {DeepVigor}:
        example = "DeepVigor(neurons=200)"
        return str, lambda text: read_typed(text, object, [DeepVigor], example), example
    if parts == {str, torch.device}:
        return str, str, "cpu, cuda, cuda:1"
    simple = next((kind for kind in (bool, int, float, str) if parts == {kind}), None)
    return None if simple is None else (simple, simple, "")


def _parsed(name: str, parse_one: Callable[[str], Any], kinds: set[Any], text: str) -> Any:
    value = parse_one(text)
    if not isinstance(value, tuple(kinds)):
        raise ConfigError(f"{name} takes a {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
    return value


def _among(name: str, values: Sequence[Any], text: str) -> Any:
    found = [value for value in values if str(value) == str(text)]
    if not found:
        raise ConfigError(f"{name} takes {' or '.join(map(str, values))}, got {text!r}")
    return found[0]


def _metrics(names: Sequence[str]) -> list[Any]:
    return [_metric(name) for name in names]


def _two_numbers(text: str) -> tuple[int, int]:
    try:
        low, high = (int(part) for part in text.split(":"))
    except ValueError:
        raise ConfigError(f"expected NARROWEST:WIDEST, e.g. 3:8, got {text!r}") from None
    return low, high


def read_formats(given: str | Sequence[str] | Mapping[str, str]) -> FormatChoice:
    """One format; or PATTERN=FORMAT several times, or a mapping; or a JSON file {pattern: format}.

    Raises:
        ConfigError: if it is none of these.
    """
    if isinstance(given, Mapping):
        return {pattern: parse_format(text) for pattern, text in given.items()}
    texts = [given] if isinstance(given, str) else list(given)
    if len(texts) == 1 and texts[0].endswith(".json"):
        return read_formats(_formats_in(Path(texts[0])))
    pairs = [_pattern_of(text) for text in texts]
    if len(pairs) == 1 and pairs[0][0] is None:
        return parse_format(pairs[0][1])
    if any(pattern is None for pattern, _ in pairs):
        raise ConfigError(f"format is either one format or PATTERN=FORMAT each time, got {texts}")
    return {str(pattern): parse_format(text) for pattern, text in pairs}


def _formats_in(path: Path) -> dict[str, str]:
    """What `analyze` writes: {pattern: format}."""
    try:
        found = read_json(path.read_text(encoding="utf-8"), f"format {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"format {path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ConfigError(f'format {path}: expected {{"pattern": "format", …}}')
    return found


def _pattern_of(text: str) -> tuple[str | None, str]:
    """`fc*=Affine(bits=4)` has a pattern; the `=` inside `Affine(bits=4)` is none."""
    head, equals, tail = text.partition("=")
    return (head, tail) if equals and "(" not in head else (None, text)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The options in a campaign file.

    Raises:
        ConfigError: if it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def load_model(text: str) -> nn.Module:
    """The network that MODULE:FACTORY gives.

    Raises:
        ConfigError: if it is no network.
    """
    model = called(load_object(text))
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {text!r} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def load_data(text: str) -> list[Any]:
    """The batches that MODULE:FACTORY gives.

    Raises:
        ConfigError: if they cannot be gone through.
    """
    batches = called(load_object(text))
    if not isinstance(batches, Iterable):
        raise ConfigError(
            f"data {text!r} gives a {type(batches).__name__}, expected batches (inputs, targets), e.g. a list or a "
            f"DataLoader"
        )
    return list(batches)


def _metric(name: str) -> Any:
    if name in METRIC_NAMES:
        return name
    if ":" not in name:
        raise ConfigError(f"unknown metric {name!r}: choose among {', '.join(METRIC_NAMES)}, or name a MODULE:FUNCTION")
    return load_object(name)


def called(found: Any) -> Any:
    """A factory's product; a ready model or list of batches is one already."""
    is_factory = isinstance(found, type) or (callable(found) and not isinstance(found, nn.Module))
    if not is_factory:
        return found
    factory: Callable[[], Any] = found
    try:
        return factory()
    except FlipproofError:
        raise
    except TypeError as error:
        raise ConfigError(
            f"{getattr(found, '__name__', found)} cannot be called without arguments ({error}); "
            f"write them out, e.g. module:factory(num_classes=10)"
        ) from error


def load_object(text: str) -> Any:
    """Import `module:name`, or `file.py:name`, and call it if arguments follow.

    The working directory is searched first, as `python -m` does.

    Raises:
        ConfigError: if it does not exist or its import fails.

    Example:
        >>> load_object("flipproof.models:digits_cnn(num_classes=3)").fc2.out_features
        3
    """
    place, colon, expression = text.partition(":")
    if not colon or not place or not expression or place.startswith("."):
        raise ConfigError(f"expected MODULE:NAME or FILE.py:NAME, e.g. torchvision.models:resnet18, got {text!r}")
    module = _import(place, text)
    tree = parse(expression)
    name = ast.unparse(tree.func if isinstance(tree, ast.Call) else tree)
    try:
        found = module
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise ConfigError(f"{place} has no {name!r} (from {text!r})") from None
    return build(tree, text, {name: found}) if isinstance(tree, ast.Call) else found


def read_output(text: str | int | None) -> Any:
    """What to judge of an output: "2" is a tuple index, "module:function" a function, any other text a dict key."""
    if not isinstance(text, str):
        return text
    if text.lstrip("-").isdigit():
        return int(text)
    return load_object(text) if ":" in text else text


def read_decision(text: str | float | None) -> DecisionChoice:
    """How outputs become classes: "logits", "probabilities", "argmax" or a number.

    >>> read_decision("0.3"), read_decision("logits"), read_decision(None)
    (0.3, 'logits', None)
    """
    try:
        return check_choice(float(text) if isinstance(text, str) else text)
    except ValueError:
        return check_choice(text)


def _import(place: str, text: str) -> Any:
    try:
        if place.endswith(".py"):
            specification = importlib.util.spec_from_file_location(Path(place).stem, place)
            if specification is None or specification.loader is None or not Path(place).exists():
                raise ConfigError(f"there is no file {place} (from {text!r})")
            module = importlib.util.module_from_spec(specification)
            sys.modules[specification.name] = module
            specification.loader.exec_module(module)
            return module
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.insert(0, here)
        return importlib.import_module(place)
    except ImportError as error:
        raise ConfigError(f"cannot import {place} (from {text!r}): {error}") from error
