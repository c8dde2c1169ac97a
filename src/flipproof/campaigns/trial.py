"""One trial: draw, inject, measure against the golden run, restore; and the record it leaves."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from math import isinf, isnan
from platform import python_version
from typing import Any

import torch
from torch import Tensor, nn

from flipproof.campaigns.answers import encode_answers
from flipproof.campaigns.batches import Batches, Output
from flipproof.campaigns.evaluation import FaultyRunError, eval_mode, one_thread, run
from flipproof.campaigns.suffix import Suffixes
from flipproof.faults.models import FaultModel, Faults
from flipproof.faults.neurons import NeuronSpace
from flipproof.faults.sampling import TrialGenerator
from flipproof.faults.space import FaultSpace
from flipproof.metrics import Metric
from flipproof.outcomes import OUTCOMES, Decision, classify

_SMALLEST_CACHE = 16 * 2**20

NAMED_FAULTS = 16
"""A record names up to this many faults; larger draws are told apart by their digest and can be drawn again."""


@dataclass(frozen=True)
class Trial:
    """What one trial drew and what came of it: one line of the journal.

    Attributes:
        point: index of the fault point in the sweep.
        trial: index of the trial at this point.
        coordinates: what names the point, e.g. ``{"ber": 1e-05}``.
        faults: bits drawn; `flips`: bits that changed (the same, except for stuck cells).
        digest: tells this draw from any other.
        where: the faults as (name, value, bit), if there are at most 16 of them.
        metrics: one number a metric over all samples.
        outcomes: samples by outcome; they sum to `samples`.
        seconds: wall time, the only field that differs between two runs of a campaign.
        versions: what computed it.
        error: why every sample is a DUE, if the faulty model raised or gave outputs of another shape.
        answers: how each sample ended and whether it is correct, see `decode_answers`; None if nobody noted it.
        layer: the layer that a neuron campaign's upsets of this trial share; None for stored bits.
    """

    point: int
    trial: int
    coordinates: dict[str, float | int]
    faults: int
    flips: int
    digest: str
    metrics: dict[str, float]
    outcomes: dict[str, int]
    samples: int
    seconds: float
    versions: dict[str, str]
    where: list[tuple[str, int, int]] = field(default_factory=list)
    error: str | None = None
    answers: str | None = None
    layer: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, which has no word for such numbers: NaN is null, infinities are "inf" and "-inf"."""
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        record["metrics"] = {
            name: None if isnan(value) else str(value) if isinf(value) else value
            for name, value in self.metrics.items()
        }
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Trial:
        """The inverse of `to_json`."""
        metrics = {name: float("nan") if value is None else float(value) for name, value in record["metrics"].items()}
        where = [(str(name), int(value), int(bit)) for name, value, bit in record["where"]]
        return cls(**{**record, "metrics": metrics, "where": where})

    def row(self) -> dict[str, Any]:
        """As a flat row of `Assessment.trials`."""
        return {
            "point": self.point,
            **self.coordinates,
            "trial": self.trial,
            "faults": self.faults,
            "flips": self.flips,
            **self.metrics,
            **self.outcomes,
            "samples": self.samples,
            "seconds": self.seconds,
            "digest": self.digest,
            "error": self.error,
        }


@cache
def versions() -> dict[str, str]:
    """Versions of whatever computes a trial."""
    try:
        own = version("flipproof")
    except PackageNotFoundError:  # run from a source tree that was never installed
        own = "source"
    return {"flipproof": own, "torch": torch.__version__, "python": python_version()}


@dataclass
class TrialRunner:
    """Everything a trial needs. Executors call it; with worker processes each holds a copy.

    The fault space must be `stored()` while it runs.
    """

    model: nn.Module
    space: FaultSpace | NeuronSpace
    points: tuple[FaultModel, ...]
    batches: Batches
    output: Output
    metrics: tuple[Metric, ...]
    golden: Tensor
    decision: Decision
    seed: int
    device: torch.device
    suffixes: Suffixes | None = None

    def draw(self, point: int, trial: int) -> Faults:
        """The faults of a trial: a function of seed, point and index alone."""
        return self.points[point].draw(self.fault_space, TrialGenerator(self.seed, self._names[point], trial))

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(map(repr, self.points))

    def __call__(self, point: int, trial: int) -> Trial:
        """Run one trial."""
        began = time.perf_counter()
        faults = self.draw(point, trial)
        error = None
        with eval_mode(self.model), one_thread(self.device):
            resume = self._resume(faults)
            with self._corrupted(faults) as flips:
                try:
                    outputs = run(self.model, self.batches, self.output, resume, self._begin)
                except FaultyRunError as failure:
                    error = str(failure)[:500]
                else:
                    if outputs.shape != self.golden.shape:
                        error = f"outputs of shape {tuple(outputs.shape)} instead of {tuple(self.golden.shape)}"
        if error is not None:
            outputs = torch.full_like(self.golden, float("nan"))
        ended = classify(self.golden, outputs, self.decision)
        counts = torch.bincount(ended, minlength=len(OUTCOMES)).tolist()
        targets = self.batches.targets
        return Trial(
            point=point,
            trial=trial,
            coordinates=self.points[point].coordinates(),
            faults=len(faults),
            flips=flips,
            digest=faults.digest,
            metrics={metric.name: metric.measure(outputs, targets, self.decision) for metric in self.metrics},
            outcomes=dict(zip(OUTCOMES, counts, strict=True)),
            samples=self.batches.samples,
            seconds=time.perf_counter() - began,
            versions=versions(),
            where=self._where(faults),
            error=error,
            answers=encode_answers(ended, self.decision.classes_of(outputs) == targets),
            layer=self.space.layer_of(faults).name if isinstance(self.space, NeuronSpace) else None,
        )

    def repeats(self, point: FaultModel) -> bool:
        """Whether one trial of this point says everything."""
        return point.repeats(self.fault_space)

    @property
    def fault_space(self) -> FaultSpace:
        """The space, where it is one of stored bits."""
        assert isinstance(self.space, FaultSpace)
        return self.space

    def _corrupted(self, faults: Faults) -> AbstractContextManager[int]:
        return self.fault_space.corrupted(faults)

    def _begin(self, batch: int) -> None:
        """Called before each batch of a trial; stored faults are the same in all of them."""

    def _resume(self, faults: Faults) -> Callable[[int], Any] | None:
        """How to run a batch from the latest cached cut before anything that these faults touch; None for whole runs.

        It also looks whether the faults are gone a little behind the layers that they touch.
        """
        if self.suffixes is None or not len(faults):
            return None
        suffixes, touched = self.suffixes, self.fault_space.touched_names(faults)
        start, looks = suffixes.cut_of(touched), suffixes.looks_after(touched)
        return (lambda batch: suffixes.resume(start, batch, looks)) if start else None

    def prepare(self, suffixes: Suffixes, budget: int) -> bool:
        """Let `suffixes` keep the golden activations that trials start from; False if that would save too little."""
        draws = [self.draw(p, t) for p in range(len(self.points)) for t in range(4)]
        saved = [suffixes.position_of(self.fault_space.touched_names(faults)) for faults in draws if len(faults)]
        if not saved or sum(saved) / len(saved) < 0.05:
            return False
        suffixes.prepare(self.model, self.batches.inputs, self.batches.sizes, self.output, budget)
        return True

    @property
    def cache_bytes(self) -> int:
        """How much may be kept by default: with what storing took, as much again as the parameters."""
        parameters = sum(parameter.nbytes for parameter in self.model.parameters())
        copied = sum(original.nbytes for original in self.space.originals().values())
        return max(parameters - copied, _SMALLEST_CACHE)

    def _where(self, faults: Faults) -> list[tuple[str, int, int]]:
        if len(faults) > NAMED_FAULTS:
            return []
        return self.space.places(faults)
