"""Trials with a single upset in each sample's inference (`where=fp.Neurons()`).

All samples of a batch keep their places, so a trial has the golden run's batch shapes and *masked* can mean
bit-identical; each row has a fault of its own; the trial starts before the faulted layer where the model can be traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from flipproof.campaigns.batches import Batches, call
from flipproof.campaigns.trial import TrialRunner
from flipproof.errors import DataError
from flipproof.faults.models import FaultModel, Faults
from flipproof.faults.neurons import Neurons, NeuronSpace
from flipproof.faults.sampling import TrialGenerator
from flipproof.faults.selection import FormatChoice


def neuron_space(model: nn.Module, batches: Batches, where: Neurons, format: FormatChoice) -> NeuronSpace:
    """The space of a model's neurons on these batches.

    Raises:
        DataError: if the model rejects a batch.
    """

    def run(i: int) -> None:
        try:
            call(model, batches.inputs[i])
        except (RuntimeError, TypeError, ValueError) as error:
            raise DataError(f"the model rejects batch {i}: {type(error).__name__}: {error}") from error

    runs = [((lambda i=i: run(i)), size) for i, size in enumerate(batches.sizes)]
    return NeuronSpace(model, runs, where=where, format=format)


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

    def _shortcut(self, faults: Faults) -> tuple[int, Sequence[int]]:
        # a layer that is called again is counted from the start of the forward
        return (0, ()) if self._neurons.repeated else super()._shortcut(faults)
