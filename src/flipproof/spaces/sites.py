"""What a user asks for: parameters, neurons; and what a space knows of each tensor that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flipproof.errors import FaultSpaceError, FormatError
from flipproof.formats import Format
from flipproof.formats.base import Coding, word_dtype
from flipproof.spaces.contract import Sized
from flipproof.spaces.tensors import KINDS, Candidate, FormatChoice, Kind, matches, own_format

NeuronKind = Literal[
    "conv", "linear", "recurrent", "embedding", "norm", "activation", "residual", "query", "key", "value", "scores",
    "context", "functional", "gates", "cell",
]  # fmt: skip
NEURON_KINDS: tuple[NeuronKind, ...] = (
    "conv", "linear", "recurrent", "embedding", "norm", "activation", "residual", "query", "key", "value", "scores",
    "context", "functional", "gates", "cell",
)  # fmt: skip
LAYERS: tuple[NeuronKind, ...] = ("conv", "linear", "recurrent")
"""What `Neurons()` takes."""


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


@dataclass(frozen=True, repr=False)
class Neurons:
    """Fault space over computed values: elements of a Conv, Linear, LSTM or GRU output, before any activation function.

    Other `kinds` are what transformers compute besides. Values that no module gives have names of their own, such as
    ``blocks.0.attention:query``: the module that ran, and what the value is there; ``[k]`` follows at the second and
    later ones. Where kinds other than layers are asked for, no fused layer computes attention, and where scores, gates
    or cells are, it is computed step by step: in the golden run too, whose answers may differ by rounding.

    Args:
        include: glob patterns over qualified names; a module's name takes all it holds. "*" is everything.
        exclude: the same; it wins over `include`.
        kinds: which values, () for all of these:

            - "conv", "linear", "recurrent": outputs of these layers, the default. A Hugging Face `Conv1D` is a linear.
            - "embedding", "norm", "activation": outputs of such modules, of Hugging Face's own classes too, and of
              such functions (`F.layer_norm`, `F.gelu`) called in a forward.
            - "residual": sums of two computed tensors of one shape, as x + f(x); not those of masks and of rotary
              positions.
            - "query", "key", "value": what attention is given. "scores": QKᵀ/√d with its mask, named ``…:scores``, and
              their softmax, named ``…:probabilities``. "context": what attention gives.
            - "functional": products called in a forward as functions: `F.linear`, `F.conv2d`, `matmul`.
            - "gates": i, f, g, o of an LSTM, after their sigmoid or tanh; r, z (``…:gates``) and n (``…:candidate``) of
              a GRU; a site a step, numbered by time in both directions. "cell": the cell state of an LSTM, and the
              state of a GRU (``…:state``), behind every step.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> data = [(torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1]))]
        >>> found = fp.assess(net, data=data, faults=fp.RandomBits(1), where=fp.Neurons(), trials=3)
        >>> found.bits, found.trials["flips"].tolist()  # (3 + 2) neurons of 32 bits; one upset a sample
        (160, [5, 5, 5])
        >>> fp.Neurons(kinds=["norm", "embedding"])
        Neurons(include=('*',), exclude=(), kinds=('embedding', 'norm'))
    """

    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    kinds: NeuronKind | Sequence[NeuronKind] = LAYERS

    def __post_init__(self) -> None:
        for field in ("include", "exclude", "kinds"):
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        unknown = [kind for kind in self.kinds if kind not in NEURON_KINDS]
        if unknown:
            raise FaultSpaceError(f"Neurons: kinds must be among {list(NEURON_KINDS)}, got {unknown}")
        asked = tuple(kind for kind in NEURON_KINDS if kind in self.kinds or not self.kinds)
        object.__setattr__(self, "kinds", asked)

    def __repr__(self) -> str:
        # layers alone are written as before there were other kinds: journals are resumed by it
        kinds = "" if self.kinds == LAYERS else f", kinds={self.kinds!r}"
        return f"Neurons(include={self.include!r}, exclude={self.exclude!r}{kinds})"

    @property
    def asked(self) -> tuple[NeuronKind, ...]:
        """The kinds, in the order in which they are listed above."""
        return tuple(kind for kind in NEURON_KINDS if kind in self.kinds)

    def selects(self, *names: str) -> bool:
        """Whether what has these names belongs to the space."""
        return matches(names, self.include) and not matches(names, self.exclude)


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
class Fold:
    """An axis that counts samples together with something else: heads of all samples, tokens of all samples.

    Attributes:
        axis: its place. Its length is outer · samples · inner; an element of it is (o · samples + n) · inner + i.
        outer: how many of what changes more slowly than the sample.
        inner: how many of what changes more quickly.

    Example:
        >>> fold = Fold(0, 1, 2)  # two heads of each of three samples, one sample behind the other
        >>> fold.opened(torch.arange(6)).tolist(), fold.samples
        ([[0, 1], [2, 3], [4, 5]], 0)
        >>> fold.closed(fold.opened(torch.arange(6))).tolist()
        [0, 1, 2, 3, 4, 5]
    """

    axis: int
    outer: int
    inner: int

    @property
    def samples(self) -> int:
        """Where the opened tensor counts samples."""
        return self.axis + (self.outer > 1)

    def opened(self, value: Tensor) -> Tensor:
        """A view with an axis for each of them; none for what there is one of."""
        samples = value.shape[self.axis] // (self.outer * self.inner)
        sizes = [*([self.outer] * (self.outer > 1)), samples, *([self.inner] * (self.inner > 1))]
        return torch.unflatten(value, self.axis, sizes)

    def closed(self, value: Tensor) -> Tensor:
        """As it was before it was opened."""
        return value.flatten(self.axis, self.axis + (self.outer > 1) + (self.inner > 1))


@dataclass(frozen=True)
class NeuronSite(Sized):
    """What one call of one layer gives, or one step of a forward that no layer gives, for one sample.

    Attributes:
        layer: the qualified name of the module that gives it, or in whose forward it is computed.
        call: how often that was computed before in a forward.
        shape: of one sample's values; neurons are its flat (channel-major) indices.
        axis: where samples are counted in the tensor.
        offset: number of its first bit in the space. Bit b of neuron n is `offset + n · width + b`.
        role: what the value is in the forward of its layer, such as "query"; "" for the layer's output.
        fold: how an axis that counts more than samples is opened; None where `axis` counts samples alone.
        name: that of the layer, then ``:role`` if there is one, then ``[call]`` for the second and later ones.
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
    role: str = ""
    fold: Fold | None = None

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
