"""What DeepVigor found about one layer: sums over the inputs, and what they say of an error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from flipproof.analysis.audit import ASKED, CRITICAL, HARMLESS, PROVEN, WRONG, counted
from flipproof.errors import ConfigError
from flipproof.formats import Format
from flipproof.spaces.sites import NeuronSite, Site

VERDICTS = ("non_vulnerable", "semi_vulnerable", "vulnerable")

_EMPTY = torch.tensor([-inf, inf, inf, -inf], dtype=torch.float64)
"""Over no input at all every error is harmless to all inputs, and critical to all."""


@dataclass
class LayerVulnerability:
    """One layer's sums over the inputs seen so far: sizes do not grow with their number.

    Attributes:
        name: the layer's qualified name; `format` and `width` say how a neuron is stored.
        total: neurons in the layer; `neurons` are the flat indices of those analysed, ascending.
        critical: how many inputs each bit flip is critical for, int32 (neurons, width).
        labels: the golden classes that inputs have, ascending, int64 (labels,).
        ranges: by these classes, float64 (labels, neurons, 4): errors from [0] to [2] are harmless for all inputs of
            the class, errors ≤ [1] or ≥ [3] critical for all of them.
        inputs: inputs by golden class, int64 (classes,).
        nans: flips that made a NaN, and those of them that were critical, int64 (neurons, 2).
        audit: flips that the search decided untried, those injected after all, and those it had wrong, as `counted`
            has them, one entry a shard: int64 (shards, 3, decisions, width).
        left: flips that it called harmless, and critical, untried, int64 (neurons, 2).
        powers: sums over inputs of the share of critical flips, its square and its cube, by bit and, last, over all
            bits; wrong decisions that were found are in them with their weight; float64 (3, width + 1).
        by_neuron: the same of each neuron's share, float64 (3, neurons).
        exhaustive: every flip was tried, as the method said or because the search was wrong too often.
        probes: rows run through the rest of the network; `forwards`: the same in forwards of the whole network.
        closed_form: nothing is computed behind the layer.
    """

    name: str
    format: str
    width: int
    total: int
    neurons: Tensor
    critical: Tensor
    labels: Tensor
    ranges: Tensor
    inputs: Tensor
    nans: Tensor
    audit: Tensor
    left: Tensor
    powers: Tensor
    by_neuron: Tensor
    exhaustive: bool = False
    probes: int = 0
    forwards: float = 0.0
    closed_form: bool = False

    @classmethod
    def empty(
        cls, site: NeuronSite | Site, neurons: Tensor, classes: int, labels: Tensor | None = None
    ) -> LayerVulnerability:
        """Nothing seen yet; `labels` are the golden classes that will come, all by default."""
        count = neurons.numel()
        labels = torch.arange(classes) if labels is None else labels
        return cls(
            site.name,
            repr(site.format),
            site.width,
            site.values,
            neurons,
            torch.zeros(count, site.width, dtype=torch.int32),
            labels.clone(),
            _EMPTY.repeat(labels.numel(), count, 1),
            torch.zeros(classes, dtype=torch.int64),
            torch.zeros(count, 2, dtype=torch.int64),
            torch.zeros(1, 3, 3, site.width, dtype=torch.int64),
            torch.zeros(count, 2, dtype=torch.int64),
            torch.zeros(3, site.width + 1, dtype=torch.float64),
            torch.zeros(3, count, dtype=torch.float64),
        )

    @classmethod
    def room(cls, site: NeuronSite | Site, count: int, classes: int, labels: Tensor) -> int:
        """Bytes that are kept of so many of a layer's neurons."""
        one, two = (cls.empty(site, torch.arange(n), classes, labels).nbytes for n in (1, 2))
        return one + (count - 1) * (two - one)

    def problem(self) -> str | None:
        """What does not fit together in sums that were read from a file; None if all does."""
        n, k = self.neurons.numel(), self.labels.numel()
        expected = {
            "neurons": (torch.int64, (n,)),
            "critical": (torch.int32, (n, self.width)),
            "labels": (torch.int64, (k,)),
            "ranges": (torch.float64, (k, n, 4)),
            "inputs": (torch.int64, tuple(self.inputs.shape[:1])),
            "nans": (torch.int64, (n, 2)),
            "audit": (torch.int64, (*self.audit.shape[:1], 3, *self.audit.shape[2:3], self.width)),
            "left": (torch.int64, (n, 2)),
            "powers": (torch.float64, (3, self.width + 1)),
            "by_neuron": (torch.float64, (3, n)),
        }
        for name, (dtype, shape) in expected.items():
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                return f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}"
        if not n or not k or self.labels.tolist() != sorted(set(self.labels.tolist())):
            return "there are no neurons or classes, or the classes are not in order"
        if int(self.neurons.min()) < 0 or int(self.neurons.max()) >= self.total:
            return f"neurons must lie in [0, {self.total})"
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= self.inputs.numel():
            return f"classes must lie in [0, {self.inputs.numel()})"
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(value.numel() * value.element_size() for value in vars(self).values() if isinstance(value, Tensor))

    def seen(self, label: int) -> bool:
        """Whether some analysed input has this golden class."""
        return 0 <= label < self.inputs.numel() and bool(self.inputs[label])

    def of_label(self, label: int) -> Tensor:
        """Ranges of a golden class that was `seen`; float64 (neurons, 4)."""
        return self.ranges[int(torch.searchsorted(self.labels, label))]

    @property
    def module(self) -> str:
        """Qualified name of the module or parameter, without the number of its call."""
        return self.name.partition("[")[0]

    @property
    def stored_as(self) -> Format:
        """The format that `format` names."""
        from flipproof.formats import parse_format

        return parse_format(self.format)

    def count(self, classes: Tensor) -> None:
        """Take note of some inputs' golden classes."""
        self.inputs += torch.bincount(classes[classes >= 0], minlength=self.inputs.numel())

    def add(self, classes: Tensor, part: Tensor, critical: Tensor, ranges: Tensor, nans: Tensor) -> None:
        """Take in some samples for some of the neurons.

        Args:
            classes: golden class of each sample, (n,).
            part: which entries of `neurons`, (p,).
            critical: bits that are critical, (n, p, width).
            ranges: of each sample and neuron, (n, p, 4).
            nans: flips that make a NaN, and those that are critical, (n, p, 2).
        """
        self.critical[part] += critical.sum(dim=0)
        self.nans[part] += nans.sum(dim=0)
        for label in sorted(set(classes.tolist())):
            own, row = ranges[classes == label], int(torch.searchsorted(self.labels, label))
            self.ranges[row, part] = narrowed(torch.cat([self.ranges[row, part][None], own]))

    def add_audit(self, part: Tensor, left: Tensor, asked: Tensor, wrong: Tensor) -> None:
        """Take in what was left untried of some samples and some of the neurons, and what was injected of that.

        Args:
            part: which entries of `neurons`, (p,).
            left: the decision about each flip, (n, p, width).
            asked: which were injected, bool (n, p, width).
            wrong: and which of these contradicted the search, bool (n, p, width).
        """
        self.audit[0] += counted(left.flatten(0, 1), asked.flatten(0, 1), wrong.flatten(0, 1))
        for column, kind in enumerate((HARMLESS, CRITICAL)):
            self.left[part, column] += (left == kind).sum(dim=(0, 2))

    def add_inputs(self, shares: Tensor) -> None:
        """Take in the share of critical flips of some inputs, by bit, (n, width)."""
        values = torch.cat([shares, shares.mean(dim=1, keepdim=True)], dim=1)
        self.powers += _powers(values)

    def add_neurons(self, part: Tensor, shares: Tensor) -> None:
        """Take in the share of critical flips of some neurons for some inputs, (n, p)."""
        self.by_neuron[:, part] += _powers(shares)

    @property
    def tried(self) -> int:
        """Flips that the search decided untried from its assumption, and that were injected after all."""
        return int(self.audit[:, ASKED, :PROVEN].sum())

    @property
    def holes(self) -> int:
        """Those of `tried` that it had wrong."""
        return int(self.audit[:, WRONG, :PROVEN].sum())

    def overall(self, label: int | None = None) -> Tensor:
        """Ranges over all classes, or of one; float64 (neurons, 4)."""
        return narrowed(self.ranges) if label is None else self.of_label(label)

    def merged(self, other: LayerVulnerability) -> LayerVulnerability:
        """The sums over both."""
        same = self.name == other.name and self.format == other.format and torch.equal(self.neurons, other.neurons)
        if not same or self.inputs.shape != other.inputs.shape:
            raise ConfigError(
                f"{self.name!r} and {other.name!r} are not the same layer with the same neurons and format "
                f"({self.format}, {other.format}): analyse both shards with the same model, method and seed"
            )
        labels = distinct(torch.cat([self.labels, other.labels]))
        spread = []
        for one in (self, other):
            wide = _EMPTY.repeat(labels.numel(), one.neurons.numel(), 1)
            wide[torch.searchsorted(labels, one.labels)] = one.ranges
            spread.append(wide)
        return replace(
            self,
            critical=self.critical + other.critical,
            labels=labels,
            ranges=narrowed(torch.stack(spread)),
            inputs=self.inputs + other.inputs,
            nans=self.nans + other.nans,
            audit=torch.cat([self.audit, other.audit]),
            left=self.left + other.left,
            powers=self.powers + other.powers,
            by_neuron=self.by_neuron + other.by_neuron,
            exhaustive=self.exhaustive and other.exhaustive,
            probes=self.probes + other.probes,
            forwards=self.forwards + other.forwards,
        )


def distinct(classes: Tensor) -> Tensor:
    """The different classes among these, ascending, int64."""
    return torch.tensor(sorted(set(classes.tolist())), dtype=torch.int64)


def _powers(values: Tensor) -> Tensor:
    return torch.stack([(values**power).sum(dim=0) for power in (1, 2, 3)])


def narrowed(ranges: Tensor) -> Tensor:
    """Over the first dimension: what is harmless for all, and critical for all."""
    safe_low, critical_low, safe_high, critical_high = ranges.unbind(dim=-1)
    return torch.stack(
        [safe_low.amax(dim=0), critical_low.amin(dim=0), safe_high.amin(dim=0), critical_high.amax(dim=0)], dim=-1
    )


def verdict(ranges: Tensor, delta: Tensor, nans: Tensor) -> Tensor:
    """Indices into `VERDICTS` of errors against ranges (…, 4).

    A NaN is vulnerable, unless NaNs were tried in this neuron (`nans`, (…, 2)) and did not change the class: one that
    nothing reads, or whose NaN is clamped away.
    """
    safe_low, critical_low, safe_high, critical_high = ranges.unbind(dim=-1)
    tried, hit = nans.unbind(dim=-1)
    harmless = (delta >= safe_low) & (delta <= safe_high)
    critical = (delta <= critical_low) | (delta >= critical_high)
    of_nan = torch.where(hit == tried, 2, torch.where(hit == 0, 0, 1))
    return torch.where(torch.isnan(delta), of_nan, torch.where(harmless, 0, torch.where(critical, 2, 1)))
