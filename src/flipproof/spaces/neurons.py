"""The fault space of computed values: every bit of what layers give in one inference, and of what is between them.

A fault here is a transient upset while a sample is computed, so each sample of a trial has a fault of its own. The
model's parameters are never touched; forward hooks, removed again, change the one element, and where no module gives
it, a function mode does (`steps`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flipproof._hooks import hooked
from flipproof._tensors import copy_alike
from flipproof.errors import FaultSpaceError, FormatError
from flipproof.formats.base import bit_pattern
from flipproof.spaces._observer import Observer, name_of
from flipproof.spaces.contract import Draw, Forwards, Positions, Space, Start, Upsets
from flipproof.spaces.sites import LAYERS, Neurons, NeuronSite, choose_neuron_format
from flipproof.spaces.steps import Place, Steps, Traced, kind_of
from flipproof.spaces.tensors import FormatChoice, check_format, check_model

Change = Callable[[NeuronSite, Tensor], Tensor | None]
"""Given a site and its stored output: the output to go on with, or None for the same."""


class NeuronSpace(Space):
    """Every bit of every selected layer output of one sample's inference, numbered from 0.

    Args:
        model: any module; hooks are on it only while `stored()` is active.
        forwards: one function a batch that runs the model, and the samples of that batch.
        where: which values.
        format: how outputs are stored: None for each tensor's own type, one Format, or {pattern: Format} (what no
            pattern fits keeps its own type). `Affine` takes its range from the fault-free outputs over all batches.
        grown: functions that run the first batch with one sample more; they show where outputs count samples.

    Raises:
        FaultSpaceError: if no layer is left, with the reason for each.
        FormatError: naming the layer whose outputs the format cannot hold.
    """

    def __init__(
        self,
        model: nn.Module,
        forwards: Forwards,
        *,
        where: Neurons | None = None,
        format: FormatChoice = None,
        grown: Sequence[Callable[[], bool]] = (),
    ) -> None:
        where = Neurons() if where is None else where
        if not isinstance(where, Neurons):
            raise FaultSpaceError(f"a neuron space takes where=fp.Neurons(…), got {where!r}")
        check_format(format)
        check_model(model)
        self.model = model
        self.left_out: dict[str, str] = {}
        """Layers that are not in the space, and why."""
        self._steps = Steps(model, where.asked)
        seen = Observer(model, where, self.left_out, self._steps)
        if forwards:
            if self._steps.wanted:
                self._steps.learn(forwards[0][0])
            seen.grow(grown, forwards[0][0])
        seen.watch(forwards)
        sites: list[NeuronSite] = []
        offset = 0
        for place, found in seen.found.items():
            layer, role, call = place
            chosen = choose_neuron_format(name_of((layer, role, 0)), found.dtype, format)
            try:  # only extremes matter to the formats that look at a whole tensor; one of them may be a constant
                coding = chosen.fit(torch.stack([found.low, found.high]))
            except FormatError as error:
                raise FormatError(f"{layer}: {error}") from None
            if any(part.dim() for part in coding):
                raise FormatError(f"{layer}: {chosen!r} has a scale a channel; activations take one scale (axis=None)")
            site = NeuronSite(
                name_of(place), layer, call, found.shape, found.axis, found.dtype, chosen, coding, offset,
                role=role, fold=found.fold,
            )  # fmt: skip
            offset += site.bits
            sites.append(site)
        if not sites:
            takes = "Conv, Linear, LSTM and GRU modules" if where.kinds == LAYERS else "values of these kinds"
            raise FaultSpaceError(
                f"no neuron is left to hit with {where!r} and format={format!r}: it takes {takes} that the forward "
                f"{'calls' if where.kinds == LAYERS else 'computes'}. Left out: "
                f"{self.left_out or 'nothing, there are none'}"
            )
        self.sites: tuple[NeuronSite, ...] = tuple(sites)
        self.bits = offset
        kinds = {name: kind_of(module) for name, module in model.named_modules()}
        hit = {site.layer for site in sites if not site.role or kinds[site.layer] not in LAYERS}
        outside = {name: bits for name, bits in seen.bits_a_sample.items() if name not in hit}
        for name in outside:
            self.left_out.setdefault(name, "fp.Neurons() takes Conv, Linear, LSTM and GRU layers")
        self.left_out_bits = sum(outside.values())
        """Bits a sample of all that, each output in its own type."""
        self._unasked = {
            name: bits
            for name, bits in outside.items()
            if where.selects(name or "*") and (kinds[name] in where.kinds or where.kinds == LAYERS)
        }
        fused = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
        if not fused and not any(site.role for site in sites):  # hooks on layers are all that is needed
            self._steps = Steps(model, ())
        self.calls = {
            s.layer: 1 + max(o.call for o in sites if o.layer == s.layer and not o.role) for s in sites if not s.role
        }
        """How often each layer is called in a forward, if what it gives can be hit."""
        self._by_place: dict[Place, NeuronSite] = {(s.layer, s.role, s.call): s for s in sites}
        self._counts: dict[str, int] = {}
        self._change: Change | None = None
        self._faults: tuple[Positions, Positions, Positions] | None = None
        self._batch = 0
        self._only: list[int] | None = None
        self._batches = np.cumsum([0, *(size for _, size in forwards)])

    @property
    def samples(self) -> int:
        """Samples of all batches: a draw has an upset for each."""
        return int(self._batches[-1])

    def again(self, model: nn.Module) -> NeuronSpace:
        """The same space of a copy of the model."""
        space = copy(self)
        space.model, space._counts, space._change, space._faults, space._only = model, {}, None, None, None
        space._steps = self._steps.again(model)
        return space

    @property
    def follows(self) -> bool:
        """Whether a function mode follows forwards: sites are then known only in runs of the whole model."""
        return self._steps.wanted

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
    def coverage(self) -> float:
        """Bits that can be hit ÷ bits of the outputs of all modules with weights that multiply, for one sample.

        These are Conv, Linear, Bilinear, recurrent and MultiheadAttention modules that the forward calls; outputs that
        can be hit count in their format, others in their own type. Other values count where they can be hit.
        """
        return self.bits / (self.bits + self.left_out_bits)

    def shortfall(self) -> str | None:
        """A sentence on what is missing, if more than 1 % of those bits are outside without being asked for."""
        if sum(self._unasked.values()) <= 0.01 * (self.bits + self.left_out_bits):
            return None
        named = [f"{name} ({bits:,} bits; {self.left_out[name]})" for name, bits in list(self._unasked.items())[:3]]
        more = f" and {len(self._unasked) - 3} more" if len(self._unasked) > 3 else ""
        return (
            f"only {100 * self.coverage:.3g} % of the bits that layers compute for a sample can be hit. Outside the "
            f"fault space: {'; '.join(named)}{more}. Leave them out on purpose with where=fp.Neurons(exclude=[…]) and "
            f"this is not said"
        )

    def site_of(self, draw: Draw) -> NeuronSite:
        """The site that a trial's upsets share."""
        return self.sites[int(self.located(draw.positions[:1])[0][0])]

    def layer_of(self, draw: Draw) -> str:
        """Its name."""
        return self.site_of(draw).name

    def start(self, draw: Draw) -> Start:
        """Right behind the layer that the upsets share, or where a trace holds the value."""
        site = self.site_of(draw)

        def change(output: Any) -> Any:
            if site.fold is not None:
                return site.fold.closed(self.hit(site, site.fold.opened(output)))
            return (self.hit(site, output[0]), *output[1:]) if isinstance(output, tuple) else self.hit(site, output)

        if site.role:
            return Start(site=site.name, change=change)
        if self.follows and not self._starts:
            return Start()
        return Start(layer=site.layer, change=change, plain=self._plain)

    def starts(self) -> dict[str, int]:
        """Every layer whose output counts samples first; none where a layer is called again, since calls are counted
        from the start of a forward, or where what runs behind it would not be what runs in a whole forward.
        """
        repeated = any(count > 1 for count in self.calls.values())
        layers = [site for site in self.sites if not site.role and site.axis == 0]
        return {} if repeated or not self._starts else {site.layer: site.bits for site in layers}

    @property
    def _plain(self) -> bool:
        """Whether no format changes what is computed."""
        return all(site.format.is_native(site.dtype) for site in self.sites)

    @property
    def _starts(self) -> bool:
        """Whether a run from a cut computes as a whole forward: with no function mode on, as with one."""
        return not self.follows or (self._plain and self._steps.keeps_kernels)

    def traced(self, nodes: Sequence[Any]) -> dict[str, Traced]:
        """Where a trace of the model holds sites that no module gives."""
        if not self._starts:
            return {}
        found = self._steps.traced(nodes)
        return {site.name: found[place] for place, site in self._by_place.items() if site.role and place in found}

    def agreeing(self, forward: Callable[[], object], held: Mapping[str, Tensor]) -> set[str]:
        """Which of these sites have, while `forward` runs the model, the bits that a trace of it has."""
        found: set[str] = set()

        def look(site: NeuronSite, value: Tensor) -> None:
            if site.name in held:
                other = held[site.name] if site.fold is None else site.fold.opened(held[site.name])
                if other.shape == value.shape and torch.equal(bit_pattern(other), bit_pattern(value)):
                    found.add(site.name)

        self.begin(0)
        with self.changed(look):
            forward()
        return found

    @contextmanager
    def stored(self) -> Iterator[None]:
        """While active, layer outputs are what their format can represent, and `corrupted` and `changed` work."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        self._counts = {}
        with hooked({layer: modules[layer] for layer in self.calls}, self._pass), self._steps.watched(self._show):
            yield

    def begin(self, batch: int, made: Mapping[str, int] | None = None) -> None:
        """A run of this batch starts; `made` says how often each layer was called before the place it starts at."""
        self._counts = dict(made or {})
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
    def corrupted(self, draw: Draw) -> Iterator[int]:
        """While active, sample i's inference has the i-th of these upsets; `begin` tells which batch runs.

        Yields:
            How many bits change: one a sample.
        """
        if not isinstance(draw, Upsets):
            raise FaultSpaceError(f"a neuron space takes Upsets, one a sample, got {type(draw).__name__}")
        if len(draw) != self.samples:
            raise FaultSpaceError(f"{len(draw)} upsets for {self.samples} samples: there must be one for each")
        if len(draw) and int(draw.positions.max()) >= self.bits:
            raise FaultSpaceError(f"upsets lie outside the space of {self.bits:,} bits: {draw.positions.max()}")
        self._faults = self.located(draw.positions)
        try:
            with self.changed(self._hit):
                yield len(draw)
        finally:
            self._faults = None

    @contextmanager
    def only(self, rows: Sequence[int]) -> Iterator[None]:
        """While active, `corrupted` hits these rows of the batch and leaves the others alone."""
        before, self._only = self._only, list(rows)
        try:
            yield
        finally:
            self._only = before

    def hit(self, site: NeuronSite, output: Tensor) -> Tensor:
        """While `corrupted`: a stored output of a layer with the faults of the batch that runs in it."""
        faulty = self._hit(site, output)
        return output if faulty is None else faulty

    def _hit(self, site: NeuronSite, output: Tensor) -> Tensor | None:
        assert self._faults is not None
        which, neuron, bit = self._faults
        part = slice(int(self._batches[self._batch]), int(self._batches[self._batch + 1]))
        rows = np.flatnonzero(which[part] == self.sites.index(site))
        if self._only is not None:
            rows = np.intersect1d(rows, self._only)
        if not rows.size:
            return None
        place, which_bit = (torch.from_numpy(a[part][rows]).to(output.device) for a in (neuron, bit))
        index = site.index(torch.from_numpy(rows).to(output.device), place)
        faulty = copy_alike(output)
        faulty[index] = site.flipped(output[index], which_bit)
        return faulty

    def _pass(self, layer: str, module: nn.Module, result: Any) -> Any:
        call = self._counts.get(layer, 0) % self.calls[layer]
        self._counts[layer] = call + 1
        output = result[0] if isinstance(result, tuple) else result
        found = self._show((layer, "", call), output)
        if found is None:
            return None
        return (found, *result[1:]) if isinstance(result, tuple) else found

    def _show(self, place: Place, output: Tensor) -> Tensor | None:
        """A value as it is stored and hit; None where that is as it came."""
        site = self._by_place.get(place)
        if site is None:
            return None
        value = output if site.fold is None else site.fold.opened(output)
        found = site.stored(value)
        if self._change is not None:
            replaced = self._change(site, found)
            found = found if replaced is None else replaced
        if found is value:
            return None
        return found if site.fold is None else site.fold.closed(found)
