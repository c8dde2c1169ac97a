"""Trials with a single upset in each sample's inference (`where=fp.Neurons()`).

Each row of a batch has a fault of its own; a trial starts right behind the faulted layer where the model can be traced,
and goes on with the rows that are not golden again. *Masked* means bit-identical to the golden run of the same batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from flipproof.campaigns.batches import Batches, Output, call
from flipproof.campaigns.growing import grown
from flipproof.campaigns.rows import resume_rows
from flipproof.campaigns.suffix import Suffixes
from flipproof.campaigns.trial import TrialRunner
from flipproof.errors import DataError
from flipproof.faults.models import FaultModel, Faults
from flipproof.faults.neuron_sites import Neurons
from flipproof.faults.neurons import NeuronSpace
from flipproof.faults.sampling import TrialGenerator
from flipproof.faults.selection import FormatChoice


def neuron_space(
    model: nn.Module, batches: Batches, where: Neurons, format: FormatChoice, output: Output = None
) -> NeuronSpace:
    """The space of a model's neurons on these batches; `output` picks what tells how many samples were answered.

    Raises:
        DataError: if the model rejects a batch.
    """

    def run(i: int) -> None:
        try:
            call(model, batches.inputs[i])
        except (RuntimeError, TypeError, ValueError) as error:
            raise DataError(f"the model rejects batch {i}: {type(error).__name__}: {error}") from error

    runs = [((lambda i=i: run(i)), size) for i, size in enumerate(batches.sizes)]
    more = grown(model, batches.inputs[0], batches.sizes[0], output)
    return NeuronSpace(model, runs, where=where, format=format, grown=more)


@dataclass
class NeuronTrialRunner(TrialRunner):
    """Draws one fault a sample; everything else is a trial like any other."""

    def draw(self, point: int, trial: int) -> Faults:
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

    def _corrupted(self, faults: Faults) -> AbstractContextManager[int]:
        return self._neurons.corrupted(faults, self.batches.sizes)

    def _begin(self, batch: int) -> None:
        self._neurons.begin(batch)

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

    def _resume(self, faults: Faults) -> Callable[[int], Any] | None:
        if self.suffixes is None:
            return None
        suffixes, space = self.suffixes, self._neurons
        site = space.layer_of(faults)
        cut = suffixes.behind(site.layer)
        if cut is None or not suffixes.cached(cut):
            return None

        def change(output: Any) -> Any:
            return (space.hit(site, output[0]), *output[1:]) if isinstance(output, tuple) else space.hit(site, output)

        return lambda batch: resume_rows(suffixes, cut, batch, self.batches.sizes[batch], change)
