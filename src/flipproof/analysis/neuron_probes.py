"""What one changed neuron does: many (sample, neuron, value) questions a forward, of the suffix only.

A probe puts a value into one neuron of one sample and looks at the class. Rows are gathered from the golden activations
right behind the layer, so each row of a batch has a change of its own and only the rest of the network runs. Where a
model cannot be traced, or its suffix does not give back the golden outputs bit by bit, whole forwards with a hook do.

Gathering is tried before it is trusted: samples taken twice and backwards must give their classes, and rows beside
rows that hold NaN and huge values must keep every bit. Where the first fails, samples stay where they are in their
batch, one question each; where the second does, samples of a batch feel each other and every question has a forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flipproof.analysis._suffix import InPlaceChange, Suffix, cut_behind
from flipproof.analysis.probes import Probe, Prober
from flipproof.errors import InfrastructureError, ModelError
from flipproof.formats.base import bit_pattern
from flipproof.running.data import Batches, Output, call, pick
from flipproof.running.decision import Decision
from flipproof.running.evaluation import is_infrastructure
from flipproof.running.judge import Judge
from flipproof.running.resume import Suffixes
from flipproof.running.snapshots import Snapshot
from flipproof.running.values import rows_of
from flipproof.spaces.neurons import NeuronSpace
from flipproof.spaces.sites import NeuronSite

ROWS = 512
"""Most rows of a probing batch: more does not run faster on a CPU."""

GATHERED, IN_PLACE, ALONE = "gathered", "in place", "alone"
"""How many questions a forward takes: any, one a sample of the batch, one."""


TURNED = 32
"""Rows of a batch that are run again in another order and number, which has to change nothing."""


class NeuronProber(Prober):
    """Probes of a model's neurons on given batches; the space has to be `stored()` while it is used.

    Args:
        space: the neurons, with the formats of their values.
        batches: the inputs.
        golden: fault-free outputs of all samples, on the CPU.
        max_bytes: bound on the activations of a probing batch.
        state: of the fault-free model.
    """

    def __init__(
        self,
        model: nn.Module,
        space: NeuronSpace,
        batches: Batches,
        output: Output,
        golden: Tensor,
        judge: Judge,
        max_bytes: int,
        state: Snapshot,
    ) -> None:
        super().__init__(model, batches, output, golden, judge, state)
        self.space = space
        self._sites = {site.name: site for site in space.sites}
        self._suffixes = Suffixes.trace(model, batches.inputs)
        # a layer's output is commonly held four times over: itself, normalised, activated, pooled or unfolded
        a_row = 16 * sum(site.values for site in space.sites)
        self.rows = max(1, min(ROWS, max_bytes // a_row))
        self.traced = self._suffixes is not None
        """Whether probes run only what lies behind their layer."""
        self._ways: dict[tuple[str, bool], str] = {}

    @property
    def sites(self) -> tuple[NeuronSite, ...]:
        """The layers that can be asked about, one entry a call."""
        return self.space.sites

    def cuts(self, site: str) -> bool:
        """Whether questions about this layer run only what lies behind it."""
        found = self._sites[site]
        if self._suffixes is None or found.axis != 0:
            return False
        return cut_behind(self._suffixes, found, self.space.calls[found.layer]) is not None

    def multiplications_behind(self, site: str) -> int:
        """Multiply-accumulates of a forward that are made behind this call of the layer."""
        found = self._sites[site]
        return self.multiplications.behind(found.layer, found.call)

    def coverage(self) -> tuple[float, dict[str, str]]:
        """Multiply-accumulates of the first batch made while an analysed layer ran ÷ all of them, and what makes the
        others.
        """
        share, rest = self.multiplications.coverage(self.sites)
        return share, {**rest, **self.space.left_out}

    def originals(self) -> dict[str, Tensor]:
        """No parameter is replaced."""
        return self.space.originals()

    def forget(self) -> None:
        """Drop how questions were found to share a forward."""
        self._ways.clear()

    def at(self, site: str, batch: int) -> NeuronProbe:
        """The questions one can ask of this layer about this batch."""
        return self._probe(self._sites[site], batch, self.suffix(site, batch))

    def gathers(self, site: str, batch: int, suffix: Suffix) -> bool:
        """Whether what runs behind a layer answers for any samples put together as it does for the batch."""
        return self._probe(self._sites[site], batch, suffix).way == GATHERED

    def _probe(self, site: NeuronSite, batch: int, suffix: Suffix | None) -> NeuronProbe:
        values = suffix.values if suffix is not None else self._values(site, batch)
        probe = NeuronProbe(self, site, batch, values, self.classes[self.batches.part(batch)], suffix)
        key = (site.name, suffix is None)
        if key not in self._ways:
            costs, before = self.costs, replace(self.costs)
            self._ways[key] = probe.way_found()
            rows, whole = costs.probes - before.probes, costs.whole - before.whole
            costs.preparing, costs.checking = costs.preparing + whole, costs.checking + rows - whole
            costs.probes, costs.whole = before.probes, before.whole
        probe.way = self._ways[key]
        return probe

    def suffix(self, site: str, batch: int) -> Suffix | None:
        """What runs behind this call of a layer, or None where that does not reproduce the golden outputs."""
        golden = self.golden[self.batches.part(batch)]
        if self._suffixes is None or not self.cuts(site):
            return None
        try:
            size = self.batches.sizes[batch]
            suffix = Suffix(self._suffixes, self.space, self._sites[site], batch, self.batches.inputs[batch], size)
            rows = torch.arange(golden.shape[0], device=suffix.values.device)
            some = rows.flip(0)[:TURNED].repeat(2)
            self.costs.preparing += size
            self.costs.checking += size + some.numel()
            whole = pick(suffix.run(rows), self.output).cpu()
            turned = pick(suffix.run(some), self.output).cpu()
        except Exception:  # what was traced cannot run like the model, in whatever way that shows: run the model
            return None
        same = whole.shape == golden.shape and torch.equal(bit_pattern(whole), bit_pattern(golden))
        return suffix if same and not bool(self.critical(batch, some, turned).any()) else None

    def _values(self, site: NeuronSite, batch: int) -> Tensor:
        found: list[Tensor] = []

        def watch(seen: NeuronSite, output: Tensor) -> None:
            if seen.name == site.name:
                found.append(output.movedim(site.axis, 0).reshape(output.shape[site.axis], -1).clone())

        self.space.begin(batch)
        with self.space.changed(watch):
            call(self.model, self.batches.inputs[batch])
        return found[0]

    def whole(self, site: NeuronSite, batch: int, rows: Tensor | None, change: InPlaceChange) -> Any:
        """What a whole forward on these rows of the batch, or the batch as it is, returns with the layer's output
        changed.
        """
        size = self.batches.sizes[batch]
        inputs = self.batches.inputs[batch]
        if rows is not None:
            inputs = rows_of(inputs, rows, size)
        self.costs.whole += size if rows is None else rows.numel()

        def put(seen: NeuronSite, output: Tensor) -> Tensor | None:
            if seen.name != site.name:
                return None
            changed = output.clone()
            change(changed)
            return changed

        self.space.begin(batch)
        with self.space.changed(put):
            return call(self.model, inputs)

    def outputs(self, raw: Any) -> Tensor:
        """The tensor to judge, on the CPU: a copy, through which gradients flow."""
        return pick(raw, self.output).cpu().clone()


class NeuronProbe(Probe):
    """Probes of one call of a layer on one batch.

    Attributes:
        way: how many questions a forward takes.
    """

    def __init__(
        self, prober: NeuronProber, site: NeuronSite, batch: int, values: Tensor, classes: Tensor, suffix: Suffix | None
    ) -> None:
        self._prober, self._site, self._batch, self._suffix = prober, site, batch, suffix
        self.values, self.classes = values, classes
        self.last = suffix is not None and suffix.last
        self.way = GATHERED
        self._floor = suffix.floor() if suffix is not None else None

    def unseen(self, rows: Tensor, places: Tensor, values: Tensor) -> Tensor:
        """Where the next layers provably compute what they computed before: a ReLU, or a ReLU and a max pool, hides it.

        A value v' in place of v is unseen if relu(v') = relu(v), or if both are at most what else its pool sees.
        """
        if self._floor is None:
            return torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        golden, floor = self.values[rows, places], self._floor[rows, places]
        after, before = values.clamp(min=0), golden.clamp(min=0)  # clamp keeps NaN, and NaN compares as False
        return (after == before) | ((after <= floor) & (before <= floor))

    def critical(self, rows: Tensor, places: Tensor, values: Tensor, *, shortcuts: bool = True) -> Tensor:
        """Whether each change is critical; `shortcuts` skip what `unseen` proves.

        Raises:
            ModelError: if the model raises although nothing was changed.
        """
        result = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        ask = torch.arange(values.numel(), device=values.device)
        if shortcuts:
            ask = ask[~self.unseen(rows, places, values)]
        for part in self._forwards(ask, rows) if ask.numel() else ():
            result[part] = self._found(rows[part], places[part], values[part]).to(result.device)
        return result

    def way_found(self) -> str:
        """How questions may be put together here, tried out on NaN and on the largest number there is."""
        rows = torch.arange(self.values.shape[0], device=self.values.device)
        for way, order in ((GATHERED, rows.flip(0)[:TURNED].repeat(2)), (IN_PLACE, rows)):
            # a model that refuses NaN is tried with other values of its own
            for gentle in (False, True):
                try:
                    plain = self._outputs(way, order, None)
                    if bool(self._prober.critical(self._batch, order, plain).any()):
                        break
                    return way if self._apart(way, order, plain, gentle) else ALONE
                except Exception as error:
                    if is_infrastructure(error):
                        raise InfrastructureError(f"{self._site.name}: {type(error).__name__}: {error}") from error
        return ALONE

    def _apart(self, way: str, order: Tensor, plain: Tensor, gentle: bool) -> bool:
        """Whether broken samples leave every bit of the others' outputs."""
        half = order.numel() // 2
        for broken in (slice(0, half), slice(half, None)) if half else ():
            found = self._outputs(way, order, self._breaking(broken, gentle))
            kept = torch.ones(order.numel(), dtype=torch.bool)
            kept[broken] = False
            if not torch.equal(bit_pattern(found[kept]), bit_pattern(plain[kept])):
                return False
        return True

    def _breaking(self, part: slice, gentle: bool) -> InPlaceChange:
        def change(output: Tensor) -> None:
            rows = output.movedim(self._site.axis, 0)[part]
            if gentle:
                rows.mul_(-2)
            else:
                rows[::2], rows[1::2] = float("nan"), torch.finfo(output.dtype).max

        return change

    def _forwards(self, ask: Tensor, rows: Tensor) -> list[Tensor]:
        """Which questions share a forward."""
        if self.way == GATHERED:
            return list(torch.split(ask, self._prober.rows))
        if self.way == ALONE:
            return list(torch.split(ask, 1))
        sample = rows[ask]
        order = sample.argsort(stable=True)
        found = torch.searchsorted(sample[order].contiguous(), sample[order].contiguous())
        turn = torch.arange(ask.numel(), device=ask.device) - found  # the how many-th question about its sample
        return [ask[order[turn == i]] for i in range(int(turn.max()) + 1)]

    def _found(self, rows: Tensor, places: Tensor, values: Tensor) -> Tensor:
        """Whether each question does harm, a NaN or a model that raises included."""
        count = rows.numel()
        at = torch.arange(count, device=rows.device) if self.way == GATHERED else rows

        def change(output: Tensor) -> None:
            output[self._site.index(at, places)] = values

        try:
            outputs = self._outputs(self.way, rows, change)
            return self._prober.critical(self._batch, rows, outputs if self.way == GATHERED else outputs[rows.cpu()])
        except Exception as error:
            if is_infrastructure(error):
                raise InfrastructureError(f"{self._site.name}: {type(error).__name__}: {error}") from error
            if count > 1:  # one of them made the model raise: which?
                halves = (slice(0, count // 2), slice(count // 2, None))
                return torch.cat([self._found(rows[half], places[half], values[half]) for half in halves])
        try:
            self._outputs(self.way, rows, None)
        except Exception as error:
            raise ModelError(
                f"{self._site.name}: the model raises on golden values too ({type(error).__name__}: {error}), so that "
                f"nothing can be asked about it"
            ) from error
        return torch.ones(1, dtype=torch.bool)

    def _outputs(self, way: str, rows: Tensor, change: InPlaceChange | None) -> Tensor:
        """What is judged, for these rows gathered, or for the whole batch as it is; on the CPU."""
        put: InPlaceChange = change if change is not None else lambda output: None
        size = self.values.shape[0]
        self._prober.costs.probes += 0 if self.last else rows.numel() if way == GATHERED else size
        if self._suffix is not None:
            every = torch.arange(size, device=self.values.device)
            return self._prober.outputs(self._suffix.run(rows if way == GATHERED else every, put))
        return self._prober.outputs(self._prober.whole(self._site, self._batch, rows if way == GATHERED else None, put))

    def truth(self, rows: Tensor, places: Tensor, values: Tensor) -> Tensor:
        """As `critical`, but everything is run, also what `unseen` proves."""
        return self.critical(rows, places, values, shortcuts=False)

    def gradient(self) -> Tensor:
        """∂L/∂a of every neuron for every sample, with L = Σ_j σ(E_c − E_j) (Ahmadilivani et al. 2023, Eq. 1); NaN
        where the rest of the network cannot be differentiated; (samples, neurons).
        """
        unknown = super().gradient()
        if self._suffix is None:
            return unknown
        held: list[Tensor] = []

        def hold(output: Tensor) -> None:
            held.append(output.detach().clone().requires_grad_())
            output.copy_(held[0])

        rows = torch.arange(self.values.shape[0], device=self.values.device)
        with torch.enable_grad():
            scores = self._prober.outputs(self._suffix.run(rows, hold)).double()
            several = isinstance(self._prober.judge, Decision) and scores.dim() == 2 and scores.shape[1] > 1
            if not several or not scores.requires_grad:
                return unknown
            margins = scores.gather(1, self.classes[:, None]) - scores
            (gradient,) = torch.autograd.grad(margins.sigmoid().sum(), held[0])
        return gradient.reshape(self.values.shape)

    def flips(self, rows: Tensor, places: Tensor) -> Tensor:
        """What each neuron would hold with each bit of its word flipped; (n, bits)."""
        golden = self.values[rows, places][:, None].expand(-1, self._site.width).contiguous()
        return self._site.flipped(golden, torch.arange(self._site.width, device=golden.device))


def row_wise(model: nn.Module, inputs: Any, size: int, judged: Callable[[Any], Tensor], golden: Tensor) -> bool:
    """Whether a model answers for any samples of a batch put together as it does for the batch.

    Tried out: samples taken twice and backwards, then half of them replaced by another sample, by NaN and by the
    largest number there is, which has to leave every bit of the others' outputs.

    Args:
        model: any module.
        inputs: a batch of `size` samples.
        size: of the batch.
        judged: from what the model returns to the outputs that are judged, on the CPU.
        golden: those of the batch.
    """
    rows = torch.arange(size).flip(0)[:TURNED].repeat(2)
    half = rows.numel() // 2
    try:
        given = rows_of(inputs, rows, size)
        plain = judged(call(model, given))
        if plain.shape != (rows.numel(), *golden.shape[1:]) or not torch.allclose(
            plain, golden[rows], rtol=1e-3, atol=1e-4 * float(golden.abs().max().clamp(min=1e-30))
        ):
            return False
        for value in (None, float("nan"), 1e30):
            hit = judged(call(model, pytree.tree_map(partial(_broken, rows.numel(), half, value), given)))
            if not torch.equal(bit_pattern(hit[half:]), bit_pattern(plain[half:])):
                return False
    except Exception as error:  # what refuses such a batch is asked about in its own
        if is_infrastructure(error):
            raise InfrastructureError(f"{type(error).__name__}: {error}") from error
        return False
    return True


def _broken(rows: int, half: int, value: float | None, leaf: Any) -> Any:
    """A copy with the first half of the samples replaced: by the last one, or by a value where that is possible."""
    if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != rows:
        return leaf
    changed = leaf.clone()
    if value is None:
        changed[:half] = leaf[-1]
    elif leaf.is_floating_point():
        changed[:half] = min(value, torch.finfo(leaf.dtype).max)
    return changed
