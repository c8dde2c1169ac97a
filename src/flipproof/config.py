"""What texts of a command line or a file stand for: networks, data, formats, metrics. Nothing is evaluated.

MODULE:NAME is imported, and called with literal arguments. Formats, fault models and the like are read where they are
defined: `parse_format`, `parse_faults`, `parse_hardening`, `parse_where`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from flipproof._fields import read_json
from flipproof._literals import build, parse
from flipproof.errors import ConfigError, FlipproofError
from flipproof.formats import parse_format
from flipproof.running.decision import DecisionChoice, check_choice
from flipproof.running.scales import METRICS
from flipproof.running.tasks.base import Task, check_task
from flipproof.running.tasks.typed import task_read
from flipproof.spaces.tensors import FormatChoice


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
    """The options in a file.

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
    model = _called(load_object(text))
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {text!r} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def load_data(text: str) -> list[Any]:
    """The batches that MODULE:FACTORY gives.

    Raises:
        ConfigError: if they cannot be gone through.
    """
    batches = _called(load_object(text))
    if not isinstance(batches, Iterable):
        raise ConfigError(
            f"data {text!r} gives a {type(batches).__name__}, expected batches (inputs, targets), e.g. a list or a "
            f"DataLoader"
        )
    return list(batches)


def read_metrics(names: Sequence[str]) -> list[Any]:
    """Metrics: names that are known, or MODULE:FUNCTION.

    Raises:
        ConfigError: if one is neither, or cannot be loaded.
    """
    for name in names:
        if name not in METRICS and ":" not in name:
            known = ", ".join(METRICS)
            raise ConfigError(f"unknown metric {name!r}: choose among {known}, or name a MODULE:FUNCTION")
    return [name if name in METRICS else load_object(name) for name in names]


def connected(address: str) -> Any:
    """A client of the Dask scheduler at this address, or of the one that wrote this JSON file.

    Raises:
        ConfigError: if there is none, or Dask is not installed.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ConfigError(f"a cluster needs dask.distributed: pip install 'flipproof[cluster]' ({error})") from error
    given = {"scheduler_file": address} if address.endswith(".json") else {"address": address}
    try:
        if address.endswith(".json") and not Path(address).is_file():  # Dask would wait for it
            raise FileNotFoundError("no such file")
        return Client(**given, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TimeoutError) as error:
        raise ConfigError(
            f"there is no Dask scheduler at {address} ({type(error).__name__}: {error}). Start one with "
            f"`dask scheduler`, which prints its address"
        ) from error


def _called(found: Any) -> Any:
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


def read_task(text: str) -> Task:
    """A task as it is typed, `Regression(tolerance=0.5)`, or MODULE:NAME of one that names functions.

    Raises:
        ConfigError: if it is neither.

    >>> read_task("Detection(score=0.7)")
    Detection(score=0.7, iou=0.5, most=100)
    """
    if ":" in text and "(" not in text:
        found = load_object(text)
        check_task(found)
    else:
        found = task_read(text)
    if not isinstance(found, Task):
        raise ConfigError(f"expected a task such as Regression(tolerance=0.5), or MODULE:NAME of one, got {text!r}")
    return found


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
