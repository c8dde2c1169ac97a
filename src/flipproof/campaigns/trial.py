"""One trial: draw, inject, measure against the golden run, restore; and the record it leaves."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from platform import python_version

import torch

from flipproof.campaigns.answers import encode_answers
from flipproof.campaigns.audit import Audit
from flipproof.campaigns.record import NAMED_FAULTS, Trial
from flipproof.campaigns.records import seconds
from flipproof.engine.journal import Key
from flipproof.errors import AuditError
from flipproof.faults.base import FaultModel
from flipproof.faults.sampling import TrialGenerator
from flipproof.running.data import call
from flipproof.running.device import release_memory
from flipproof.running.evaluation import Answers, FaultyRunError, answer, eval_mode, one_thread, unlike
from flipproof.running.faulty import FaultyModel, same_answers
from flipproof.running.judge import Judge
from flipproof.running.metrics import Metric
from flipproof.running.outcomes import classify
from flipproof.running.resume import Suffixes
from flipproof.running.scales import OUTCOMES
from flipproof.running.values import same
from flipproof.spaces.contract import Draw, Space

_PROOFS = 4
"""Draws that a shortcut is held against before the first trial; audits go on with that."""

_TYPICAL = 64
"""Points of a sweep whose draws say where trials start, at most; they lie evenly over it."""

_SMALLEST_CACHE = 16 * 2**20
_SMALLEST_FOR_NEURONS = 2**28
"""Bytes of golden activations that are allowed in any case: where every trial starts from some, as many as an analysis
may take.
"""


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

    The space must be `stored()` while it runs.

    Attributes:
        faulty: the model with its space, batches and golden answers.
        points: of the sweep.
        metrics: of all samples.
        judge: of the answers.
        seed: of all draws.
        device: where the model is.
        audit: which trials run again.
    """

    faulty: FaultyModel
    points: tuple[FaultModel, ...]
    metrics: tuple[Metric, ...]
    judge: Judge
    seed: int
    device: torch.device
    audit: Audit | None = None
    _next_look: float = 0.0
    _next_question: float = 0.0
    _asked: int = 0

    @property
    def space(self) -> Space:
        """What can be hit."""
        return self.faulty.space

    @cached_property
    def _streams(self) -> tuple[str, ...]:
        return tuple(point.stream for point in self.points)

    def draw(self, point: int, trial: int) -> Draw:
        """The faults of a trial: a function of seed, point and index alone."""
        return self.points[point].draw(self.space, TrialGenerator(self.seed, self._streams[point], trial))

    def repeats(self, point: FaultModel) -> bool:
        """Whether one trial of this point says everything."""
        return self.space.samples is None and point.repeats(self.space)

    def __call__(self, point: int, trial: int, batch: int | None = None) -> Trial:
        """Run one trial, on all data or on one batch of them, and if it is chosen for that, audit it."""
        began = time.perf_counter()
        faulty, draw = self.faulty, self.draw(point, trial)
        with eval_mode(faulty.model), one_thread(self.device):
            answers = faulty.answers(draw, batch)
            self._look_for_silent_writes(point, trial)
            self._ask_sometimes(point, trial)
            audited = self.audit is not None and self.audit.chooses(point, trial)
            if self.audit is not None and audited:
                self._check(self.audit, point, trial, draw, answers, batch)
        return self.record(point, trial, draw, answers, time.perf_counter() - began, audited=audited, batch=batch)

    def record(
        self,
        point: int,
        trial: int,
        draw: Draw,
        answers: Answers,
        took: float,
        *,
        audited: bool,
        batch: int | None = None,
    ) -> Trial:
        """What a trial leaves; judging its answers counts to the seconds that it took."""
        began = time.perf_counter() - took
        samples = slice(None) if batch is None else self.faulty.batches.part(batch)
        golden, targets = self.faulty.golden[samples], self.faulty.batches.targets[samples]
        outputs, error = answers.outputs, answers.error
        if outputs is None:
            outputs = torch.full_like(golden, float("nan"))
        elif outputs.shape != golden.shape:
            error = f"outputs of shape {tuple(outputs.shape)} instead of {tuple(golden.shape)}"
            outputs = torch.full_like(golden, float("nan"))
        ended = classify(golden, outputs, self.judge, targets)
        counts = torch.bincount(ended, minlength=len(OUTCOMES)).tolist()
        return Trial(
            point=point,
            trial=trial,
            coordinates=self.points[point].coordinates(),
            faults=len(draw),
            flips=answers.flips,
            digest=draw.digest,
            metrics={metric.name: metric.measure(outputs, targets, self.judge, golden) for metric in self.metrics},
            outcomes=dict(zip(OUTCOMES, counts, strict=True)),
            samples=len(targets),
            seconds=seconds(time.perf_counter() - began),
            versions=versions(),
            where=self.space.places(draw) if len(draw) <= NAMED_FAULTS else [],
            error=error,
            answers=encode_answers(ended, self.judge.correct(outputs, targets, golden)),
            layer=self.space.layer_of(draw),
            audited=audited,
            words=None if answers.words is None else answers.words._asdict(),
        )

    def _check(
        self, audit: Audit, point: int, trial: int, draw: Draw, answers: Answers, batch: int | None = None
    ) -> None:
        """Audit a trial, on a model that gives its fault-free answers before and after.

        Raises:
            AuditError: if anything differs.
        """
        self.ask_without_faults(point, trial)
        difference = audit.difference(self.faulty, draw, answers, batch)
        if difference is not None:
            self.ask_without_faults(point, trial)
            raise audit.error(self.faulty, draw, answers, difference, point, trial, repr(self.points[point]), batch)

    def ask_without_faults(self, point: int, trial: int) -> None:
        """Run one batch without faults, another one each time: it must answer as in the golden run.

        Raises:
            AuditError: if it does not: the model keeps state where nobody watches.
        """
        batch = self._asked % len(self.faulty.batches.inputs)
        self._asked += 1
        if not self._as_golden(batch):
            self._refuse_silent(self._silent_writes(), point, trial)
            raise AuditError(
                f"after point {point} ({self.points[point]!r}), trial {trial}, {self._keeps_state()}",
                "state",
                point,
                trial,
            )

    def _as_golden(self, batch: int) -> bool:
        """Whether a batch is answered without faults as in the golden run."""
        faulty = self.faulty
        faulty.randomness.pin()
        try:
            found = answer(lambda: call(faulty.model, faulty.batches.inputs[batch]), faulty.output, batch)
            return same(found, faulty.golden[faulty.batches.part(batch)])
        except FaultyRunError:
            return False
        finally:
            if faulty.state.changed():
                faulty.state.restore()

    def _keeps_state(self) -> str:
        """What is said if it is not, and nothing was seen to be written."""
        return (
            "the model no longer gives its fault-free answers, although its parameters, buffers and attributes are as "
            "they were: it keeps state in a global variable, a closure, a default argument, or an object that cannot "
            "be looked into. That cannot be put back: finished trials are worth nothing, and this model answers "
            "differently from now on. Keep such state in attributes of the module"
        )

    def _ask_sometimes(self, point: int, trial: int) -> None:
        """Run a batch without faults as often as that costs a fiftieth of the time."""
        now = time.perf_counter()
        if self.audit is not None and now >= self._next_question:
            self.ask_without_faults(point, trial)
            self._next_question = time.perf_counter() + 50 * (time.perf_counter() - now)

    def _look_for_silent_writes(self, point: int, trial: int) -> None:
        """Compare every bit of the model as often as that costs a hundredth of the time.

        Raises:
            AuditError: naming what the model wrote to where no version counter sees it.
        """
        now = time.perf_counter()
        if now < self._next_look:
            return
        silent = self._silent_writes()
        self._next_look = time.perf_counter() + 100 * (time.perf_counter() - now)
        self._refuse_silent(silent, point, trial)

    def _silent_writes(self) -> list[str]:
        """Tensors that hold other bits than they should, and were not seen to be written."""
        return self.faulty.state.verify()

    def _refuse_silent(self, silent: list[str], point: int, trial: int) -> None:
        if silent:
            raise AuditError(
                f"point {point} ({self.points[point]!r}), trial {trial} or one shortly before it: the model wrote to "
                f"{', '.join(silent[:5])} where no version counter sees it (through .data, or from compiled code), so "
                f"what a trial left there may have reached later ones. It was put back. Run again: finished trials are "
                f"redone, and every tensor is then compared after every batch",
                "versions",
                point,
                trial,
            )

    def prepare(self, suffixes: Suffixes, budget: int) -> bool:
        """Let `suffixes` keep what trials start from; False if the first draws of all points gain too little."""
        some = range(0, len(self.points), -(-len(self.points) // _TYPICAL))
        draws = [self.draw(p, t) for p in some for t in range(_PROOFS)]
        return self.faulty.prepare(suffixes, budget, draws)

    def faithful(self, suffixes: Suffixes) -> bool:
        """Whether trials from cached cuts are those of whole runs, bit by bit, for the first draws of every point."""
        draws = self.first_draws()
        cut, whole = replace(self.faulty, suffixes=suffixes), self.faulty.whole()
        return all(same_answers(cut.answers(draw), whole.answers(draw)) for draw in draws)

    def first_draws(self) -> list[Draw]:
        """Those that what is to be proved is held against."""
        keys = ((p, t) for t in range(_PROOFS) for p in range(len(self.points)))
        return [self.draw(p, t) for p, t in islice(keys, _PROOFS)]

    @property
    def cache_bytes(self) -> int:
        """How much may be kept by default: with what storing took, as much again as the parameters."""
        parameters = sum(parameter.nbytes for parameter in self.faulty.model.parameters())
        copied = sum(original.nbytes for original in self.space.originals().values())
        least = _SMALLEST_CACHE if self.space.samples is None else _SMALLEST_FOR_NEURONS
        return max(parameters - copied, least)

    @property
    def serial_only(self) -> str:
        """Why trials cannot be given to worker processes."""
        if self.device.type == "cpu":
            return ""
        return f"workers need the CPU; on {self.device} one process already fills the device"

    def describe(self, key: Key) -> str:
        """A trial in words."""
        return f"point {key[0]}, trial {key[1]}"

    def recover(self) -> None:
        """Give memory back to a device that ran out of it."""
        release_memory()

    def wake(self) -> None:
        """Nothing to prepare in a worker."""

    def differs(self) -> str:
        """How this copy of the model answers otherwise without faults."""
        faulty = self.faulty
        return unlike(faulty.model, faulty.batches, faulty.output, faulty.golden, faulty.state, faulty.randomness)
