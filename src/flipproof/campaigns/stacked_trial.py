"""Several trials a forward: as single ones, but answered by slots of a stack, and audited on a fresh one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, fields

from flipproof.campaigns.audit import Audit
from flipproof.campaigns.record import Trial
from flipproof.campaigns.trial import TrialRunner
from flipproof.engine.journal import Key
from flipproof.errors import AuditError
from flipproof.running.evaluation import Answers, FaultyRunError, eval_mode, one_thread
from flipproof.running.faulty import same_answers
from flipproof.running.stacked import StackedModel
from flipproof.running.values import same
from flipproof.spaces.contract import Draw
from flipproof.spaces.parameters import FaultSpace

TOGETHER = "together"
"""What an audit blames where a trial came out otherwise among others."""


@dataclass(kw_only=True)
class StackedRunner(TrialRunner):
    """Runs trials that share forwards. `faulty.golden` is what the stack answers without faults.

    Attributes:
        stack: `stored()` while it runs.
    """

    stack: StackedModel

    @classmethod
    def of(cls, runner: TrialRunner, stack: StackedModel) -> StackedRunner:
        """A runner of the same trials."""
        return cls(**{part.name: getattr(runner, part.name) for part in fields(runner)}, stack=stack)

    @property
    def together(self) -> int:
        """Trials a forward, at most."""
        return self.stack.slots

    @property
    def serial_only(self) -> str:
        """Why trials cannot be given to worker processes."""
        return f"together={self.together} shares forwards within one process; give one of the two"

    def __call__(self, point: int, trial: int, batch: int | None = None) -> Trial:
        """Run one trial, in the first slot."""
        assert batch is None, "trials that share forwards run on all batches"
        return self.many([(point, trial)])[0]

    def many(self, keys: Sequence[Key]) -> list[Trial]:
        """Run trials (point, trial), one a slot; slots that are left over stay without faults."""
        began = time.perf_counter()
        jobs = [(int(point), int(trial)) for point, trial in keys]
        draws = [self.draw(*job) for job in jobs]
        with eval_mode(self.faulty.model), one_thread(self.device):
            found = self.stack.answers(dict(enumerate(draws)))
            each = (time.perf_counter() - began) / len(jobs)
            self._look_for_silent_writes(*jobs[-1])
            self._ask_sometimes(*jobs[-1])
            records = []
            for slot, ((point, trial), draw) in enumerate(zip(jobs, draws, strict=True)):
                audit = self.audit if self.audit is not None and self.audit.chooses(point, trial) else None
                before = time.perf_counter()
                if audit is not None:
                    self._check(audit, point, trial, draw, found[slot])
                took = each + time.perf_counter() - before
                records.append(self.record(point, trial, draw, found[slot], took, audited=audit is not None))
        return records

    def _as_golden(self, batch: int) -> bool:
        golden = self.faulty.golden[self.faulty.batches.part(batch)]
        try:
            return all(same(slot, golden) for slot in self.stack.forward(batch).cpu())
        except FaultyRunError:
            return False

    def _keeps_state(self) -> str:
        return (
            f"the stack of together={self.together} no longer gives its fault-free answers, although it holds what it "
            f"held: the model keeps state in a global variable, a closure, or an object that cannot be looked into. "
            f"That cannot be put back: finished trials are worth nothing. Keep such state in attributes of the module"
        )

    def _silent_writes(self) -> list[str]:
        return [*super()._silent_writes(), *self.stack.differing()]

    def _check(
        self, audit: Audit, point: int, trial: int, draw: Draw, answers: Answers, batch: int | None = None
    ) -> None:
        """Run a trial again on a stack of a fresh copy, in another slot, all others being without faults.

        Raises:
            AuditError: if anything differs.
        """
        self.ask_without_faults(point, trial)
        assert audit.pristine is not None, "models that cannot be copied are not stacked"
        copy = deepcopy(audit.pristine)
        space, faulty = self.space, self.faulty
        assert isinstance(space, FaultSpace)
        twin = StackedModel(copy, space.again(copy), faulty.batches, faulty.output, self.together)
        slot = self.together - 1 - trial % self.together
        with twin.stored():
            again = twin.answers({slot: draw})[slot]
        if not same_answers(again, answers):
            self.ask_without_faults(point, trial)
            raise AuditError(
                f"audit of point {point} ({self.points[point]!r}), trial {trial}: its answers differ on a stack of a "
                f"fresh copy of the model that no other trial shares, so together={self.together} does not give what "
                f"the trial gives by itself. Leave together= out, in another journal",
                TOGETHER,
                point,
                trial,
            )
