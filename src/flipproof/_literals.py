"""Reading what people type: `Affine(bits=4)`, `BitErrorRate([1e-6, 1e-5])`.

Nothing is evaluated: a text may call the names it is given, with literal arguments, and nothing else.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flipproof.errors import ConfigError

LONGEST_RANGE = 10_000
"""Numbers that a `range(…)` in a text may have: a sweep has a few dozen points."""


def read_typed(text: str, kind: type | tuple[type, ...], known: Iterable[object], example: str) -> Any:
    """An object of one kind from its repr; parentheses may be left out.

    Args:
        text: what was typed, e.g. ``Affine(bits=4)`` or just ``Float32``; ``fp.`` before a name is passed over.
        kind: what it has to be.
        known: what may be called: of these, classes of that kind and their public constructors.
        example: of the kind, for the error.

    Raises:
        ConfigError: showing the text, and the names that may be called.
    """
    callables = {"range": _range, **constructors(kind, known)}
    tree = parse(text if "(" in text else f"{text}()")
    value = build(tree, text, callables)
    if not isinstance(value, kind):
        raise ConfigError(f"expected something like {example}, got {text!r}")
    return value


def constructors(kind: type | tuple[type, ...], known: Iterable[object]) -> dict[str, Callable[..., Any]]:
    """What may be called by name: of `known`, concrete classes of a kind and their public class methods."""
    found: dict[str, Callable[..., Any]] = {}
    for thing in known:
        if not isinstance(thing, type) or not issubclass(thing, kind) or inspect.isabstract(thing):
            continue
        found[thing.__name__] = thing
        for name, member in vars(thing).items():
            if isinstance(member, classmethod) and not name.startswith("_"):
                found[f"{thing.__name__}.{name}"] = getattr(thing, name)
    return found


def _range(*limits: int) -> range:
    found = range(*limits)
    if len(found) > LONGEST_RANGE:
        raise ConfigError(f"a range takes at most {LONGEST_RANGE:,} numbers, got {found} with {len(found):,}")
    return found


def parse(text: str) -> ast.expr:
    """The expression in a text, not evaluated.

    Raises:
        ConfigError: if it is none.
    """
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ConfigError(f"cannot read {text[:200]!r}: {error.msg}; expected NAME(…) with literal arguments") from None
    except (ValueError, RecursionError, MemoryError) as error:  # a null byte; brackets in brackets without end
        raise ConfigError(f"cannot read {text[:200]!r}: {error or 'it is nested too deep'}") from None


def build(node: ast.expr, text: str, callables: Mapping[str, Callable[..., Any]]) -> Any:
    """What an expression stands for: literals, and calls of `callables` with such.

    Raises:
        ConfigError: on anything else.
    """
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).removeprefix("fp.")
        if any(isinstance(argument, ast.Starred) for argument in node.args) or any(
            k.arg is None for k in node.keywords
        ):
            raise ConfigError(f"cannot read {text!r}: write the arguments out, without * or **")
        if name not in callables:
            raise ConfigError(f"cannot read {text!r}: {name} is not among {', '.join(sorted(callables))}")
        arguments = [build(argument, text, callables) for argument in node.args]
        keywords = {str(k.arg): build(k.value, text, callables) for k in node.keywords}
        try:
            return callables[name](*arguments, **keywords)
        except (TypeError, OverflowError) as error:
            raise ConfigError(f"{text!r}: {error}") from error
    if isinstance(node, (ast.List, ast.Tuple)):
        return [build(element, text, callables) for element in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):  # TypeError: a list as the key of a mapping
        raise ConfigError(
            f"cannot read {text!r}: {ast.unparse(node)!r} is neither a literal nor a known name"
        ) from None
