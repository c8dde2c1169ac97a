"""Reading what people type: `Affine(bits=4)`, `package.module:factory(num_classes=10)`, `file.py:batches`.

Nothing is evaluated: a specification may call the public formats and fault models, or the one object it names, with
literal arguments, and nothing else.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flipproof import faults, formats
from flipproof.errors import ConfigError
from flipproof.faults import FaultModel
from flipproof.formats import Format
from flipproof.hardening import methods
from flipproof.hardening.methods.base import Hardening
from flipproof.running.outcomes import DecisionChoice, check_choice

FORMATS = tuple(name for name in formats.__all__ if name not in ("Format", "Stored"))
FAULT_MODELS = ("BitErrorRate", "BitPosition", "RandomBits", "StuckAt")
HARDENINGS = ("AVC", "FTClipAct", "FitAct", "Guard", "ProAct", "Ranger")

LONGEST_RANGE = 10_000
"""Numbers that a `range(…)` in a specification may have: a sweep has a few dozen points."""


def _range(*limits: int) -> range:
    found = range(*limits)
    if len(found) > LONGEST_RANGE:
        raise ConfigError(f"a range takes at most {LONGEST_RANGE:,} numbers, got {found} with {len(found):,}")
    return found


_VALUES: dict[str, Callable[..., Any]] = {
    **{name: getattr(formats, name) for name in FORMATS},
    **{name: getattr(faults, name) for name in FAULT_MODELS},
    **{name: getattr(methods, name) for name in HARDENINGS},
    "FitAct.quick": methods.FitAct.quick,
    "ProAct.quick": methods.ProAct.quick,
    "range": _range,
}


def parse_value(text: str) -> Any:
    """A format, fault model or literal from its repr.

    Raises:
        ConfigError: showing the text and the names that may be called.

    Example:
        >>> parse_value("BitErrorRate([1e-6, 1e-5])")
        BitErrorRate(ber=(1e-06, 1e-05), exact=True, spread='bits')
        >>> parse_value("__import__('os')")
        Traceback (most recent call last):
            ...
        flipproof.errors.ConfigError: cannot read "__import__('os')": __import__ is not among AVC, Affine, ...
    """
    return _build(_parse(text), text, _VALUES)


def parse_format(text: str) -> Format:
    """A format from its repr, e.g. ``Affine(bits=4)`` or just ``Float32``."""
    found: Format = _typed(text, Format, "Float32() or Affine(bits=4)")
    return found


def parse_faults(text: str) -> FaultModel:
    """A fault model from its repr, e.g. ``BitErrorRate([1e-6, 1e-5])``."""
    found: FaultModel = _typed(text, FaultModel, "BitErrorRate([1e-6, 1e-5])")
    return found


def parse_hardening(text: str) -> Hardening:
    """A hardening from its repr, e.g. ``Ranger(per="neuron")``, or ``ProAct.quick()``."""
    found: Hardening = _typed(text, Hardening, "Guard() or ProAct.quick()")
    return found


def _typed(text: str, kind: type, example: str) -> Any:
    value = parse_value(text if "(" in text else f"{text}()")
    if not isinstance(value, kind):
        raise ConfigError(f"expected something like {example}, got {text!r}")
    return value


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
    tree = _parse(expression)
    name = ast.unparse(tree.func if isinstance(tree, ast.Call) else tree)
    try:
        found = module
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise ConfigError(f"{place} has no {name!r} (from {text!r})") from None
    return _build(tree, text, {name: found}) if isinstance(tree, ast.Call) else found


def parse_output(text: str | int | None) -> Any:
    """What to judge of an output: "2" is a tuple index, "module:function" a function, any other text a dict key."""
    if not isinstance(text, str):
        return text
    if text.lstrip("-").isdigit():
        return int(text)
    return load_object(text) if ":" in text else text


def parse_decision(text: str | float | None) -> DecisionChoice:
    """How outputs become classes: "logits", "probabilities", "argmax" or a number.

    >>> parse_decision("0.3"), parse_decision("logits"), parse_decision(None)
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


def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ConfigError(f"cannot read {text[:200]!r}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # a null byte; brackets in brackets without end
        raise ConfigError(f"cannot read {text[:200]!r}: {error or 'it is nested too deep'}") from None


def _build(node: ast.expr, text: str, callables: Mapping[str, Callable[..., Any]]) -> Any:
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if any(isinstance(argument, ast.Starred) for argument in node.args) or any(
            k.arg is None for k in node.keywords
        ):
            raise ConfigError(f"cannot read {text!r}: write the arguments out, without * or **")
        if name not in callables:
            raise ConfigError(f"cannot read {text!r}: {name} is not among {', '.join(sorted(callables))}")
        arguments = [_build(argument, text, callables) for argument in node.args]
        keywords = {str(k.arg): _build(k.value, text, callables) for k in node.keywords}
        try:
            return callables[name](*arguments, **keywords)
        except (TypeError, OverflowError) as error:
            raise ConfigError(f"{text!r}: {error}") from error
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_build(element, text, callables) for element in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):  # TypeError: a list as the key of a mapping
        raise ConfigError(
            f"cannot read {text!r}: {ast.unparse(node)!r} is neither a literal nor a known name"
        ) from None
