"""One trial: draw, inject, measure against the golden run, restore; and the record it leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flipproof.campaigns.answers import encode_answers
from flipproof.campaigns.record import Trial
from flipproof.engine.journal import Key
from flipproof.errors import AuditError
from flipproof.faults.base import FaultModel
from flipproof.faults.sampling import TrialGenerator
from flipproof.running.data import Batches, Output, call
from flipproof.running.evaluation import Answers, FaultyRunError, answer, eval_mode, one_thread, run_faulty
from flipproof.running.metrics import Metric
from flipproof.running.outcomes import Decision, classify
from flipproof.running.resume import Suffixes
from flipproof.running.scales import OUTCOMES
from flipproof.running.snapshots import RandomState, Snapshot
from flipproof.running.values import same
from flipproof.spaces.contract import Faults
from flipproof.spaces.neurons import NeuronSpace
from flipproof.spaces.parameters import FaultSpace

if TYPE_CHECKING:
    from flipproof.campaigns.audit import Audit

_PROOFS = 4
"""Draws that a shortcut is held against before the first trial; audits go on with that."""

_SMALLEST_CACHE = 16 * 2**20

NAMED_FAULTS = 16
"""A record names up to this many faults; larger draws are told apart by their digest and can be drawn again."""


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
    state: Snapshot
    randomness: RandomState
    suffixes: Suffixes | None = None
    audit: Audit | None = None
    _next_look: float = 0.0
    _next_question: float = 0.0
    _asked: int = 0

    def draw(self, point: int, trial: int) -> Faults:
        """The faults of a trial: a function of seed, point and index alone."""
        return self.points[point].draw(self.fault_space, TrialGenerator(self.seed, self._names[point], trial))

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(map(repr, self.points))

    def __call__(self, point: int, trial: int) -> Trial:
        """Run one trial, and if it is chosen for that, audit it."""
        began = time.perf_counter()
        faults = self.draw(point, trial)
        with eval_mode(self.model), one_thread(self.device):
            answers = self.answers(faults, self.suffixes)
            self._look_for_silent_writes(point, trial)
            self._ask_sometimes(point, trial)
            audited = self.audit is not None and self.audit.chooses(point, trial)
            if self.audit is not None and audited:
                self.audit.check(self, point, trial, faults, answers)
        outputs, error = answers.outputs, answers.error
        if outputs is None:
            outputs = torch.full_like(self.golden, float("nan"))
        elif outputs.shape != self.golden.shape:
            error = f"outputs of shape {tuple(outputs.shape)} instead of {tuple(self.golden.shape)}"
            outputs = torch.full_like(self.golden, float("nan"))
        ended = classify(self.golden, outputs, self.decision)
        counts = torch.bincount(ended, minlength=len(OUTCOMES)).tolist()
        targets = self.batches.targets
        return Trial(
            point=point,
            trial=trial,
            coordinates=self.points[point].coordinates(),
            faults=len(faults),
            flips=answers.flips,
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
            audited=audited,
        )

    def ask_without_faults(self, point: int, trial: int) -> None:
        """Run one batch without faults, another one each time: it must answer as in the golden run.

        Raises:
            AuditError: if it does not: the model keeps state where nobody watches.
        """
        batch = self._asked % len(self.batches.inputs)
        self._asked += 1
        self.randomness.pin()
        try:
            found = answer(lambda: call(self.model, self.batches.inputs[batch]), self.output, batch)
            differs = not same(found, self.golden[self.batches.part(batch)])
        except FaultyRunError:
            differs = True
        finally:
            if self.state.changed():
                self.state.restore()
        if differs:
            self._refuse_silent(self.state.verify(), point, trial)
            raise AuditError(
                f"after point {point} ({self.points[point]!r}), trial {trial}, the model no longer gives its "
                f"fault-free answers, although its parameters, buffers and attributes are as they were: it keeps state "
                f"in a global variable, a closure, a default argument, or an object that cannot be looked into. That "
                f"cannot be put back: finished trials are worth nothing, and this model answers differently from now "
                f"on. Keep such state in attributes of the module",
                "state",
                point,
                trial,
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
        silent = self.state.verify()
        self._next_look = time.perf_counter() + 100 * (time.perf_counter() - now)
        self._refuse_silent(silent, point, trial)

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

    def answers(self, faults: Faults, suffixes: Suffixes | None) -> Answers:
        """What the model answers with these faults, from cached cuts or whole."""
        resume = self._resume(faults, suffixes)
        batches = self.batches

        def one(batch: int) -> Tensor:
            if resume is not None:
                return answer(lambda: resume(batch), self.output, batch)
            return answer(lambda: call(self.model, batches.inputs[batch]), self.output, batch)

        return run_faulty(
            len(batches.inputs), one, lambda: self.fault_space.corrupted(faults), self.state, self.randomness
        )

    @contextmanager
    def on_copy(self, model: nn.Module) -> Iterator[TrialRunner]:
        """The same runner for a fresh copy of the model, without any shortcut."""
        space = self.space.again(model)
        with eval_mode(model), space.stored():
            state = Snapshot(model, like=self.model)  # which holds no fault now
            state.watch_bits()
            yield replace(self, model=model, space=space, state=state, suffixes=None, audit=None)

    def differs(self, twin: TrialRunner, faults: Faults, answers: Answers) -> str | None:
        """What differs if another runner does a trial whole; None if nothing does."""
        again = twin.answers(faults, None)
        if same_answers(again, answers):
            return None
        if again.outputs is None or answers.outputs is None:
            return "the model raised in one run and not in the other"
        if again.flips != answers.flips:
            return f"{again.flips} bits changed instead of {answers.flips}"
        return "outputs differ"

    def blame(self, faults: Faults, answers: Answers) -> str | None:
        """The shortcut without which the model itself answers otherwise; None if it is none of them."""
        whole = self.answers(faults, None)
        return "suffix" if self.suffixes is not None and not same_answers(whole, answers) else None

    def __getstate__(self) -> dict[str, Any]:
        """What was recorded of this model's objects means nothing in another process."""
        return {name: value for name, value in self.__dict__.items() if name != "state"}

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
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """In another process: one thread, and the state of the copy that arrived there."""
        torch.set_num_threads(1)
        if "state" not in vars(self):
            self.state = Snapshot(self.model)

    def repeats(self, point: FaultModel) -> bool:
        """Whether one trial of this point says everything."""
        return point.repeats(self.fault_space)

    @property
    def fault_space(self) -> FaultSpace:
        """The space, where it is one of stored bits."""
        assert isinstance(self.space, FaultSpace)
        return self.space

    def _resume(self, faults: Faults, suffixes: Suffixes | None) -> Callable[[int], Any] | None:
        """How to run a batch from the latest cached cut before anything that these faults touch; None for whole runs.

        It also looks whether the faults are gone a little behind the layers that they touch.
        """
        if suffixes is None or not len(faults):
            return None
        touched = self.fault_space.touched_names(faults)
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

    def faithful(self, suffixes: Suffixes) -> bool:
        """Whether trials from cached cuts are those of whole runs, bit by bit, for the first draws of every point."""
        draws = [self.draw(p, t) for t in range(_PROOFS) for p in range(len(self.points))][:_PROOFS]
        return all(same_answers(self.answers(f, suffixes), self.answers(f, None)) for f in draws)

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


def same_answers(left: Answers, right: Answers) -> bool:
    """Whether both are the same, bit by bit; two failures are the same whatever they say."""
    if left.outputs is None or right.outputs is None:
        return left.outputs is right.outputs and left.flips == right.flips
    return left.flips == right.flips and same(left.outputs, right.outputs)
