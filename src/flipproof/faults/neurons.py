"""The fault space of computed values: every bit of every Conv, Linear, LSTM or GRU output of one inference.

A fault here is a transient upset while a sample is computed, so each sample of a trial has a fault of its own. The
model's parameters are never touched; forward hooks, removed again, change the one element.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence

from flipproof.errors import FaultModelError, FaultSpaceError, FormatError
from flipproof.faults.models import BitPosition, FaultModel, Faults, RandomBits
from flipproof.faults.sampling import Positions, TrialGenerator
from flipproof.faults.selection import _NATIVE, FormatChoice
from flipproof.formats.base import Coding, Format, word_dtype

_LAYERS = (_ConvNd, nn.Linear, nn.LSTM, nn.GRU)


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
class NeuronSite:
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

    @property
    def values(self) -> int:
        """Neurons."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def width(self) -> int:
        """Bits a neuron."""
        return self.format.width

    @property
    def bits(self) -> int:
        """Bits in all."""
        return self.values * self.width

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


Change = Callable[[NeuronSite, Tensor], Tensor | None]
"""Given a site and its stored output: the output to go on with, or None for the same."""


class NeuronSpace:
    """Every bit of every selected layer output of one sample's inference, numbered from 0.

    Args:
        model: any module; hooks are on it only while `stored()` is active.
        forwards: one function a batch that runs the model, and the samples of that batch.
        where: which layers.
        format: how outputs are stored: None for each tensor's own type, one Format, or {pattern: Format}. `Affine`
            takes its range from the fault-free outputs over all batches.

    Raises:
        FaultSpaceError: if no layer is left, with the reason for each.
        FormatError: naming the layer whose outputs the format cannot hold.
    """

    def __init__(
        self,
        model: nn.Module,
        forwards: Sequence[tuple[Callable[[], object], int]],
        *,
        where: Neurons | None = None,
        format: FormatChoice = None,
    ) -> None:
        where = where or Neurons()
        self.model = model
        self.left_out: dict[str, str] = {}
        """Layers that are not in the space, and why."""
        seen = _Observer(model, where, self.left_out)
        seen.watch(forwards)
        sites: list[NeuronSite] = []
        offset = 0
        for (layer, call), (shape, axis, dtype, low, high) in seen.found.items():
            chosen = _choose(layer, dtype, format)
            if chosen is None:
                self.left_out[layer] = "no pattern of format= fits it"
                continue
            try:  # only extremes matter to the formats that look at a whole tensor; one of them may be a constant
                coding = chosen.fit(torch.stack([low, high]))
            except FormatError as error:
                raise FormatError(f"{layer}: {error}") from None
            if any(part.dim() for part in coding):
                raise FormatError(f"{layer}: {chosen!r} has a scale a channel; activations take one scale (axis=None)")
            name = f"{layer}[{call}]" if call else layer
            site = NeuronSite(name, layer, call, shape, axis, dtype, chosen, coding, offset)
            offset += site.bits
            sites.append(site)
        if not sites:
            raise FaultSpaceError(
                f"no neuron is left to hit with {where!r} and format={format!r}: it takes Conv, Linear, LSTM and GRU "
                f"modules that the forward calls. Left out: {self.left_out or 'nothing, there are none'}"
            )
        self.sites: tuple[NeuronSite, ...] = tuple(sites)
        self.bits = offset
        self.calls = {s.layer: 1 + max(o.call for o in sites if o.layer == s.layer) for s in sites}
        self._firsts = np.array([site.offset for site in sites], np.int64)
        self._by_call = {(s.layer, s.call): s for s in sites}
        self._counts: dict[str, int] = {}
        self._change: Change | None = None
        self._faults: tuple[Positions, Positions, Positions, Positions] | None = None
        self._batch = 0

    def site(self, name: str) -> NeuronSite:
        """The site of this name.

        Raises:
            FaultSpaceError: if there is none.
        """
        for site in self.sites:
            if site.name == name:
                return site
        raise FaultSpaceError(f"{name!r} is not in the neuron space; it holds {[s.name for s in self.sites]}")

    @property
    def repeated(self) -> bool:
        """Whether some layer is called more than once in a forward."""
        return any(count > 1 for count in self.calls.values())

    def check(self, point: FaultModel) -> None:
        """Raise FaultModelError unless this point is a single upset."""
        if not (isinstance(point, BitPosition) or point == RandomBits(1)):
            raise FaultModelError(
                f"where=fp.Neurons() injects a single upset into each sample's inference: faults= takes "
                f"fp.RandomBits(1) or fp.BitPosition(bits), got {point!r}"
            )
        point.check(self)  # type: ignore[arg-type]

    def draw(self, point: FaultModel, samples: int, generator: TrialGenerator) -> Faults:
        """One bit a sample, all in the output of one layer, which is drawn first, in proportion to its bits.

        So every sample's fault is uniform over the space; those of one trial share the layer, which lets the trial
        start there, and are otherwise independent.
        """
        bit = point.coordinates()["bit"] if isinstance(point, BitPosition) else None
        sizes = [s.bits if bit is None else s.values if bit < s.width else 0 for s in self.sites]
        borders = np.cumsum(sizes)
        chosen = self.sites[int(np.searchsorted(borders, generator.below(int(borders[-1]), 1)[0], side="right"))]
        if bit is None:
            return Faults(chosen.offset + generator.below(chosen.bits, samples))
        return Faults(chosen.offset + generator.below(chosen.values, samples) * chosen.width + int(bit))

    def places(self, faults: Faults) -> list[tuple[str, int, int]]:
        """The faults as (layer, neuron, bit), one a sample."""
        which, value, bit = self._located(faults.positions)
        return [
            (self.sites[i].name, v, b) for i, v, b in zip(which.tolist(), value.tolist(), bit.tolist(), strict=True)
        ]

    def _located(self, positions: Positions) -> tuple[Positions, Positions, Positions]:
        which = np.searchsorted(self._firsts, positions, side="right") - 1
        widths = np.array([site.width for site in self.sites], np.int64)
        value, bit = np.divmod(positions - self._firsts[which], widths[which])
        return which, value, bit

    def originals(self) -> dict[str, Tensor]:
        """No parameter is replaced."""
        return {}

    @contextmanager
    def stored(self) -> Iterator[None]:
        """While active, layer outputs are what their format can represent, and `corrupted` and `changed` work."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        self._counts = {}
        handles = [modules[layer].register_forward_hook(self._hook(layer)) for layer in self.calls]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, batch: int) -> None:
        """A run of this batch starts."""
        self._counts = {}
        self._batch = batch

    @contextmanager
    def changed(self, change: Change) -> Iterator[None]:
        """While active, `change` may replace the output of every site."""
        self._change = change
        try:
            yield
        finally:
            self._change = None

    @contextmanager
    def corrupted(self, faults: Faults, sizes: Sequence[int]) -> Iterator[int]:
        """While active, sample i's inference has the i-th of these faults; `begin` tells which batch runs.

        Yields:
            How many bits change: one a sample.
        """
        self._faults = (*self._located(faults.positions), np.cumsum([0, *sizes]))
        try:
            with self.changed(self._hit):
                yield len(faults)
        finally:
            self._faults = None

    def hit(self, site: NeuronSite, output: Tensor) -> Tensor:
        """While `corrupted`: a stored output of a layer with the faults of the batch that runs in it."""
        faulty = self._hit(site, output)
        return output if faulty is None else faulty

    def _hit(self, site: NeuronSite, output: Tensor) -> Tensor | None:
        assert self._faults is not None
        which, neuron, bit, borders = self._faults
        part = slice(int(borders[self._batch]), int(borders[self._batch + 1]))
        rows = np.flatnonzero(which[part] == self.sites.index(site))
        if not rows.size:
            return None
        place, which_bit = (torch.from_numpy(a[part][rows]).to(output.device) for a in (neuron, bit))
        index = site.index(torch.from_numpy(rows).to(output.device), place)
        faulty = output.clone()
        faulty[index] = site.flipped(output[index], which_bit)
        return faulty

    def _hook(self, layer: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, result: Any) -> Any:
            call = self._counts.get(layer, 0) % self.calls[layer]
            self._counts[layer] = call + 1
            site = self._by_call.get((layer, call))
            if site is None:
                return None
            output = result[0] if isinstance(result, tuple) else result
            found = site.stored(output)
            if self._change is not None:
                replaced = self._change(site, found)
                found = found if replaced is None else replaced
            if found is output:
                return None
            return (found, *result[1:]) if isinstance(result, tuple) else found

        return hook


class _Observer:
    """What every layer gives, over all batches: shape, type, extremes."""

    def __init__(self, model: nn.Module, where: Neurons, left_out: dict[str, str]) -> None:
        self._model, self._left_out = model, left_out
        self.found: dict[tuple[str, int], tuple[tuple[int, ...], int, torch.dtype, Tensor, Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._size = 0
        self._layers = {}
        for name, module in model.named_modules():
            if not isinstance(module, _LAYERS):
                continue
            if where.selects(name or "*"):
                self._layers[name] = module
            else:
                left_out[name] = "not selected by where="

    def watch(self, forwards: Sequence[tuple[Callable[[], object], int]]) -> None:
        """Run every batch once."""
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self._layers.items()]
        try:
            for forward, self._size in forwards:
                self._counts = {}
                forward()
        finally:
            for handle in handles:
                handle.remove()
        for name in self._layers:
            if (name, 0) not in self.found and name not in self._left_out:
                self._left_out[name] = "the forward never calls it as a module"
        self.found = {key: value for key, value in self.found.items() if key[0] not in self._left_out}

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            output = result[0] if isinstance(result, tuple) else result
            call = self._counts.get(name, 0)
            self._counts[name] = call + 1
            if not isinstance(output, Tensor) or isinstance(output, PackedSequence):
                self._left_out[name] = f"its output is a {type(output).__name__}"
                return
            axis = int(isinstance(module, nn.RNNBase) and not module.batch_first)
            if output.dim() <= axis or output.shape[axis] != self._size:
                self._left_out[name] = (
                    f"its output {tuple(output.shape)} does not count {self._size} samples along axis {axis}"
                )
                return
            shape = tuple(size for i, size in enumerate(output.shape) if i != axis)
            low, high = output.min(), output.max()
            before = self.found.get((name, call))
            if before is not None:
                if before[0] != shape:
                    self._left_out[name] = f"its output changes shape between batches: {before[0]}, {shape}"
                low, high = torch.minimum(low, before[3]), torch.maximum(high, before[4])
            self.found[name, call] = (shape, axis, output.dtype, low, high)

        return hook


def _choose(layer: str, dtype: torch.dtype, choice: FormatChoice) -> Format | None:
    if isinstance(choice, Mapping):
        choice = next((fmt for pattern, fmt in choice.items() if _matches(layer, (pattern,))), None)
        if choice is None:
            return None
    if choice is not None:
        if choice.together > 1:
            raise FormatError(f"{layer}: {choice!r} codes blocks of words; a neuron's output is a word by itself")
        return choice
    if dtype not in _NATIVE:
        raise FaultSpaceError(f"{layer} gives {dtype}, which has no format of its own; pass format=")
    return _NATIVE[dtype]
