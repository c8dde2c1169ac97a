"""Reading a file's JSON as what it is said to be: typed and bounded, field by field. Nothing that a file names is run.

A file may come from anybody. What is read here is text, numbers, lists and mappings of a known kind and size, and what
it is not said to be is refused, with its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from flipproof.errors import ConfigError

T = TypeVar("T")

LONGEST_TEXT = 2**24
"""Characters of JSON that one file may hold beside its tensors."""

LARGEST = 2**53
"""Whole numbers in files: up to this, every JSON reader agrees on them."""


def read_json(text: str, place: str) -> Any:
    """The JSON in a text.

    Args:
        text: to be read.
        place: where it comes from, for the error.

    Raises:
        ConfigError: if it is no JSON, too long, or nested too deep.
    """
    if len(text) > LONGEST_TEXT:
        raise ConfigError(f"{place}: expected at most {LONGEST_TEXT:,} characters of JSON, got {len(text):,}")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{place}: expected JSON, got {_shown(text)} ({error})") from None
    except RecursionError:
        raise ConfigError(f"{place}: expected JSON that is nested a few levels deep, got {_shown(text)}") from None


class Fields:
    """One JSON object of a file. Each field is asked for by name and kind; `end` refuses whatever was not asked for.

    Args:
        value: what the file holds there.
        place: where, for errors: ``"safe.safetensors, sites[3]"``.

    Raises:
        ConfigError: if it is no JSON object; so do all methods, naming the place, what was expected and what came.

    Example:
        >>> about = Fields({"name": "act:0", "calls": -1}, "safe.safetensors")
        >>> about.text("name")
        'act:0'
        >>> about.whole("calls")
        Traceback (most recent call last):
            ...
        flipproof.errors.ConfigError: safe.safetensors, calls: expected a whole number from 0 to ..., got -1; ...
    """

    def __init__(self, value: Any, place: str) -> None:
        self.place = place
        if not isinstance(value, dict):
            raise wrong(place, "an object with named fields", value)
        self._values: dict[str, Any] = value
        self._asked: set[str] = set()

    def take(self, name: str) -> Any:
        """A field as it is, for the caller to check."""
        self._asked.add(name)
        if name not in self._values:
            raise ConfigError(f"{self.place}: expected a field {name!r}, got only {_shown(list(self._values))}; {HINT}")
        return self._values[name]

    def at(self, name: str) -> str:
        """The place of a field."""
        return f"{self.place}, {name}"

    def has(self, name: str) -> bool:
        """Whether there is such a field, for those that older files lack."""
        return name in self._values

    def text(self, name: str, among: Collection[str] | None = None) -> str:
        """A text, or one of some texts."""
        value = self.take(name)
        if not isinstance(value, str):
            raise wrong(self.at(name), "a text", value)
        if among is not None and value not in among:
            raise wrong(self.at(name), f"one of {', '.join(sorted(among))}", value)
        return value

    def whole(self, name: str, least: int = 0, most: int = LARGEST) -> int:
        """A whole number from `least` to `most`."""
        return whole(self.take(name), self.at(name), least, most)

    def number(self, name: str) -> float:
        """A number; NaN and infinities are such."""
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong(self.at(name), "a number", value)
        try:
            return float(value)
        except OverflowError:
            raise wrong(self.at(name), "a number that fits 64 bits", value) from None

    def as_is(self, name: str) -> float | int:
        """A number that stays whole if it is written so."""
        self.number(name)
        value: float | int = self._values[name]
        return value

    def inside(self, name: str) -> Fields:
        """The fields of an object in a field."""
        return Fields(self.take(name), self.at(name))

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.take(name)
        if not isinstance(value, bool):
            raise wrong(self.at(name), "true or false", value)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        value = self._list(name)
        for i, part in enumerate(value):
            if not isinstance(part, str):
                raise wrong(f"{self.at(name)}[{i}]", "a text", part)
        return tuple(value)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object whose fields may have any names."""
        return dict(self.inside(name)._values)

    def each(self, name: str, read: Callable[[Fields], T]) -> tuple[T, ...]:
        """A list of objects, each read by a function and then at its end."""
        found = []
        for i, part in enumerate(self._list(name)):
            fields = Fields(part, f"{self.at(name)}[{i}]")
            found.append(read(fields))
            fields.end()
        return tuple(found)

    def end(self) -> None:
        """Refuse fields that were not asked for: what they mean is not known here."""
        if unknown := sorted(self._values.keys() - self._asked):
            asked = ", ".join(sorted(self._asked))
            raise ConfigError(f"{self.place}: expected only {asked}, got {_shown(unknown)} too; {HINT}")

    def _list(self, name: str) -> list[Any]:
        value = self.take(name)
        if not isinstance(value, list):
            raise wrong(self.at(name), "a list", value)
        return value


HINT = "the file is damaged, or another version of flipproof wrote it: write it again"


def whole(value: Any, place: str, least: int = 0, most: int = LARGEST) -> int:
    """A whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise wrong(place, f"a whole number from {least} to {most:,}", value)
    return value


def wrong(place: str, expected: str, got: Any) -> ConfigError:
    """The error for a value of another kind."""
    return ConfigError(f"{place}: expected {expected}, got {_shown(got)}; {HINT}")


def _shown(value: Any) -> str:
    """The start of a value: a file can hold megabytes, or text that is nested without end."""
    if isinstance(value, (list, dict)) and (len(value) > 20 or any(isinstance(part, (list, dict)) for part in value)):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value):,}"
    shown = repr(value[:100] if isinstance(value, str) else value)
    return shown if len(shown) <= 80 else f"{shown[:60]} …"
