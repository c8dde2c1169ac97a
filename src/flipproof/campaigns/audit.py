"""The audit of a campaign: some trials run again, whole and uncached, on a fresh copy of the model.

Shortcuts (cached cuts, several upsets in one forward) and the restoring of state are proved before they are used. The
audit holds them against the plain way while the campaign runs: a random share of the trials, and five at the least,
must give the same bits. One difference stops the campaign and says which trial it was and what caused it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
import torch
from torch import nn

from flipproof.errors import AuditError
from flipproof.faults.sampling import TrialGenerator
from flipproof.running.data import Output, answered, call
from flipproof.running.evaluation import Answers, FaultyRunError
from flipproof.running.faulty import FaultyModel, same_answers
from flipproof.running.resume import sharing_memory
from flipproof.running.straight import refers_to_tensors
from flipproof.running.values import same
from flipproof.spaces.contract import Draw

AUDITED_ALONE = 2
"""Where each sample has an upset of its own and they share forwards, so many of a trial run again alone, besides."""

AUDITED_UPSETS = 8
"""Where every upset has a forward of its own, so many of a trial run again."""

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

    def difference(self, faulty: FaultyModel, draw: Draw, answers: Answers, batch: int | None = None) -> str | None:
        """What differs if the trial, or one batch of it, runs again, whole, on a fresh copy; None if nothing does."""
        if self.pristine is None:
            return self._differs(faulty, faulty.whole(), draw, answers, batch)
        with faulty.on_copy(deepcopy(self.pristine)) as twin:
            return self._differs(faulty, twin, draw, answers, batch)

    def _differs(
        self, faulty: FaultyModel, twin: FaultyModel, draw: Draw, answers: Answers, batch: int | None
    ) -> str | None:
        if faulty.space.samples is not None:
            return self._upsets_differ(faulty, twin, draw, answers, batch)
        again = twin.answers(draw, batch)
        if same_answers(again, answers):
            return None
        if again.outputs is None or answers.outputs is None:
            return "the model raised in one run and not in the other"
        if again.flips != answers.flips:
            return f"{again.flips} bits changed instead of {answers.flips}"
        return "outputs differ"

    def _upsets_differ(
        self, faulty: FaultyModel, twin: FaultyModel, draw: Draw, answers: Answers, only: int | None
    ) -> str | None:
        """The same where each sample has an upset of its own: all in shared forwards, and some alone."""
        assert answers.outputs is not None
        batches = faulty.batches
        if not faulty.alone and not same_answers(twin.answers(draw, only), answers):
            return "outputs differ"
        many = AUDITED_UPSETS if faulty.alone else AUDITED_ALONE
        choice = TrialGenerator(self.seed, f"audit {draw.digest}", 0)
        borders = np.cumsum([0, *batches.sizes])
        ran = slice(0, batches.samples) if only is None else batches.part(only)
        with twin.space.corrupted(draw):
            for sample in np.unique(ran.start + choice.below(ran.stop - ran.start, many)).tolist():
                batch = int(np.searchsorted(borders, sample, side="right")) - 1
                row = sample - int(borders[batch])
                try:
                    found = twin.alone_answer(batch, row, draw)
                except FaultyRunError:
                    if not bool(torch.isnan(answers.outputs[sample - ran.start]).all()):
                        return f"the model raised on sample {sample} with its upset alone"
                    continue
                if not same(found[row], answers.outputs[sample - ran.start]):
                    return f"outputs of sample {sample} differ"
                others = torch.arange(found.shape[0]) != row
                if not faulty.alone and not same(found[others], faulty.golden[batches.part(batch)][others]):
                    return f"the upset of sample {sample} changed other samples of its batch"
        return None

    def error(
        self,
        faulty: FaultyModel,
        draw: Draw,
        answers: Answers,
        difference: str,
        point: int,
        trial: int,
        name: str,
        batch: int | None = None,
    ) -> AuditError:
        """What an audit that failed says, once it is known what caused the difference."""
        here = f"point {point} ({name}), trial {trial}"
        shortcut = _blame(faulty, draw, answers, batch)
        if shortcut is None:
            return AuditError(
                f"audit of {here}: {difference} on a fresh copy of the model, but the model itself repeats its answer. "
                f"Either it keeps state that is not watched (global variables, closures, compiled objects), or a copy "
                f"of it is not the same model (a function that refers to the original). Mend that, or pass audit=0: "
                f"the report then says that nothing was audited",
                "state",
                point,
                trial,
            )
        return AuditError(
            f"audit of {here}: {difference} when it ran whole; the shortcut {shortcut!r} had changed it. Run again: "
            f"finished trials are redone without it",
            shortcut,
            point,
            trial,
        )


def _blame(faulty: FaultyModel, draw: Draw, answers: Answers, batch: int | None) -> str | None:
    """The shortcut without which the model itself answers otherwise; None if it is none of them."""
    together = faulty.whole().answers(draw, batch)
    if faulty.repaired is not None and not same_answers(replace(faulty, suffixes=None).answers(draw, batch), together):
        return "repaired words"
    shared = faulty.space.samples is not None and not faulty.alone
    if shared and not same_answers(together, faulty.whole(alone=True).answers(draw, batch)):
        return "shared batch"
    return "suffix" if faulty.suffixes is not None and not same_answers(together, answers) else None


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
    pristine, reason = None, uncopyable(model, output)
    if reason is None:
        try:
            pristine = deepcopy(model)
        except Exception as error:  # copying runs code of the model's own
            reason = f"the model cannot be copied ({type(error).__name__}: {error})"
        else:
            for parameter in pristine.parameters():
                parameter.grad = None
    return Audit(share, frozenset(_spread(ceilings)), seed, pristine, reason)


def on_copies(faulty: FaultyModel, audit: Audit | None) -> Audit | None:
    """The audit, on the model itself if a fresh copy does not give the golden outputs bit by bit."""
    if audit is None or audit.pristine is None:
        return audit
    try:
        with faulty.on_copy(deepcopy(audit.pristine)) as twin:
            twin.randomness.pin()
            first = answered(call(twin.model, twin.batches.inputs[0]), twin.output)
            twin.state.restore()
    except Exception as error:  # the copy of a model may fail in any way
        reason = f"a copy of the model fails ({type(error).__name__}: {error})"
    else:
        if same(first, faulty.golden[faulty.batches.part(0)]):
            return audit
        reason = "a copy of the model gives other outputs than the model"
    return replace(audit, pristine=None, reason=reason)


def _spread(ceilings: Sequence[int]) -> list[tuple[int, int]]:
    """The first trials of points that lie evenly over the sweep."""
    points = len(ceilings)
    order = range(points) if points <= LEAST else [round(i * (points - 1) / (LEAST - 1)) for i in range(LEAST)]
    rounds = ((p, t) for t in range(max(ceilings, default=0)) for p in order if t < ceilings[p])
    return [job for job, _ in zip(rounds, range(LEAST), strict=False)]


def uncopyable(model: nn.Module, output: Output) -> str | None:
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
