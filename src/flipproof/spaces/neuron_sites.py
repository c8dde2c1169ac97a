"""Which layers' outputs can be hit, and how one of them is stored."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flipproof.errors import FaultSpaceError, FormatError
from flipproof.formats.base import Coding, Format, word_dtype
from flipproof.spaces.sites import Sized
from flipproof.spaces.tensors import FormatChoice, own_format


@dataclass(frozen=True)
class Neurons:
    """Fault space over neurons: elements of a Conv, Linear, LSTM or GRU output, before any activation function.

    Args:
        include: glob patterns over qualified names; a module's name takes all it holds. "*" is everything.
        exclude: the same; it wins over `include`.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> data = [(torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1]))]
        >>> found = fp.assess(net, data=data, faults=fp.RandomBits(1), where=fp.Neurons(), trials=3)
        >>> found.bits, found.trials["flips"].tolist()  # (3 + 2) neurons of 32 bits; one upset a sample
        (160, [5, 5, 5])
    """

    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        for field in ("include", "exclude"):
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))

    def selects(self, name: str) -> bool:
        """Whether this layer belongs to the space."""
        return _matches(name, tuple(self.include)) and not _matches(name, tuple(self.exclude))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    parts = name.split(".")
    held_by = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(outer, pattern) for outer in held_by for pattern in patterns)


@dataclass(frozen=True)
class NeuronSite(Sized):
    """The output of one call of one layer, for one sample.

    Attributes:
        layer: the module's qualified name; `name` is the same, with `[k]` for its second and later calls.
        call: which call of the module in a forward.
        shape: of one sample's output; neurons are its flat (channel-major) indices.
        axis: where samples are counted in the layer's output.
        offset: number of its first bit in the space. Bit b of neuron n is `offset + n · width + b`.
    """

    name: str
    layer: str
    call: int
    shape: tuple[int, ...]
    axis: int
    dtype: torch.dtype
    format: Format
    coding: Coding
    offset: int
    kind: str = "neuron"

    def stored(self, values: Tensor) -> Tensor:
        """Values as they read after being stored in the site's format."""
        if self.format.is_native(values.dtype):
            return values
        words = self.format.encode_values(values, self.coding)
        return self.format.decode_words(words, self.coding, values.dtype)

    def flipped(self, values: Tensor, bits: Tensor) -> Tensor:
        """Each value with the given bit of its word flipped; `bits` (int64) broadcasts against `values`."""
        words = self.format.encode_values(values, self.coding)
        masks = torch.ones_like(bits).bitwise_left_shift(bits).to(word_dtype(self.width))
        return self.format.decode_words(words ^ masks, self.coding, values.dtype)

    def index(self, rows: Tensor, neurons: Tensor) -> tuple[Tensor, ...]:
        """Index of these neurons of these samples into the layer's output."""
        inside = list(torch.unravel_index(neurons, self.shape))
        return (*inside[: self.axis], rows, *inside[self.axis :])


def choose_neuron_format(layer: str, dtype: torch.dtype, choice: FormatChoice) -> Format:
    """The format of a layer's output; its own type if no pattern fits it."""
    patterns = isinstance(choice, Mapping)
    if isinstance(choice, Mapping):
        choice = next((fmt for pattern, fmt in choice.items() if _matches(layer, (pattern,))), None)
    if choice is not None:
        if choice.together > 1:
            raise FormatError(f"{layer}: {choice!r} codes blocks of words; a neuron's output is a word by itself")
        return choice
    if not dtype.is_floating_point or (dtype == torch.float64 and not patterns):
        raise FaultSpaceError(f"{layer} gives {dtype}: pass format= to say how it is stored")
    return own_format(dtype)
