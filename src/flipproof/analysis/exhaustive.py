"""Every single bit, alone: the ground truth that estimates are held against."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flipproof._interrupts import given_back
from flipproof.analysis._module_jobs import check_run
from flipproof.analysis._row_pool import RowPool, pool_of
from flipproof.analysis.bit_table import BitTable, TableHeader, TableSite, WordFlips, table_journal
from flipproof.analysis.opened_model import check_subject
from flipproof.campaigns.assess import noting, switch_off
from flipproof.campaigns.audit import Audit, audit_of, on_copies
from flipproof.campaigns.fingerprint import fingerprint_of
from flipproof.campaigns.merge import Shard
from flipproof.campaigns.trial import TrialRunner
from flipproof.campaigns.trial import versions as computed_by
from flipproof.engine.cluster import Client
from flipproof.engine.jobs import crew
from flipproof.engine.journal import Key, written
from flipproof.errors import AuditError, ConfigError, FlipproofWarning
from flipproof.faults import RandomBits
from flipproof.faults.sampling import TrialGenerator
from flipproof.running.data import Data, Output
from flipproof.running.decision import DecisionChoice
from flipproof.running.device import check_device, on_device, release_memory
from flipproof.running.evaluation import Answers, FaultyRunError, eval_mode, golden_run, one_thread
from flipproof.running.faulty import FaultyModel, same_answers
from flipproof.running.outcomes import classify
from flipproof.running.resume import Suffixes
from flipproof.running.scales import OUTCOMES
from flipproof.running.snapshots import RandomState, Snapshot, as_it_came
from flipproof.running.straight import refers_to_tensors
from flipproof.running.tasks.base import Task
from flipproof.running.tasks.classification import task_of
from flipproof.running.tasks.recognise import read
from flipproof.spaces.contract import Faults, Positions
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Parameters, Site
from flipproof.spaces.tensors import FormatChoice

CHUNK = 8
"""Words of a job: 256 flips of float32."""

_AT_ONCE = 2**26
"""Bytes of answers that are kept at once, at most."""

POOLED, SUFFIX = "pooled rows", "suffix"
"""Shortcuts, as a failed audit names them."""


def inject_all(
    model: nn.Module,
    data: Data,
    *,
    where: Parameters | None = None,
    format: FormatChoice = None,
    output: Output = None,
    task: Task | None = None,
    decision: DecisionChoice = None,
    shard: str | None = None,
    journal: str | os.PathLike[str] | None = None,
    workers: int = 1,
    client: Client | None = None,
    progress: bool | None = None,
    device: str | torch.device | None = None,
    audit: float = 0.001,
    cache_bytes: int = 2**28,
) -> BitTable:
    """What every single stored bit does when it alone flips: the outcome of every sample, for every flip.

    Nothing is drawn and nothing is estimated, so this is what estimates can be held against. Each flip is injected,
    what it reaches runs, and every sample ends as in `assess`: masked (bit-identical output), non-critical SDC,
    critical SDC or DUE. The records are those of whole runs, one flip each, bit by bit, whatever of this can be proved
    for the model:

    - A flip that a code repairs, or a format does not read, leaves every value as it is: it needs no run.
    - Only what lies behind the layer runs, from golden activations; a sample whose activations are golden again, bit by
      bit, has its golden answer.
    - Flips of one tensor share forwards, if what a row answers is proved not to depend on the other rows of its batch,
      nor on where it is. Flips in a weight of a convolution or linear layer share the layer's own run too, each in the
      place of one filter.

    Batches of one size, as large as runs fast, allow the most; a channels-last network and channels-last images do
    their part on a CPU. Where nothing can be proved, flips run one by one, from cached cuts or whole.

    Args:
        model: any classifier, as for `assess`; it comes back as it was.
        data: batches `(inputs, targets)`, on all of which every flip is tried.
        where: whose bits; all parameters by default.
        format: how they are stored, as for `assess`.
        output: picks the tensor to judge out of what the model returns.
        task: what the model is for, as for `assess`.
        decision: how outputs become classes, as for `assess`.
        shard: "3/100" does the third of a hundred parts: of each tensor a random sample of its words, with all of their
            bits. Any shards that are done are a fair sample of all bits; `BitTable.load` puts their journals together.
            The first ones hold all small tensors.
        journal: file to write and resume, one JSON line for each 8 words of a tensor. Shards may share one.
        workers: processes. The table does not depend on their number.
        client: see `assess`.
        progress: show a progress bar; None shows it on a terminal.
        device: where to run; None is where the model is. Forwards are shared on a CPU only.
        audit: share of the flips that run again whole, on a fresh copy of the model, and one of each job in any case.
            One difference stops the work, and what caused it is switched off when it is resumed. 0 audits nothing.
        cache_bytes: memory for golden activations where flips run one by one.

    Returns:
        A table by tensor and bit, of all journalled jobs of these shards.

    Warns:
        FlipproofWarning: if more than 1 % of the model's stored bits are outside and `where` did not say so.

    Raises:
        FlipproofError: one of its kinds, as for `assess`.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(20, 4)
        >>> found = fp.inject_all(net, [(x, net(x).argmax(dim=1))])
        >>> found.of, found.done, len(found.table)
        (1856, 1.0, 128)
        >>> int(found.total[["masked", "non_critical_sdc", "critical_sdc", "due"]].sum()) == 1856 * 20
        True
    """
    where = Parameters() if where is None else where
    check_subject("inject_all", model, where, (Parameters,), format)
    check_run("inject_all", workers, journal)
    part = Shard(1, 1) if shard is None else Shard.read(shard)
    if isinstance(audit, bool) or not isinstance(audit, (int, float)) or not 0 <= audit <= 1:
        raise ConfigError(f"inject_all takes a share of the flips from 0 to 1 for audit=, got {audit!r}")
    if isinstance(cache_bytes, bool) or not isinstance(cache_bytes, int) or cache_bytes < 0:
        raise ConfigError(f"inject_all takes 0 (no cache) or more bytes for cache_bytes=, got {cache_bytes!r}")
    target = check_device(model, device)
    file = None if journal is None else table_journal(journal)
    with _opened(model, data, where, format, output, task_of(task, decision), target, audit) as work:
        keys = work.keys(part)
        with written(file, work.header) as known, noting(file):
            off = frozenset() if file is None else file.switched_off
            found: dict[Key, WordFlips] = {record.key: record for record in known}
            missing = [key for key in keys if key not in found]
            if missing:
                work.take_shortcuts(off, cache_bytes)
                with crew(
                    work,
                    workers=workers,
                    client=client,
                    journal=file,
                    total=len(keys),
                    done=len(keys) - len(missing),
                    progress=progress,
                    label=work.describe,
                ) as hands:
                    for record in hands.run(missing):
                        found[record.key] = record
    return BitTable(work.header, [found[key] for key in keys])


@contextmanager
def _opened(
    model: nn.Module,
    data: Data,
    where: Parameters,
    format: FormatChoice,
    output: Output,
    task: Task | None,
    target: torch.device,
    share: float,
) -> Iterator[_Flips]:
    """Store the model, make the golden run; give the model back at the end."""
    with given_back(model), on_device(model, target), as_it_came(model) as came, eval_mode(model), one_thread(target):
        space = FaultSpace(model, where=where, format=format)
        if (missing := space.shortfall()) is not None:
            warnings.warn(missing, FlipproofWarning, stacklevel=4)
        batches, known, reading = read(model, data, target, task, output)
        randomness = RandomState(0, target)
        auditing = audit_of(model, share, (), 0, reading)
        pristine = None if auditing is None else auditing.pristine
        if pristine is not None:
            came.share(pristine)
        with space.stored():
            state = Snapshot(model, like=pristine)
            golden = golden_run(model, batches, reading, state, randomness)
            judge = known.judge(model, batches, reading, golden)
            state.verify()
            judge.check_targets(batches.targets)
            faulty = FaultyModel(model, space, batches, reading, golden, state, randomness)
            runner = TrialRunner(faulty, (RandomBits(1),), (), judge, 0, target)
            yield _Flips(runner, space, on_copies(faulty, auditing), where)


class _Flips:
    """Jobs of a few words each: every bit of them, flipped alone.

    Args:
        runner: of trials on the model, with its golden run.
        space: every bit.
        audit: of a share of the flips.
        where: what the space is.
    """

    def __init__(self, runner: TrialRunner, space: FaultSpace, audit: Audit | None, where: Parameters) -> None:
        self._runner, self._space, self._audit = runner, space, audit
        self._numbers = {site.name: i for i, site in enumerate(space.sites)}
        self._pooling, self._cache_bytes = False, 0
        self._suffixes: Suffixes | None = None
        self._pool: tuple[str, RowPool | None] | None = None
        faulty = runner.faulty
        about = asdict(fingerprint_of(runner, RandomBits(1), where))
        for drawn in ("faults", "metrics", "metrics_code", "seed"):  # nothing is drawn, and no metric asked for
            del about[drawn]
        about["batches"] = list(faulty.batches.sizes)
        self.header = TableHeader(
            fingerprint=about,
            sites=tuple(
                TableSite(s.name, s.layer, s.kind, repr(s.format), s.words, tuple(_count(s, b) for b in range(s.width)))
                for s in space.sites
            ),
            samples=faulty.batches.samples,
            chunk=CHUNK,
            left_out=dict(space.left_out),
            left_out_bits=space.left_out_bits,
            versions=computed_by(),
        )

    def keys(self, shard: Shard) -> list[Key]:
        """The jobs of a shard: of each tensor every so manieth."""
        every = ((site.name, -(-site.words // CHUNK)) for site in self._space.sites)
        return [(name, chunk) for name, jobs in every for chunk in range(shard.number - 1, jobs, shard.of)]

    def take_shortcuts(self, off: frozenset[str], cache_bytes: int) -> None:
        """Use what can be proved for this model, and was not switched off by an audit."""
        faulty = self._runner.faulty
        switch_off(self._runner, off)
        if faulty.state.written or faulty.randomness.drawn:  # with state, a forward is more than its graph
            return
        self._pooling = POOLED not in off
        self._cache_bytes = 0 if SUFFIX in off else cache_bytes

    def _pool_of(self, site: Site) -> RowPool | None:
        """What flips of a tensor share forwards by; None if they run one by one."""
        faulty = self._runner.faulty
        if not self._pooling:
            return None
        if self._suffixes is None:
            self._suffixes = Suffixes.trace(faulty.model, faulty.batches.inputs)
            self._pooling = self._suffixes is not None
        if self._pool is None or self._pool[0] != site.name:
            self._pool = (site.name, pool_of(faulty, self._suffixes, site))
        return self._pool[1]

    def _keep_cuts(self) -> None:
        """Before flips run one by one: let them start from cached cuts, if that is proved and saves enough."""
        faulty, budget = self._runner.faulty, self._cache_bytes
        self._cache_bytes = 0
        if not budget or (callable(faulty.output) and refers_to_tensors(faulty.output)):
            return
        suffixes = Suffixes.trace(faulty.model, faulty.batches.inputs)
        if suffixes is not None and self._runner.prepare(suffixes, budget) and self._runner.faithful(suffixes):
            faulty.suffixes = suffixes

    def __call__(self, name: str, chunk: int) -> WordFlips:
        """Flip every bit of some words of a tensor."""
        began = time.thread_time()
        faulty, site = self._runner.faulty, self._space.sites[self._numbers[name]]
        words, bits, positions = _flips_of(site, chunk)
        rows = np.zeros((len(positions), 6), np.int64)
        rows[:, 0], rows[:, 1] = words, bits
        audited = self._audited(site, chunk, positions)
        at_once = max(1, _AT_ONCE // max(faulty.golden.nbytes, 1))
        shared = False
        with eval_mode(faulty.model), one_thread(self._runner.device):
            for first in range(0, len(positions), at_once):
                here = slice(first, first + at_once)
                outputs, rows[here, 5], shared = self._answers(site, positions[here], audited[here])
                rows[here, 2:5] = self._counts(outputs)
            if silent := faulty.state.verify():
                raise AuditError(
                    f"{name}, part {chunk}: the model wrote to {', '.join(silent[:5])} where no version counter sees "
                    f"it, so what one flip left there may have reached later ones. It was put back. Run again: "
                    f"finished parts are redone, and every tensor is then compared after every batch",
                    "versions",
                    self._numbers[name],
                    chunk,
                )
        return WordFlips(name, chunk, rows, shared, int(audited.sum()), round(time.thread_time() - began, 4))

    def _answers(
        self, site: Site, positions: Positions, audited: NDArray[np.bool_]
    ) -> tuple[Tensor, NDArray[np.bool_], bool]:
        """What the model answers under each flip, which are read as without faults, whether they shared forwards."""
        pool = self._pool_of(site)
        if pool is not None:
            try:
                found = pool.answers(positions)
            except FaultyRunError:  # some flip did that, and the others have nothing to do with it
                pass
            else:
                for flip in np.flatnonzero(audited).tolist():
                    mine = Answers(found.outputs[flip], 1, words=found.words[flip])
                    self._check(site, int(positions[flip]), mine, POOLED)
                return found.outputs, found.equal, True
        return *self._one_by_one(site, positions, audited), False

    def _one_by_one(
        self, site: Site, positions: Positions, audited: NDArray[np.bool_]
    ) -> tuple[Tensor, NDArray[np.bool_]]:
        """The same, each flip in forwards of its own. What raises answers NaN."""
        self._keep_cuts()
        faulty = self._runner.faulty
        outputs = torch.full((len(positions), *faulty.golden.shape), float("nan"), dtype=faulty.golden.dtype)
        equal = np.zeros(len(positions), bool)
        for flip, position in enumerate(positions.tolist()):
            draw = Faults(np.array([position]))
            answers = faulty.answers(draw)
            if audited[flip]:
                self._check(site, position, answers, "repaired words" if faulty.suffixes is None else SUFFIX)
            if answers.outputs is not None and answers.outputs.shape == faulty.golden.shape:
                outputs[flip] = answers.outputs
            with self._space.corrupted(draw):
                equal[flip] = self._space.as_stored
        self._runner.ask_without_faults(0, 0)
        return outputs, equal

    def _counts(self, outputs: Tensor) -> NDArray[np.int64]:
        """Samples of each flip that ended as non-critical SDC, critical SDC and DUE."""
        flips, golden = len(outputs), self._runner.faulty.golden
        repeated = golden[None].expand(flips, *golden.shape).flatten(0, 1)
        targets = self._runner.faulty.batches.targets
        again = targets[None].expand(flips, *targets.shape).flatten(0, 1)
        ended = classify(repeated, outputs.flatten(0, 1), self._runner.judge, again).reshape(flips, -1)
        return torch.stack([(ended == i).sum(dim=1) for i in range(1, len(OUTCOMES))], dim=1).numpy()

    def _audited(self, site: Site, chunk: int, positions: Positions) -> NDArray[np.bool_]:
        """Which flips of a job run again: a function of the job."""
        if self._audit is None:
            return np.zeros(len(positions), bool)
        number = self._numbers[site.name]
        chosen = np.array([self._audit.chooses(number, position) for position in positions.tolist()])
        chosen[TrialGenerator(0, f"audit {site.name}", chunk).below(len(positions), 1)] = True
        return chosen

    def _check(self, site: Site, position: int, mine: Answers, shortcut: str) -> None:
        """Hold what a flip did against a whole run on a fresh copy of the model.

        Raises:
            AuditError: if anything differs.
        """
        assert self._audit is not None
        faulty, draw = self._runner.faulty, Faults(np.array([position]))
        difference = self._audit.difference(faulty, draw, mine)
        if difference is None:
            return
        word, bit = (int(part[0]) for part in site.locate(np.array([position - site.offset])))
        here = f"audit of {site.name}, word {word}, bit {bit}: {difference}"
        if same_answers(faulty.whole().answers(draw), mine):
            raise AuditError(
                f"{here} on a fresh copy of the model, but the model itself repeats its answer. Either it keeps state "
                f"that is not watched (global variables, closures, compiled objects), or a copy of it is not the same "
                f"model. Mend that, or pass audit=0: nothing is then audited",
                "state",
                self._numbers[site.name],
                position,
            )
        raise AuditError(
            f"{here} when it ran whole; the shortcut {shortcut!r} had changed it. Run again with the same journal: "
            f"finished parts are redone without it",
            shortcut,
            self._numbers[site.name],
            position,
        )

    @property
    def serial_only(self) -> str:
        """Why jobs cannot be given to worker processes."""
        return self._runner.serial_only

    def describe(self, key: Key) -> str:
        """A job in words."""
        return f"{key[0]}, part {key[1]}"

    def recover(self) -> None:
        """Give memory back to a device that ran out of it."""
        release_memory()

    def __getstate__(self) -> dict[str, Any]:
        """A pool is made anew where it is needed."""
        return {**self.__dict__, "_pool": None}

    def wake(self) -> None:
        """Nothing to prepare in a worker."""

    def differs(self) -> str:
        """How this copy of the model answers otherwise without faults."""
        return self._runner.differs()


def _count(site: Site, bit: int) -> int:
    return int(site.positions(bit).size)


@lru_cache(maxsize=2)
def _order(name: str, words: int) -> NDArray[np.int64]:
    """The words of a tensor in random order, always the same."""
    return np.argsort(TrialGenerator(0, f"words of {name}", 0).below(2**62, words), kind="stable")


def _flips_of(site: Site, chunk: int) -> tuple[Positions, Positions, Positions]:
    """Word, bit and global bit number of each flip of a job, ascending."""
    words = np.sort(_order(site.name, site.words)[chunk * CHUNK : (chunk + 1) * CHUNK])
    if site.is_even:
        first, width = words * site.width, np.full(len(words), site.width)
    else:
        first, width = site.layout.first(words), site.layout.width(words)
    bits = np.concatenate([np.arange(n) for n in width])
    return np.repeat(words, width), bits, site.offset + np.repeat(first, width) + bits
