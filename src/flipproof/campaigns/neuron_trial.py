"""Trials with a single upset in each sample's inference (`where=fp.Neurons()`).

Each row of a batch has a fault of its own, and a trial starts right behind the faulted layer where the model can be
traced. Faults share a forward only if rows are computed apart from one another: rows without a fault must stay
bit-identical while others are hit. Where they do not (quantisation with a scale over the batch, batch statistics),
every fault gets a forward of its own. *Masked* means bit-identical to the golden run of the same batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flipproof.campaigns.trial import TrialRunner, same_answers
from flipproof.faults.base import FaultModel
from flipproof.faults.sampling import TrialGenerator
from flipproof.running.data import call
from flipproof.running.evaluation import Answers, FaultyRunError, answer, run_faulty
from flipproof.running.resume import Suffixes
from flipproof.running.values import same
from flipproof.spaces.contract import Draw, Upsets
from flipproof.spaces.neurons import NeuronSpace

_PROBES = 6
"""Upsets in each layer, when it is tried whether rows depend on each other."""

_AUDITED_UPSETS = 8
"""So many upsets of an audited trial run again, each in a forward of its own."""


@dataclass
class NeuronTrialRunner(TrialRunner):
    """Draws one fault a sample. Faults of a batch share a forward if its rows are computed apart from one another."""

    alone: bool = False
    """One fault a forward: what one row answers depends on other rows of its batch."""

    def draw(self, point: int, trial: int) -> Upsets:  # type: ignore[override]
        """One fault a sample: a function of seed, point, index and the number of samples alone."""
        generator = TrialGenerator(self.seed, self._names[point], trial)
        return self._neurons.draw(self.points[point], self.batches.samples, generator)

    def repeats(self, point: FaultModel) -> bool:
        """Never: which neuron is hit is always drawn."""
        return False

    @property
    def _neurons(self) -> NeuronSpace:
        assert isinstance(self.space, NeuronSpace)
        return self.space

    def answers(self, faults: Draw, suffixes: Suffixes | None) -> Answers:
        """What the model answers if each sample has a fault of its own; a sample whose forward raises answers NaN."""
        errors: list[str] = []
        found = run_faulty(
            len(self.batches.inputs),
            lambda batch: self._batch(batch, faults, suffixes, errors),
            lambda: self._neurons.corrupted(faults, self.batches.sizes),
            self.state,
            self.randomness,
        )
        return replace(found, error=errors[0] if errors else found.error)

    def _batch(self, batch: int, faults: Draw, suffixes: Suffixes | None, errors: list[str]) -> Tensor:
        if not self.alone and self.batches.sizes[batch] > 1:
            try:
                return self._forward(batch, faults, suffixes)
            except FaultyRunError:  # one of the faults did that, and the others have nothing to do with it
                self._clean()
        rows = self.golden[self.batches.part(batch)].clone()
        for row in range(self.batches.sizes[batch]):
            try:
                rows[row] = self.alone_answer(batch, row, faults, suffixes)[row]
            except FaultyRunError as failure:
                errors.append(f"sample {self.batches.part(batch).start + row}: {failure}"[:500])
                rows[row] = float("nan")
        return rows

    def alone_answer(self, batch: int, row: int, faults: Draw, suffixes: Suffixes | None) -> Tensor:
        """A batch's outputs with the fault of one row only, every other row being golden."""
        with self._neurons.only([row]):
            try:
                outputs = self._forward(batch, faults, suffixes)
            finally:
                self._clean()
        golden = self.golden[self.batches.part(batch)]
        if outputs.shape != golden.shape:
            raise FaultyRunError(f"outputs of shape {tuple(outputs.shape)} instead of {tuple(golden.shape)}")
        return outputs

    def _clean(self) -> None:
        if self.state.changed():
            self.state.restore()

    def _forward(self, batch: int, faults: Draw, suffixes: Suffixes | None) -> Tensor:
        self._neurons.begin(batch)
        self.randomness.pin()
        resume = self._resume(faults, suffixes)
        if resume is not None:
            return answer(lambda: resume(batch), self.output, batch)
        return answer(lambda: call(self.model, self.batches.inputs[batch]), self.output, batch)

    def mixes_rows(self) -> bool:
        """Whether a fault in one row of a batch changes what another row answers.

        Half of the rows get upsets, in every layer in turn and most of them in the highest exponent bit, which makes
        huge values; the other half must answer as without faults, bit by bit. Batches of each size are tried.
        """
        space, generator = self._neurons, TrialGenerator(self.seed, "do rows of a batch depend on each other", 0)
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
                with space.corrupted(Upsets(positions), self.batches.sizes), space.only(hit):
                    try:
                        found = self._forward(batch, Upsets(positions), None)
                    except FaultyRunError:
                        continue  # such a batch is run one by one anyway
                    finally:
                        self._clean()
                others = torch.ones(size, dtype=torch.bool)
                others[hit] = False
                if found.shape != golden.shape or not same(found[others], golden[others]):
                    return True
        return False

    def differs(self, twin: TrialRunner, faults: Draw, answers: Answers) -> str | None:
        """What differs if another runner does some of the upsets one by one, each in a forward of its own."""
        assert isinstance(twin, NeuronTrialRunner)
        assert answers.outputs is not None
        choice = TrialGenerator(self.seed, f"audit {faults.digest}", 0)
        chosen = np.unique(choice.below(self.batches.samples, _AUDITED_UPSETS))
        with twin._neurons.corrupted(faults, self.batches.sizes):
            for sample in chosen.tolist():
                batch, row = self._place(sample)
                found = _row(twin, batch, row, faults)
                expected = answers.outputs[sample]
                if found is None and not bool(torch.isnan(expected).all()):
                    return f"the model raised on sample {sample} with its upset alone"
                if found is not None and not same(found[row], expected):
                    return f"outputs of sample {sample} differ"
                if found is not None and not self.alone:
                    others = torch.arange(found.shape[0]) != row
                    if not same(found[others], self.golden[self.batches.part(batch)][others]):
                        return f"the upset of sample {sample} changed other samples of its batch"
        return None

    def blame(self, faults: Draw, answers: Answers) -> str | None:
        """The shortcut without which the model itself answers otherwise; None if it is none of them."""
        assert answers.outputs is not None
        together = self.answers(faults, None)
        if not self.alone:
            apart = replace(self, alone=True).answers(faults, None)
            if not same_answers(together, apart):
                return "shared batch"
        return "suffix" if self.suffixes is not None and not same_answers(together, answers) else None

    def _place(self, sample: int) -> tuple[int, int]:
        """Batch and row of a sample."""
        borders = np.cumsum([0, *self.batches.sizes])
        batch = int(np.searchsorted(borders, sample, side="right")) - 1
        return batch, sample - int(borders[batch])

    def prepare(self, suffixes: Suffixes, budget: int) -> bool:
        """Keep cuts right behind the layers: worth the share of trials that start there × how far in they lie."""
        if self._neurons.repeated:  # calls are counted from the start of the forward
            return False
        worth: dict[int, float] = {}
        for site in self._neurons.sites:
            cut = suffixes.behind(site.layer)
            if cut is not None and site.axis == 0:
                worth[cut] = site.bits * cut
        suffixes.prepare(self.model, self.batches.inputs, self.batches.sizes, self.output, budget, worth)
        return True

    @property
    def cache_bytes(self) -> int:
        """Activations are what neuron campaigns start from: as much as an analysis may take by default."""
        return max(super().cache_bytes, 2**28)

    def _resume(self, faults: Draw, suffixes: Suffixes | None) -> Callable[[int], Any] | None:
        if suffixes is None:
            return None
        space = self._neurons
        site = space.layer_of(faults)
        cut = suffixes.behind(site.layer)
        if cut is None or not suffixes.cached(cut):
            return None

        def change(output: Any) -> Any:
            return (space.hit(site, output[0]), *output[1:]) if isinstance(output, tuple) else space.hit(site, output)

        return lambda batch: suffixes.resume_changed(cut, batch, change)


def _row(runner: NeuronTrialRunner, batch: int, row: int, faults: Draw) -> Tensor | None:
    """A batch's outputs with the upset of one row, run whole; None if the model raises."""
    try:
        return runner.alone_answer(batch, row, faults, None)
    except FaultyRunError:
        return None
