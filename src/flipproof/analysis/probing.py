"""Asking a network what one changed neuron does: many (sample, neuron, value) questions a forward, suffix only.

A probe puts a value into one neuron of one sample and looks at the class. Rows are gathered from the golden activations
right behind the layer, so each row of a batch has a change of its own and only the rest of the network runs. Where a
model cannot be traced, or its suffix does not give back the golden outputs bit by bit, whole forwards with a hook do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flipproof.analysis.behind import Change, Suffix
from flipproof.campaigns.batches import Batches, Output, call, pick
from flipproof.campaigns.live import rows_of
from flipproof.campaigns.suffix import Suffixes
from flipproof.faults.neuron_sites import NeuronSite
from flipproof.faults.neurons import NeuronSpace
from flipproof.faults.sites import Site
from flipproof.outcomes import Decision, bit_pattern

ROWS = 512
"""Most rows of a probing batch: more does not run faster on a CPU."""


TURNED = 32
"""Rows of a batch that are run again in another order and number, which has to change nothing."""


class Prober:
    """Probes of one model on given batches; the space has to be `stored()` while it is used.

    Args:
        space: the neurons, with the formats of their values.
        batches: the inputs.
        golden: fault-free outputs of all samples, on the CPU.
        max_bytes: bound on the activations of a probing batch.
    """

    def __init__(
        self,
        model: nn.Module,
        space: NeuronSpace,
        batches: Batches,
        output: Output,
        golden: Tensor,
        decision: Decision,
        max_bytes: int,
    ) -> None:
        self.model, self.space, self.batches = model, space, batches
        self._output, self.decision = output, decision
        self.classes = decision.classes_of(golden)
        """Golden class of every sample."""
        self._golden = golden
        self._suffixes = None if space.repeated else Suffixes.trace(model, batches.inputs)
        # a layer's output is commonly held four times over: itself, normalised, activated, pooled or unfolded
        a_row = 16 * sum(site.values for site in space.sites)
        self.rows = max(1, min(ROWS, max_bytes // a_row))
        self.traced = self._suffixes is not None
        """Whether probes run only what lies behind their layer."""
        self.probes = 0
        """Rows that were run through a network so far."""
        self.recorded = (0, 0)
        """Rows of whole forwards and of suffixes that prepared and checked the suffixes so far."""

    @property
    def sites(self) -> tuple[NeuronSite, ...]:
        """The layers that can be asked about."""
        return self.space.sites

    def cuts(self, site: NeuronSite | Site) -> bool:
        """Whether questions about this layer run only what lies behind it."""
        return self.traced

    def at(self, site: NeuronSite, batch: int) -> Layer:
        """The questions one can ask of this layer about this batch."""
        suffix = self.suffix(site, batch)
        values = suffix.values if suffix is not None else self._values(site, batch)
        return Layer(self, site, batch, values, self.classes[self.batches.part(batch)], suffix)

    def suffix(self, site: NeuronSite, batch: int) -> Suffix | None:
        """What runs behind this layer, or None where that does not reproduce the golden outputs."""
        golden = self._golden[self.batches.part(batch)]
        if self._suffixes is None or site.axis != 0:
            return None
        try:
            size = self.batches.sizes[batch]
            suffix = Suffix(self._suffixes, site, self.batches.inputs[batch], size)
            rows = torch.arange(golden.shape[0], device=suffix.values.device)
            some = rows.flip(0)[:TURNED].repeat(2)
            self.recorded = (self.recorded[0] + size, self.recorded[1] + size + some.numel())
            whole = pick(suffix.run(rows), self._output).cpu()
            turned = pick(suffix.run(some), self._output).cpu()
        except Exception:  # what was traced cannot run like the model, in whatever way that shows: run the model
            return None
        same = whole.shape == golden.shape and torch.equal(bit_pattern(whole), bit_pattern(golden))
        backwards = self.classes_of(golden).flip(0)[:TURNED].repeat(2)
        return suffix if same and torch.equal(self.classes_of(turned), backwards) else None

    def classes_of(self, outputs: Tensor) -> Tensor:
        """The class of each row; −1 where the output holds a NaN."""
        return self.decision.classes_of(outputs)

    def _values(self, site: NeuronSite, batch: int) -> Tensor:
        found: list[Tensor] = []

        def watch(seen: NeuronSite, output: Tensor) -> None:
            if seen.name == site.name:
                found.append(output.movedim(site.axis, 0).reshape(output.shape[site.axis], -1).clone())

        self.space.begin(batch)
        with self.space.changed(watch):
            call(self.model, self.batches.inputs[batch])
        return found[0]

    def whole(self, site: NeuronSite, batch: int, rows: Tensor, change: Change) -> Tensor:
        """Outputs of whole forwards on these rows of the batch with the layer's output changed."""
        size = self.batches.sizes[batch]
        inputs = rows_of(self.batches.inputs[batch], rows, size)

        def put(seen: NeuronSite, output: Tensor) -> Tensor | None:
            if seen.name != site.name:
                return None
            changed = output.clone()
            change(changed)
            return changed

        self.space.begin(batch)
        with self.space.changed(put):
            return pick(call(self.model, inputs), self._output)

    def outputs(self, raw: Any) -> Tensor:
        """The tensor to judge, on the CPU."""
        return pick(raw, self._output).cpu()


class Layer:
    """Probes of one layer on one batch.

    Attributes:
        values: golden outputs (samples, neurons).
        classes: golden class of each sample.
        last: True if nothing is computed behind the layer, so that a probe costs a comparison and no network.
    """

    def __init__(
        self, prober: Prober, site: NeuronSite, batch: int, values: Tensor, classes: Tensor, suffix: Suffix | None
    ) -> None:
        self._prober, self._site, self._batch, self._suffix = prober, site, batch, suffix
        self.values, self.classes = values, classes
        self.last = suffix is not None and suffix.last
        self._floor = suffix.floor() if suffix is not None else None

    def unseen(self, rows: Tensor, neurons: Tensor, values: Tensor) -> Tensor:
        """Where the next layers provably compute what they computed before: a ReLU, or a ReLU and a max pool, hides it.

        A value v' in place of v is unseen if relu(v') = relu(v), or if both are at most what else its pool sees.
        """
        if self._floor is None:
            return torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        golden, floor = self.values[rows, neurons], self._floor[rows, neurons]
        after, before = values.clamp(min=0), golden.clamp(min=0)  # clamp keeps NaN, and NaN compares as False
        return (after == before) | ((after <= floor) & (before <= floor))

    def critical(self, rows: Tensor, neurons: Tensor, values: Tensor, *, shortcuts: bool = True) -> Tensor:
        """Whether each change gives another class, or a NaN; bool on the device of the values.

        Args:
            rows: samples of the batch, int64 (n,).
            neurons: flat indices, int64 (n,).
            values: what the neurons hold instead, (n,).
            shortcuts: skip what `unseen` proves; False runs everything.
        """
        result = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        ask = torch.arange(values.numel(), device=values.device)
        if shortcuts:
            ask = ask[~self.unseen(rows, neurons, values)]
        for part in torch.split(ask, self._prober.rows) if ask.numel() else ():
            raw = self._run(rows[part], neurons[part], values[part])
            found = self._prober.classes_of(self._prober.outputs(raw))
            result[part] = (found != self.classes[rows[part].cpu()]).to(result.device)
            self._prober.probes += 0 if self.last else part.numel()
        return result

    def truth(self, rows: Tensor, neurons: Tensor, values: Tensor) -> Tensor:
        """As `critical`, but everything is run, also what seems provable."""
        return self.critical(rows, neurons, values, shortcuts=False)

    def gradient(self) -> Tensor:
        """∂L/∂a of every neuron for every sample, with L = Σ_j σ(E_c − E_j) (PAPERS: deepvigor, Eq. 1); NaN where the
        rest of the network cannot be differentiated; (samples, neurons).
        """
        unknown = torch.full_like(self.values, float("nan"))
        if self._suffix is None:
            return unknown
        held: list[Tensor] = []

        def hold(output: Tensor) -> None:
            held.append(output.detach().clone().requires_grad_())
            output.copy_(held[0])

        rows = torch.arange(self.values.shape[0], device=self.values.device)
        with torch.enable_grad():
            scores = self._prober.outputs(self._suffix.run(rows, hold)).double()
            if scores.dim() != 2 or scores.shape[1] < 2 or not scores.requires_grad:
                return unknown
            margins = scores.gather(1, self.classes[:, None]) - scores
            (gradient,) = torch.autograd.grad(margins.sigmoid().sum(), held[0])
        return gradient.reshape(self.values.shape)

    def flips(self, rows: Tensor, neurons: Tensor) -> Tensor:
        """What each neuron would hold with each bit of its word flipped; (n, bits)."""
        golden = self.values[rows, neurons][:, None].expand(-1, self._site.width).contiguous()
        return self._site.flipped(golden, torch.arange(self._site.width, device=golden.device))

    def _run(self, rows: Tensor, neurons: Tensor, values: Tensor) -> Any:
        def change(output: Tensor) -> None:
            output[self._site.index(torch.arange(rows.numel(), device=rows.device), neurons)] = values

        if self._suffix is not None:
            return self._suffix.run(rows, change)
        return self._prober.whole(self._site, self._batch, rows, change)
