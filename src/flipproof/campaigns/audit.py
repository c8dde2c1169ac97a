"""The audit of a campaign: some trials run again, whole and uncached, on a fresh copy of the model.

Shortcuts (cached cuts, several upsets in one forward) and the restoring of state are proved before they are used. The
audit holds them against the plain way while the campaign runs: a random share of the trials, and five at the least,
must give the same bits. One difference stops the campaign and says which trial it was and what caused it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from hashlib import blake2b

from torch import nn

from flipproof.campaigns.trial import TrialRunner
from flipproof.errors import AuditError
from flipproof.running.data import Output
from flipproof.running.evaluation import Answers
from flipproof.running.resume import sharing_memory
from flipproof.running.straight import refers_to_tensors
from flipproof.spaces.contract import Faults

LEAST = 5
"""So many trials of a campaign are audited, however small the share."""


@dataclass(frozen=True)
class Audit:
    """Which trials run again, and on what.

    Attributes:
        share: of the trials, drawn at random; a function of seed, point and trial.
        first: (point, trial) of those that are audited in any case.
        seed: of the campaign.
        pristine: a copy of the model as it came; each audit runs on a copy of that. None to run on the model itself.
        reason: why there is no copy.
    """

    share: float
    first: frozenset[tuple[int, int]]
    seed: int
    pristine: nn.Module | None
    reason: str | None = None

    def chooses(self, point: int, trial: int) -> bool:
        """Whether this trial is audited."""
        if (point, trial) in self.first:
            return True
        digest = blake2b(f"audit {self.seed} {point} {trial}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.share * 2**64

    def check(self, runner: TrialRunner, point: int, trial: int, faults: Faults, answers: Answers) -> None:
        """Run a trial again and compare.

        Raises:
            AuditError: if anything differs.
        """
        here = f"point {point} ({runner.points[point]!r}), trial {trial}"
        runner.ask_without_faults(point, trial)
        if self.pristine is None:
            difference = runner.differs(runner, faults, answers)
        else:
            with runner.on_copy(deepcopy(self.pristine)) as twin:
                difference = runner.differs(twin, faults, answers)
        if difference is None:
            return
        runner.ask_without_faults(point, trial)
        shortcut = runner.blame(faults, answers)
        if shortcut is None:
            raise AuditError(
                f"audit of {here}: {difference} on a fresh copy of the model, but the model itself repeats its answer. "
                f"Either it keeps state that is not watched (global variables, closures, compiled objects), or a copy "
                f"of it is not the same model (a function that refers to the original). Mend that, or pass audit=0: "
                f"the report then says that nothing was audited",
                "state",
                point,
                trial,
            )
        raise AuditError(
            f"audit of {here}: {difference} when it ran whole; the shortcut {shortcut!r} had changed it. Run again: "
            f"finished trials are redone without it",
            shortcut,
            point,
            trial,
        )


def audit_of(model: nn.Module, share: float, ceilings: Sequence[int], seed: int, output: Output) -> Audit | None:
    """The audit of a campaign, before anything has touched the model; None for a share of 0.

    Args:
        model: as it came, in eval mode.
        share: of the trials.
        ceilings: trials planned at each point.
        seed: of the campaign.
        output: what picks the tensor to judge.
    """
    if share == 0:
        return None
    pristine, reason = None, _uncopyable(model, output)
    if reason is None:
        try:
            pristine = deepcopy(model)
        except Exception as error:  # copying runs code of the model's own
            reason = f"the model cannot be copied ({type(error).__name__}: {error})"
        else:
            for parameter in pristine.parameters():
                parameter.grad = None
    return Audit(share, frozenset(_spread(ceilings)), seed, pristine, reason)


def _spread(ceilings: Sequence[int]) -> list[tuple[int, int]]:
    """The first trials of points that lie evenly over the sweep."""
    points = len(ceilings)
    order = range(points) if points <= LEAST else [round(i * (points - 1) / (LEAST - 1)) for i in range(LEAST)]
    rounds = ((p, t) for t in range(max(ceilings, default=0)) for p in order if t < ceilings[p])
    return [job for job, _ in zip(rounds, range(LEAST), strict=False)]


def _uncopyable(model: nn.Module, output: Output) -> str | None:
    """Why a copy would go on using parts of the original."""
    if callable(output) and refers_to_tensors(output):
        return "output= refers to tensors or modules of its own"
    tensors = dict([*model.named_parameters(), *model.named_buffers()])  # a tied tensor is one and stays one
    if groups := sharing_memory(model, tensors):
        return f"{' and '.join(sorted(groups[0]))} share memory, which a copy does not"
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(refers_to_tensors(hook) for hook in hooks):
            return f"a hook of {name or 'the model'} refers to tensors or modules of its own"
        if callable(vars(module).get("forward")) and refers_to_tensors(vars(module)["forward"]):
            return f"the forward of {name or 'the model'} was replaced by one that refers to tensors or modules"
    return None
