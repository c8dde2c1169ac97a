"""What an analysis asks a network: what one changed value in one place does to the class of one sample.

A *place* is one stored value: a neuron's output or a parameter's element. A *site* holds the places of one layer's
output or of one parameter. A `Prober` opens the sites of a model; its `Probe` answers about one site and one batch. A
kind of place is one subclass of each: `neuron_probes`, `parameter_probes`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from flipproof.analysis._multiplications import Multiplications
from flipproof.errors import ModelError
from flipproof.formats import Format
from flipproof.running.data import Batches, Output
from flipproof.running.device import device_of
from flipproof.running.judge import Judge, holds_nan
from flipproof.running.snapshots import Snapshot
from flipproof.running.tasks.base import Task


class ProbedSite(Protocol):
    """A layer's output or a parameter: places of one format."""

    @property
    def name(self) -> str:
        """The only site of that name."""

    @property
    def layer(self) -> str:
        """Qualified name of the module that gives or holds the values."""

    @property
    def values(self) -> int:
        """How many places there are."""

    @property
    def width(self) -> int:
        """Bits of a place's word."""

    @property
    def format(self) -> Format:
        """How a value is stored."""


class Probe(ABC):
    """The questions one can ask of one site about one batch.

    Attributes:
        values: golden values, (samples, places).
        classes: golden class of each sample.
        last: True if nothing is computed behind the site: a question then costs a comparison and no network.
    """

    values: Tensor
    classes: Tensor
    last: bool

    @abstractmethod
    def flips(self, rows: Tensor, places: Tensor) -> Tensor:
        """What each place would hold with each bit of its word flipped; (n, bits)."""

    @abstractmethod
    def critical(self, rows: Tensor, places: Tensor, values: Tensor, *, shortcuts: bool = True) -> Tensor:
        """Whether each change gives another class or a NaN, or makes the model raise; bool (n,) on the values' device.

        Args:
            rows: samples of the batch, int64 (n,).
            places: flat indices into the site, int64 (n,).
            values: what the places hold instead, (n,).
            shortcuts: skip what provably changes nothing; False runs everything.
        """

    @abstractmethod
    def truth(self, rows: Tensor, places: Tensor, values: Tensor) -> Tensor:
        """As `critical`, without its shortcuts: what the search assumed is held against this; bool (n,)."""

    def unseen(self, rows: Tensor, places: Tensor, values: Tensor) -> Tensor:
        """Whether each change provably gives the golden outputs; bool (n,). Nothing is proved by default."""
        return torch.zeros(values.shape, dtype=torch.bool, device=values.device)

    def gradient(self) -> Tensor:
        """∂L/∂value of every place for every sample, (samples, places); NaN where it is not known."""
        return torch.full_like(self.values, float("nan"))


@dataclass
class Costs:
    """Rows that a prober ran so far.

    Attributes:
        probes: rows that answered questions.
        whole: those of them that ran through the whole network, and not through a suffix.
        preparing: rows of whole forwards that recorded golden values.
        checking: rows of suffixes that were run to check them.
    """

    probes: int = 0
    whole: int = 0
    preparing: int = 0
    checking: int = 0


class Prober(ABC):
    """Probes of one model on given batches, and what they cost.

    Args:
        model: as it is stored.
        batches: the inputs.
        output: picks the tensor to judge.
        golden: fault-free outputs of all samples, on the CPU.
        judge: of the answers.
        state: of the fault-free model.

    Attributes:
        classes: golden class of every sample; of tasks that know no classes, 0.
        costs: rows run so far.
        task: that made the judge, as whoever runs the model again has to say it.
    """

    task: Task

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        output: Output,
        golden: Tensor,
        judge: Judge,
        state: Snapshot,
    ) -> None:
        self.model, self.batches, self.output, self.golden, self.judge = model, batches, output, golden, judge
        self.classes = judge.labels_of(golden)
        self.costs = Costs()
        self._state = state

    @property
    @abstractmethod
    def sites(self) -> Sequence[ProbedSite]:
        """The sites that can be asked about."""

    @abstractmethod
    def at(self, site: str, batch: int) -> Probe:
        """The questions one can ask of the site of this name about this batch."""

    @abstractmethod
    def cuts(self, site: str) -> bool:
        """Whether questions about this site run only what lies behind it."""

    @abstractmethod
    def multiplications_behind(self, site: str) -> int:
        """Multiply-accumulates of a forward that are made behind this site."""

    @abstractmethod
    def coverage(self) -> tuple[float, dict[str, str]]:
        """The share of the network that the sites speak of, and by name what is left out, with the reason."""

    @abstractmethod
    def originals(self) -> Mapping[str, Tensor]:
        """Values of the parameters that are stored in another format now, as they came, by name."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what was prepared for earlier sites: what comes next costs as much as if it came first."""

    def critical(self, batch: int, rows: Tensor, outputs: Tensor) -> Tensor:
        """Whether answers do harm, a NaN included; bool (n,) on the CPU.

        Args:
            batch: its number.
            rows: samples of the batch that answered, int64 (n,).
            outputs: what they answered, (n, …).
        """
        part, at = self.batches.part(batch), rows.cpu()
        found = self.judge.critical(self.golden[part][at], outputs, self.batches.targets[part][at])
        return found | holds_nan(outputs)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    def check_untouched(self) -> None:
        """Put back what the model wrote while it was asked.

        Raises:
            ModelError: naming what it wrote: one question may then have changed the answer to the next.
        """
        if wrote := {*self._state.restore(), *self._state.verify()}:
            raise ModelError(stateful(wrote, "under some error"))

    @cached_property
    def multiplications(self) -> Multiplications:
        """Of a forward of the first batch."""
        return Multiplications.of(self.model, self.batches.inputs[0])

    def suffix_share(self, site: str) -> float:
        """Multiplications behind a site ÷ those of a forward: what a probe of it costs in forwards."""
        total = self.multiplications.total
        return self.multiplications_behind(site) / total if total and self.cuts(site) else 1.0

    def by_batch(self, sample: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Samples by the batch they are in: (batch, which entries of `sample`, their rows in the batch)."""
        first = 0
        for batch, size in enumerate(self.batches.sizes):
            here = ((sample >= first) & (sample < first + size)).nonzero()[:, 0]
            if here.numel():
                yield batch, here, sample[here] - first
            first += size

    def inject(self, site: str, sample: Tensor, place: Tensor, bit: Tensor) -> tuple[Tensor, Tensor]:
        """Inject single flips, each into one place for one sample, and run the rest of the network for each.

        Args:
            site: which one.
            sample: of all batches counted together, int64 (n,).
            place: flat indices into the site, int64 (n,).
            bit: of the place's word, int64 (n,).

        Returns:
            Errors, float64 (n,), and whether they were critical, bool (n,).
        """
        delta = torch.zeros(sample.numel(), dtype=torch.float64)
        critical = torch.zeros(sample.numel(), dtype=torch.bool)
        for batch, here, rows in self.by_batch(sample):
            probe = self.at(site, batch)
            device = probe.values.device
            row, where = rows.to(device), place[here].to(device)
            before = probe.values[row, where]
            after = probe.flips(row, where)[torch.arange(row.numel(), device=device), bit[here].to(device)]
            delta[here] = (after.double() - before.double()).cpu()
            critical[here] = probe.critical(row, where, after, shortcuts=False).cpu()
        return delta, critical


def stateful(names: set[str], when: str) -> str:
    """Why a model that writes into itself cannot be analysed."""
    return (
        f"the model writes {', '.join(sorted(names)[:5])} {when}, so that one question would change the answer to the "
        f"next. It was put back. Remove that state (observers, BatchNorm in train mode, max_norm), or measure with "
        f"assess, which puts it back after every batch"
    )
