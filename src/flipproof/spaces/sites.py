"""What a user asks for: parameters, neurons; and what a space knows of each tensor that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flipproof.errors import FaultSpaceError, FormatError
from flipproof.formats import Format
from flipproof.formats.base import Coding, word_dtype
from flipproof.spaces.contract import Sized
from flipproof.spaces.tensors import KINDS, Candidate, FormatChoice, Kind, matches, own_format


@dataclass(frozen=True)
class Parameters:
    """Fault space over a model's parameters: weights, biases, normalisation, thresholds, whatever it registers.

    Of quantised layers it takes words, scales and zero points wherever their library keeps them.

    Args:
        include: glob patterns over qualified names; a module's name takes all it holds. "*" is everything.
        exclude: the same; it wins over `include`.
        buffers: also hit buffers: BatchNorm's running statistics, tables of indices (whose faults raise on a CPU, which
            is a DUE, but can stop a CUDA device for good: exclude them there). Counters that inference never reads
            (`num_batches_tracked`) stay out, and so do Boolean ones. Buffers that hold the words of a quantised layer,
            its scales or zero points are no buffers here, but what they are for.
        kinds: keep only these of "weight", "bias", "norm", "buffer", "other" and, of quantised layers, "scale" and
            "zero_point"; () keeps all. ``kinds=("weight",)`` is FORTUNE's view: whatever a module calls a weight,
            normalisation left aside, and nothing else; of a quantised layer, its words.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> fp.FaultSpace(net, where=fp.Parameters(exclude="*.bias")).bits
        576
    """

    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    buffers: bool = False
    kinds: Sequence[Kind] = ()

    def __post_init__(self) -> None:
        for field in ("include", "exclude", "kinds"):
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise FaultSpaceError(f"Parameters: kinds must be among {list(KINDS)}, got {unknown}")

    def asks_for(self, candidate: Candidate) -> bool:
        """Whether names and kinds select this tensor; if not, it was left out on purpose."""
        return (
            candidate.matches(tuple(self.include))
            and not candidate.matches(tuple(self.exclude))
            and (not self.kinds or candidate.kind in self.kinds)
        )

    def leaves_out(self, candidate: Candidate) -> str:
        """Why this tensor is not in the space; "" if it is."""
        if not self.asks_for(candidate):
            return "not selected by where="
        if candidate.problem and not candidate.refused:
            return candidate.problem
        if candidate.is_buffer and not self.buffers:
            return "a buffer: fp.Parameters(buffers=True) takes it"
        return ""


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
        return matches([name], self.include) and not matches([name], self.exclude)


def check_where(where: object) -> Parameters:
    """The parameters that were asked for, all of them by default.

    Raises:
        FaultSpaceError: if this says something else.
    """
    if where is None:
        return Parameters()
    if isinstance(where, Parameters):
        return where
    if isinstance(where, Neurons):
        raise FaultSpaceError(
            f"{where!r} are computed values, not stored ones: pass them to fp.assess(…, where=fp.Neurons()) or "
            f"fp.analyze; what is asked for here takes fp.Parameters"
        )
    patterns = f"include={where!r}" if isinstance(where, (str, list, tuple)) else "…"
    raise FaultSpaceError(f"where= takes fp.Parameters({patterns}), got {where!r}")


@dataclass(frozen=True)
class Site(Sized):
    """One stored tensor of the space.

    Attributes:
        name: qualified name; `aliases` are its other names if it is tied.
        layer: qualified name of the module that owns it.
        kind: "weight", "bias", "norm", "buffer" or "other"; "scale" or "zero_point" of a quantised layer.
        offset: number of its first bit in the space. Bit b of value v is `offset + v · width + b`; where words of a
            block differ in width, they lie one behind the other just so (`layout`).
    """

    name: str
    aliases: tuple[str, ...]
    layer: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: Format
    offset: int


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
        choice = next((fmt for pattern, fmt in choice.items() if matches([layer], [pattern])), None)
    if choice is not None:
        if choice.together > 1:
            raise FormatError(f"{layer}: {choice!r} codes blocks of words; a neuron's output is a word by itself")
        if choice.stored_constants:
            raise FormatError(
                f"{layer}: {choice!r} stores constants of a tensor; a neuron's output is a word by itself"
            )
        return choice
    if not dtype.is_floating_point or (dtype == torch.float64 and not patterns):
        raise FaultSpaceError(f"{layer} gives {dtype}: pass format= to say how it is stored")
    return own_format(dtype)
