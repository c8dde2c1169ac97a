"""What one changed parameter does: the questions asked of neurons, with weights in their place.

A weight w of a Conv or Linear layer moves one output channel along a line: with v in its place the channel is
y + (v − w) · P, where P is what the weight sees of the layer's input (zeros where it sees the padding). So each row of
a batch can have a weight of its own, and only what lies behind the layer runs, as for neurons. Every other parameter,
weights in half precision, and weights of layers that cannot be cut out, are changed in memory, with whole forwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from flipproof.analysis._suffix import Suffix
from flipproof.analysis.neuron_probes import NeuronProber, row_wise
from flipproof.analysis.probes import Probe, Prober
from flipproof.errors import FaultSpaceError, InfrastructureError
from flipproof.formats.base import Stored, dense, word_dtype
from flipproof.running.data import Batches, Output, call, pick
from flipproof.running.evaluation import is_infrastructure
from flipproof.running.judge import Judge
from flipproof.running.neurons import neuron_space
from flipproof.running.snapshots import Snapshot
from flipproof.running.values import bytes_of, rows_of
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.quantised import is_wrapper
from flipproof.spaces.sites import Neurons, NeuronSite, Site

CHECKED = 16
"""Injections of an audit that are made in the model's own memory, a parameter."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ParameterProber(Prober):
    """Probes of a model's parameters on given batches; the space has to be `stored()` while it is used.

    Args:
        space: the parameters, with their formats.
        batches: the inputs.
        golden: fault-free outputs of all samples, on the CPU.
        max_bytes: bound on the activations of a probing batch.
        state: of the fault-free model.
    """

    def __init__(
        self,
        model: nn.Module,
        space: FaultSpace,
        batches: Batches,
        output: Output,
        golden: Tensor,
        judge: Judge,
        max_bytes: int,
        state: Snapshot,
    ) -> None:
        super().__init__(model, batches, output, golden, judge, state)
        self.space = space
        if packed := [name for name, tensor in space.tensors.items() if not tensor.is_floating_point()]:
            raise FaultSpaceError(
                f"{packed[0]} is stored as packed words or integers: analyse the model before fp.pack_ or quantising, "
                f"with format= for what it will be stored as; fp.inject_all tries words as they are"
            )
        if space.copies:
            raise FaultSpaceError(
                f"{space.copies[0]} lies in an object of torch.ao, which takes no writes: analyse the floating-point "
                f"model, or try every bit with fp.inject_all"
            )
        modules = dict(model.named_modules())
        self._sites = {site.name: site for site in space.sites}
        self._lines = {site.name: modules[site.layer] for site in space.sites if _moves_on_a_line(modules, site)}
        layers = tuple(dict.fromkeys(site.layer or "*" for site in space.sites if site.name in self._lines))
        self._neurons: NeuronProber | None = None
        if layers:
            try:
                neurons = neuron_space(model, batches, Neurons(include=layers), None, output)
            except FaultSpaceError:  # no layer gives one row a sample
                neurons = None
            if neurons is not None:
                self._neurons = NeuronProber(model, neurons, batches, output, golden, judge, max_bytes, state)
                self._neurons.costs = self.costs
        self.traced = self._neurons is not None and self._neurons.traced
        first = golden[: batches.sizes[0]]
        self.row_wise = row_wise(model, batches.inputs[0], batches.sizes[0], lambda r: pick(r, output).cpu(), first)
        """Whether samples of a batch may be run apart from the others."""
        self._layer: str | None = None
        self._kept: dict[int, tuple[Suffix | None, Tensor | None]] = {}
        self._max_bytes = self._room = max_bytes
        self.checked: dict[str, int] = {}
        """How many injections of an audit were made in memory, by parameter."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """The parameters that can be asked about."""
        return self.space.sites

    def multiplications_behind(self, site: str) -> int:
        """Multiply-accumulates of a forward that are made behind the parameter's layer."""
        return self.multiplications.behind(self._sites[site].layer)

    def coverage(self) -> tuple[float, dict[str, str]]:
        """Bits of the analysed parameters ÷ these and those of what is left out, in its own type; and the latter."""
        return self.space.coverage, dict(self.space.left_out)

    def originals(self) -> dict[str, Tensor]:
        """Values that a format replaced."""
        return self.space.originals()

    def forget(self) -> None:
        """Drop the suffix and the input of the last layer, and how many injections were made in memory."""
        self._layer, self._kept, self._room = None, {}, self._max_bytes
        self.checked.clear()
        if self._neurons is not None:
            self._neurons.forget()

    def at(self, site: str, batch: int) -> ParameterProbe:
        """The questions one can ask of this parameter about this batch."""
        line = None
        neurons = self._output_of(site)
        if self._neurons is not None and neurons is not None:
            suffix, seen = self._cut_out(neurons, batch)
            if suffix is not None and seen is not None:
                line = _Line(self._lines[site], self._sites[site], batch, suffix, seen, self._neurons)
        return ParameterProbe(self, self._sites[site], batch, line)

    def _cut_out(self, neurons: NeuronSite, batch: int) -> tuple[Suffix | None, Tensor | None]:
        """What runs behind a layer and what it sees; kept for the layer's next parameter, as far as memory allows."""
        assert self._neurons is not None
        if self._layer != neurons.name:
            self._layer, self._kept, self._room = neurons.name, {}, self._max_bytes
        if batch in self._kept:
            return self._kept[batch]
        suffix = self._neurons.suffix(neurons.name, batch)
        seen = None
        if suffix is not None and not self._neurons.gathers(neurons.name, batch, suffix):
            suffix = None  # samples feel each other: a weight is changed for all of them
        if suffix is not None:
            seen = _input_of(self.model, neurons.layer, self.batches.inputs[batch])
            self.costs.preparing += self.batches.sizes[batch]
        size = bytes_of([seen, suffix.live]) if suffix is not None else 0
        if size <= self._room:
            self._room -= size
            self._kept[batch] = (suffix, seen)
        return suffix, seen

    def cuts(self, site: str) -> bool:
        """Whether questions about this parameter run only what lies behind its layer."""
        neurons = self._output_of(site)
        return neurons is not None and self._neurons is not None and self._neurons.cuts(neurons.name)

    def _output_of(self, site: str) -> NeuronSite | None:
        """The output that the parameter moves along a line; None if there is not one."""
        if site not in self._lines or self._neurons is None:
            return None
        layer = self._sites[site].layer
        if self._neurons.space.calls.get(layer, 1) > 1:  # the weight moves the output of every call
            return None
        return next((found for found in self._neurons.sites if found.name == layer), None)


class ParameterProbe(Probe):
    """Probes of one parameter on one batch; its values are as its format stores them, the same for every sample."""

    def __init__(self, prober: ParameterProber, site: Site, batch: int, line: _Line | None) -> None:
        self._prober, self._site, self._batch, self._line = prober, site, batch, line
        self._size = prober.batches.sizes[batch]
        self.classes = prober.classes[prober.batches.part(batch)]
        self._tensor = prober.space.tensors[site.name].data
        original = prober.originals().get(site.name, self._tensor)
        coding = site.format.fit(original)
        words = site.format.encode_values(original, dense(coding, original.shape))
        self._stored = Stored(site.format, words.contiguous(), coding, site.dtype)
        self.values = self._stored.decode().reshape(1, -1).expand(self._size, -1)
        self.last = line is not None and line.last

    def flips(self, rows: Tensor, places: Tensor) -> Tensor:
        """What each value would be with each bit of its word flipped; (n, bits)."""
        golden = self._stored.words.reshape(-1)[places]
        found = []
        for bit in range(self._site.width):
            mask = torch.ones_like(places).bitwise_left_shift(bit).to(word_dtype(self._site.width))
            found.append(self._stored.decode_at(places, golden ^ mask))
        return torch.stack(found, dim=1)

    def critical(self, rows: Tensor, places: Tensor, values: Tensor, *, shortcuts: bool = True) -> Tensor:
        """Whether each change is critical.

        `shortcuts`: of what moves on a line, run only what lies behind it, and skip what provably computes the same;
        without them, the parameter is changed in memory and everything runs.
        """
        if shortcuts and self._line is not None:
            return self._line.critical(rows, places, values)
        result = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        pairs, which = torch.unique(torch.stack([places, _as_bits(values)]), dim=1, return_inverse=True)
        for i in range(pairs.shape[1]):
            here = (which == i).nonzero()[:, 0]
            result[here] = self._in_memory(rows[here], int(places[here[0]]), values[here[0]])
        return result

    def truth(self, rows: Tensor, places: Tensor, values: Tensor) -> Tensor:
        """As `critical`, the first `CHECKED` changes in memory; the others as the tests hold equal to that."""
        some = min(values.numel(), max(0, CHECKED - self._prober.checked.get(self._site.name, 0)))
        self._prober.checked[self._site.name] = self._prober.checked.get(self._site.name, 0) + some
        first, rest = slice(None, some), slice(some, None)
        return torch.cat(
            [
                self.critical(rows[first], places[first], values[first], shortcuts=False),
                self.critical(rows[rest], places[rest], values[rest]),
            ]
        )

    def _in_memory(self, rows: Tensor, place: int, value: Tensor) -> Tensor:
        """The same value for these rows, in the parameter itself."""
        prober = self._prober
        inputs, at = prober.batches.inputs[self._batch], rows.cpu()
        if prober.row_wise:
            inputs, at = rows_of(inputs, rows, self._size), torch.arange(rows.numel())
        spot = torch.unravel_index(torch.tensor(place, device=self._tensor.device), self._tensor.shape)
        before = self._tensor[spot].clone()
        ran = rows.numel() if prober.row_wise else self._size
        prober.costs.probes, prober.costs.whole = prober.costs.probes + ran, prober.costs.whole + ran
        try:
            self._tensor[spot] = value
            outputs = pick(call(prober.model, inputs), prober.output).cpu()[at]
        except Exception as error:  # the faulty model raised: on which of these samples?
            if is_infrastructure(error):
                raise InfrastructureError(f"{self._site.name}: {type(error).__name__}: {error}") from error
            if rows.numel() == 1 or not prober.row_wise:
                return torch.ones(rows.numel(), dtype=torch.bool, device=value.device)
            parts = torch.split(rows, -(-rows.numel() // 2))
            self._tensor[spot] = before
            return torch.cat([self._in_memory(part, place, value) for part in parts])
        finally:
            self._tensor[spot] = before
        return prober.critical(self._batch, rows, outputs).to(value.device)


class _Line:
    """A Conv or Linear layer whose output a changed weight moves along a line."""

    def __init__(self, module: Any, site: Site, batch: int, suffix: Suffix, seen: Tensor, prober: NeuronProber) -> None:
        self._module, self._batch, self._suffix, self._prober = module, batch, suffix, prober
        self._bias = site.name.rpartition(".")[2] == "bias"
        self._conv = isinstance(module, _CONVOLUTIONS)
        self._shape = site.shape
        self.last = suffix.last
        self._relu = suffix.relu_behind
        if self._conv:  # as the layer itself pads
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            seen = F.pad(seen, module._reversed_padding_repeated_twice, mode=mode)
        self._seen = seen

    def critical(self, rows: Tensor, places: Tensor, values: Tensor) -> Tensor:
        """As `ParameterProbe.critical`."""
        result = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        golden = self._weight()[places]
        for part in torch.split(torch.arange(values.numel(), device=values.device), self._prober.rows):
            kept, moved = self._moved(rows[part], places[part], values[part] - golden[part])
            if not kept.numel():
                continue
            asked = part[kept]
            channels = self._channels(places[asked])
            result[asked] = self._harm(rows[asked], channels, moved).to(result.device)
            self._prober.costs.probes += 0 if self.last else asked.numel()
        return result

    def _harm(self, rows: Tensor, channels: Tensor, moved: Tensor) -> Tensor:
        """Whether each row, with its channel replaced, answers critically or NaN, or makes the model raise."""

        def change(output: Tensor) -> None:
            self._by_channel(output)[torch.arange(channels.numel(), device=channels.device), channels] = moved

        try:
            return self._prober.critical(self._batch, rows, self._prober.outputs(self._suffix.run(rows, change)))
        except Exception as error:
            if is_infrastructure(error):
                raise InfrastructureError(f"{type(error).__name__}: {error}") from error
            if rows.numel() == 1:
                return torch.ones(1, dtype=torch.bool)
        half = -(-rows.numel() // 2)
        parts = zip(*(torch.split(each, half) for each in (rows, channels, moved)), strict=True)
        return torch.cat([self._harm(*part) for part in parts])

    def _moved(self, rows: Tensor, places: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows get another channel that the layers behind can tell from the golden one, and those channels."""
        golden = self._by_channel(self._suffix.at(rows))
        golden = golden[torch.arange(rows.numel(), device=rows.device), self._channels(places)]
        pattern = self._pattern(rows, places)
        moved = golden + change.reshape(-1, *[1] * (golden.dim() - 1)) * pattern
        same = (moved == golden) | (self._relu & (moved.clamp(min=0) == golden.clamp(min=0)))  # NaN equals nothing
        same = same.flatten(1).all(dim=1) if same.dim() > 1 else same
        kept = (~same).nonzero()[:, 0]
        return kept, moved[kept]

    def _weight(self) -> Tensor:
        tensor: Tensor = (self._module.bias if self._bias else self._module.weight).data
        return tensor.reshape(-1)

    def _channels(self, places: Tensor) -> Tensor:
        """The output channel that each weight belongs to."""
        return places if self._bias else torch.unravel_index(places, self._shape)[0]

    def _by_channel(self, output: Tensor) -> Tensor:
        """A view of an output as (rows, channels, everything else)."""
        return output if self._conv else output.movedim(-1, 1)

    def _pattern(self, rows: Tensor, places: Tensor) -> Tensor:
        """What each weight sees of each row, in the place of every element of its channel; (n, …) that broadcasts."""
        if self._bias:
            return torch.ones((), dtype=self._seen.dtype, device=self._seen.device)
        where = torch.unravel_index(places, self._shape)
        if not self._conv:
            return self._seen[rows].movedim(-1, 1)[torch.arange(rows.numel(), device=rows.device), where[1]]
        module, dims = self._module, len(self._shape) - 2
        first = where[0] // (self._shape[0] // module.groups) * self._shape[1]  # its group's first input channel
        index = [t.reshape(-1, *[1] * dims) for t in (rows, first + where[1])]
        for d in range(dims):
            steps = torch.arange(self._suffix.shape[2 + d], device=rows.device) * module.stride[d]
            taps = where[2 + d].reshape(-1, *[1] * dims) * module.dilation[d]
            index.append(taps + steps.reshape([-1 if e == d else 1 for e in range(-1, dims)]))
        return self._seen[tuple(index)]


def _moves_on_a_line(modules: dict[str, nn.Module], site: Site) -> bool:
    """Whether the site is the weight or bias of a plain Conv or Linear layer, and of nothing else.

    Not in half precision: such a layer adds up in float32 and rounds once, and what the golden output lost in that
    cannot be had back, so that y + (v − w) · P lands on a neighbouring number now and then.
    """
    module, attribute = modules[site.layer], site.name.rpartition(".")[2]
    return (
        site.dtype.itemsize >= 4
        and type(module) in (*_CONVOLUTIONS, nn.Linear)
        and attribute in ("weight", "bias")
        and not site.aliases
        and not parametrize.is_parametrized(module)
        and not any(is_wrapper(parameter) for parameter in module.parameters(recurse=False))
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def _input_of(model: nn.Module, layer: str, inputs: Any) -> Tensor:
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((*args, *kwargs.values())[0].clone())

    handle = model.get_submodule(layer).register_forward_pre_hook(note, with_kwargs=True)
    try:
        call(model, inputs)
    finally:
        handle.remove()
    return found[0]


def _as_bits(values: Tensor) -> Tensor:
    """A number for each value that differs where values do, also for NaNs and zeros of both signs."""
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[values.element_size()]
    return values.contiguous().view(whole).to(torch.int64)
