"""What picks the tensor to judge out of a model's answer, as far as a file can keep it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flipproof.errors import ConfigError
from flipproof.running.data import Output


@dataclass(frozen=True)
class Picker:
    """A description of `output=`: a key or an index as it is, of a function its name alone.

    Attributes:
        key: the dict key or tuple index; None for the output itself, or a function.
        function: module and name of a function.

    Example:
        >>> Picker.of("logits"), str(Picker.of(None))
        (Picker(key='logits', function=None), 'no output=')
        >>> Picker.of(len).function
        'builtins.len'
    """

    key: str | int | None = None
    function: str | None = None

    @classmethod
    def of(cls, output: Output) -> Picker:
        """The description of an `output=`.

        Raises:
            ConfigError: if it is none of the kinds there are.
        """
        if output is None or (isinstance(output, (str, int)) and not isinstance(output, bool)):
            return cls(key=output)
        if not callable(output):
            raise ConfigError(f"output= takes a dict key, a tuple index or a function, got {output!r}")
        name = getattr(output, "__qualname__", None)
        if name is None:  # an object that can be called: its class has a name
            return cls(function=f"{type(output).__module__}.{type(output).__qualname__}")
        return cls(function=f"{getattr(output, '__module__', None) or 'builtins'}.{name}")

    @classmethod
    def read(cls, header: Any) -> Picker:
        """The description that `header` wrote.

        Raises:
            ValueError: if it is none.
        """
        if not isinstance(header, dict) or header.keys() != {"key", "function"}:
            raise ValueError(f"output must have a key and a function, got {header!r}")
        key, function = header["key"], header["function"]
        if not isinstance(key, (str, int, type(None))) or not isinstance(function, (str, type(None))):
            raise ValueError(f"output must be a name or a number, got {header!r}")
        return cls(key, function)

    def header(self) -> dict[str, str | int | None]:
        """The description in plain values."""
        return {"key": self.key, "function": self.function}

    def __str__(self) -> str:
        if self.function is not None:
            return f"output={self.function}"
        return "no output=" if self.key is None else f"output={self.key!r}"

    def told(self, output: Output) -> Output:
        """The `output=` to go on with: what was given, or what is known of the one that was used.

        Raises:
            ConfigError: if a function was used and none is given, or if another key or index is given.
        """
        if output is None and self.function is None:
            return self.key
        if output is None:
            raise ConfigError(
                f"this map was made with {self}, a function that its file cannot hold: pass it again as output="
            )
        if (self.function is None) != (Picker.of(output).function is None) or (
            self.function is None and self.key != output
        ):
            raise ConfigError(f"this map was made with {self}, got {Picker.of(output)}")
        return output
