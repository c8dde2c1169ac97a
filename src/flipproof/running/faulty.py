"""What a model answers with faults in a space: whole, or from where they first act.

Where all samples share the faults of a draw, a batch is a forward. Where each sample has an upset of its own, upsets
share a forward only if rows are computed apart from one another: rows without a fault must stay bit-identical while
others are hit. Where they do not (quantisation with a scale over the batch, batch statistics), every upset gets a
forward of its own. Where every stored word reads as without faults, a batch is run once, and if it answers as in the
golden run, that is its answer from then on. *Masked* means bit-identical to the golden run of the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from flipproof.faults.sampling import TrialGenerator
from flipproof.running.data import Batches, Output, call
from flipproof.running.evaluation import Answers, FaultyRunError, answer, eval_mode, run_faulty
from flipproof.running.resume import Suffixes
from flipproof.running.snapshots import RandomState, Snapshot
from flipproof.running.values import same
from flipproof.spaces.contract import Draw, Space, Upsets

_PROBES = 6
"""Upsets in each site, when it is tried whether rows depend on each other."""


@dataclass
class FaultyModel:
    """A model whose memory loses bits, on given batches. The space must be `stored()` while it runs.

    Attributes:
        model: in eval mode.
        space: what can be hit.
        batches: what it answers.
        output: picks the tensor to judge.
        golden: its answers without faults, on the CPU.
        state: of the fault-free model.
        randomness: pinned before every forward.
        suffixes: cached cuts to start from; None for whole runs.
        alone: one upset a forward: what a row answers depends on other rows of its batch.
        repaired: batches that answered as in the golden run while every stored word was read as without faults: they
            are not run again for that. None to run them always.
        kept: False for a copy that is used once: its bits are not compared after the last forward.
    """

    model: nn.Module
    space: Space
    batches: Batches
    output: Output
    golden: Tensor
    state: Snapshot
    randomness: RandomState
    suffixes: Suffixes | None = None
    alone: bool = False
    repaired: set[int] | None = field(default_factory=set)
    kept: bool = True

    def answers(self, draw: Draw, batch: int | None = None) -> Answers:
        """What the model answers with these faults, from cached cuts where there are some.

        A sample whose own upset makes the forward raise answers NaN; where all samples share the faults, the whole
        answer is then missing.

        Args:
            draw: the faults.
            batch: the only one to run; None for all of them.
        """
        errors: list[str] = []
        some = range(len(self.batches.inputs)) if batch is None else (batch,)
        found = run_faulty(
            len(some),
            lambda i: self._batch(some[i], draw, errors),
            lambda: self.space.corrupted(draw),
            self.state,
            self.randomness,
            kept=self.kept,
        )
        return replace(found, error=errors[0] if errors else found.error, words=self.space.word_outcomes)

    def whole(self, **changes: Any) -> FaultyModel:
        """The same without shortcuts, every batch from its inputs, and with other changes."""
        return replace(self, suffixes=None, repaired=None, **changes)

    @contextmanager
    def on_copy(self, model: nn.Module) -> Iterator[FaultyModel]:
        """The same for a fresh copy of the model, without any shortcut."""
        space = self.space.again(model)
        with eval_mode(model), space.stored():
            state = Snapshot(model, like=self.model)  # which holds no fault now
            state.watch_bits()
            yield self.whole(model=model, space=space, state=state, kept=False)

    def _batch(self, batch: int, draw: Draw, errors: list[str]) -> Tensor:
        if self.space.samples is None:
            return self._forward(batch, draw) if not self.space.as_stored else self._repaired(batch, draw)
        if not self.alone and self.batches.sizes[batch] > 1:
            try:
                return self._forward(batch, draw)
            except FaultyRunError:  # one of the upsets did that, and the others have nothing to do with it
                self._clean()
        rows = self.golden[self.batches.part(batch)].clone()
        for row in range(self.batches.sizes[batch]):
            try:
                rows[row] = self.alone_answer(batch, row, draw)[row]
            except FaultyRunError as failure:
                errors.append(f"sample {self.batches.part(batch).start + row}: {failure}"[:500])
                rows[row] = float("nan")
        return rows

    def _repaired(self, batch: int, draw: Draw) -> Tensor:
        """The answer where all words read as without faults: the golden one, once it was seen to be."""
        golden = self.golden[self.batches.part(batch)]
        if self.repaired is not None and batch in self.repaired:
            return golden
        found = self._forward(batch, draw)
        if self.repaired is not None:
            if same(found, golden):
                self.repaired.add(batch)
            else:
                self.repaired = None
        return found

    def alone_answer(self, batch: int, row: int, draw: Draw) -> Tensor:
        """A batch's outputs with the upset of one row only, every other row being golden.

        Raises:
            FaultyRunError: if the model raises, or gives outputs of another shape.
        """
        with self.space.only([row]):
            if not self.kept:  # bits that the forward before this one wrote unseen are still there
                self._clean()
            try:
                outputs = self._forward(batch, draw)
            finally:
                if self.state.changed(bits=self.kept):
                    self.state.restore()
        golden = self.golden[self.batches.part(batch)]
        if outputs.shape != golden.shape:
            raise FaultyRunError(f"outputs of shape {tuple(outputs.shape)} instead of {tuple(golden.shape)}")
        return outputs

    def _clean(self) -> None:
        if self.state.changed():
            self.state.restore()

    def _forward(self, batch: int, draw: Draw) -> Tensor:
        self.space.begin(batch)
        self.randomness.pin()
        resume = self._resume(draw)
        if resume is not None:
            return answer(lambda: resume(batch), self.output, batch)
        return answer(lambda: call(self.model, self.batches.inputs[batch]), self.output, batch)

    def _resume(self, draw: Draw) -> Callable[[int], Any] | None:
        """How to run a batch from the latest cached cut before anything that these faults touch; None for whole runs.

        Where tensors are hit, it also looks whether the faults are gone a little behind the layers that use them.
        """
        suffixes = self.suffixes
        if suffixes is None or not len(draw):
            return None
        start = self.space.start(draw)
        change = start.change
        if change is None:
            cut, looks = suffixes.cut_of(start.names), suffixes.looks_after(start.names)
            return (lambda batch: suffixes.resume(cut, batch, looks, start.rows)) if cut else None
        if start.site is not None:
            point = suffixes.point_of(start.site)
            if point is None:
                return None
            at, node, turned = point
            put = (lambda value: change(value.mT).mT) if turned else change
            return lambda batch: suffixes.resume_changed(at, batch, put, node=node)
        behind = None if start.layer is None else suffixes.behind(start.layer)
        if behind is None or not suffixes.cached(behind):
            return None
        return lambda batch: suffixes.resume_changed(behind, batch, change, start.plain)

    def prepare(self, suffixes: Suffixes, budget: int, draws: list[Draw]) -> bool:
        """Let `suffixes` keep the golden activations that runs start from; False if that would save too little.

        Args:
            suffixes: of the model.
            budget: bytes that may be kept.
            draws: typical ones, by which to judge where runs start.
        """
        starts = self.space.starts()
        worth: dict[int, float] | None = None
        if starts is None:
            saved = [suffixes.position_of(self.space.start(draw).names) for draw in draws if len(draw)]
            if not saved or sum(saved) / len(saved) < 0.05:
                return False
        points = self._points(suffixes)
        if starts is not None:
            if not starts and not points:
                return False
            # right behind the layers: worth the share of runs that start there × how far in they lie
            cuts = {suffixes.behind(layer): bits for layer, bits in starts.items()}
            worth = {cut: bits * cut for cut, bits in cuts.items() if cut is not None}
            bits = {site.name: site.bits for site in self.space.sites}
            for name, (cut, _, _) in points.items():
                worth[cut] = worth.get(cut, 0.0) + bits[name] * cut
        suffixes.prepare(self.model, self.batches.inputs, self.batches.sizes, self.output, budget, worth)
        if points:
            suffixes.set_points(points)
            suffixes.set_points({name: points[name] for name in self._proved(suffixes, points)})
        return True

    def _points(self, suffixes: Suffixes) -> dict[str, tuple[int, fx.Node, bool]]:
        """Where sites can be changed that no module gives: cut, node, whether its last axes are exchanged."""
        found: dict[str, tuple[int, fx.Node, bool]] = {}
        for name, where in self.space.traced(suffixes.nodes).items():
            point = suffixes.point(where.node, where.argument)
            if point is not None:
                found[name] = (*point, where.turned)
        return found

    def _proved(self, suffixes: Suffixes, points: dict[str, tuple[int, fx.Node, bool]]) -> set[str]:
        """Those at which the trace has the bits that a run of the model has."""
        held: dict[str, Tensor] = {}
        for name, (cut, node, turned) in points.items():
            if suffixes.cached(cut):
                value = suffixes.cache(cut, 0)[suffixes.place(cut, node)]
                held[name] = value.mT if turned else value
        self.randomness.pin()
        found = self.space.agreeing(lambda: call(self.model, self.batches.inputs[0]), held)
        self._clean()
        return found

    def mixes_rows(self, seed: int) -> bool:
        """Whether an upset in one row of a batch changes what another row answers.

        Half of the rows get upsets, in every site in turn and most of them in the highest exponent bit, which makes
        huge values; the other half must answer as without faults, bit by bit. Batches of each size are tried.
        """
        space, generator = self.space, TrialGenerator(seed, "do rows of a batch depend on each other", 0)
        tried: set[int] = set()
        for batch, size in enumerate(self.batches.sizes):
            if size == 1 or size in tried:
                continue
            tried.add(size)
            golden = self.golden[self.batches.part(batch)]
            half = max(1, size // 2)
            sites = [site for site in space.sites for _ in range(_PROBES)]
            for start in range(0, len(sites), half):
                here = sites[start : start + half]
                hit = [(2 * i + start // half) % size for i in range(len(here))]
                hit = sorted(set(hit))[: size - 1]
                positions = np.zeros(self.batches.samples, np.int64)
                for k, (row, site) in enumerate(zip(hit, here, strict=False)):
                    value, bit = int(generator.below(site.values, 1)[0]), int(generator.below(site.width, 1)[0])
                    bit = bit if k % 3 == 0 else max(site.width - 2, 0)
                    positions[self.batches.part(batch).start + row] = site.offset + value * site.width + bit
                with space.corrupted(Upsets(positions)), space.only(hit):
                    try:
                        found = self.whole()._forward(batch, Upsets(positions))
                    except FaultyRunError:
                        continue  # such a batch is run one by one anyway
                    finally:
                        self._clean()
                others = torch.ones(size, dtype=torch.bool)
                others[hit] = False
                if found.shape != golden.shape or not same(found[others], golden[others]):
                    return True
        return False


def same_answers(left: Answers, right: Answers) -> bool:
    """Whether both are the same, bit by bit; two failures are the same whatever they say."""
    counted = (left.flips, left.words) == (right.flips, right.words)
    if left.outputs is None or right.outputs is None:
        return left.outputs is right.outputs and counted
    return counted and same(left.outputs, right.outputs)
