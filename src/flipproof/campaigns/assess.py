"""`assess`: the front door. Golden run, then points × trials into a journal, resumable at any moment."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from flipproof._interrupts import given_back
from flipproof.campaigns._arguments import check_numbers
from flipproof.campaigns.assessment import (
    CHECK_EVERY,
    Assessment,
    CampaignJournal,
    answer,
    campaign_journal,
    narrow,
)
from flipproof.campaigns.audit import Audit, audit_of, on_copies, uncopyable
from flipproof.campaigns.header import header_of
from flipproof.campaigns.merge import Shard
from flipproof.campaigns.plan import Header, Plan
from flipproof.campaigns.record import Trial
from flipproof.campaigns.records import Records
from flipproof.campaigns.stacked_trial import TOGETHER, StackedRunner
from flipproof.campaigns.trial import TrialRunner
from flipproof.engine.cluster import Client
from flipproof.engine.jobs import Crew, crew
from flipproof.engine.journal import Journal, Key, written
from flipproof.errors import AuditError, ConfigError, FaultModelError, FlipproofWarning
from flipproof.faults.base import FaultModel
from flipproof.running.data import Batches, Data, Output
from flipproof.running.decision import DecisionChoice
from flipproof.running.device import check_device, on_device
from flipproof.running.evaluation import eval_mode, golden_run, one_thread
from flipproof.running.faulty import FaultyModel
from flipproof.running.metrics import Metrics, judged_by, resolve
from flipproof.running.neurons import neuron_space, own_space
from flipproof.running.resume import Suffixes
from flipproof.running.snapshots import RandomState, Snapshot, as_it_came
from flipproof.running.stacked import prove, refusal, stacked
from flipproof.running.straight import refers_to_tensors
from flipproof.running.tasks.base import Task, check_task
from flipproof.running.tasks.classification import task_of
from flipproof.running.tasks.recognise import read
from flipproof.spaces.contract import Space, Where
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Neurons, Parameters
from flipproof.spaces.tensors import FormatChoice, program_hint


def assess(
    model: nn.Module,
    data: Data,
    *,
    faults: FaultModel,
    format: FormatChoice = None,
    where: Parameters | Neurons | Where | None = None,
    trials: int = 100,
    metrics: Metrics | None = None,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    workers: int = 1,
    client: Client | None = None,
    device: str | torch.device | None = None,
    margin: float | None = None,
    confidence: float = 0.95,
    output: Output = None,
    task: Task | None = None,
    decision: DecisionChoice = None,
    cache_bytes: int | None = None,
    progress: bool | None = None,
    audit: float = 0.01,
    shard: str | None = None,
    together: int = 1,
) -> Assessment:
    """How a model behaves when the memory that holds it loses bits.

    The fault-free (golden) run comes first; then each point of the fault model runs `trials` times: draw, inject in
    place, run all data, compare with the golden outputs, restore bit-exactly. The model is assessed in eval mode and
    given back as it came: same bits, same training flags, same device. Records depend on nothing but model, data,
    format, faults and seed: not on the number of workers, the order of trials, or interruptions. On a CPU every
    process uses one torch thread (sums are taken in one order); use `workers` for more cores.

    Args:
        model: any module, such as one that gives one class score vector, or one score, a sample.
        data: batches `(inputs, targets)`, read once and kept in memory; targets are class numbers, or what the task
            takes. A tuple or list of inputs is passed as arguments, a mapping as keyword arguments.
        faults: what goes wrong; a sweep makes one point a value.
        format: how parameters are stored: one Format, a mapping {pattern: Format} whose first match wins, or None for
            each tensor's own type. One that quantises (`Affine` and what wraps it), given alone, stores the weights of
            all layers; a mapping means what it says, ``{"*": fp.Affine(8)}`` biases and norms too. What the format does
            not store stays in the fault space and is hit in its own type; only `where` leaves out. Formats that
            quantise change the golden run too: it then computes with what the format can represent.
        where: what can be hit: `fp.Parameters`, all by default, or `fp.Neurons`: a single upset in the output of a
            Conv, Linear or recurrent layer in each sample's inference; `format` then says how outputs are stored.
            ``fp.Parameters(kinds=("weight",))`` is FORTUNE's view: the weights and nothing else. Or a space of one's
            own: a `flipproof.spaces.contract.Where`.
        trials: repetitions a point (the ceiling, with `margin`). Points that draw nothing at random run once.
        metrics: names (of a classification: "accuracy", "auroc", "average_precision"), functions `(outputs, targets) →
            number`, torchmetrics objects, or a mapping name → function. None takes the task's own.
        seed: of all draws. The same seed draws the same bits of the same space: campaigns are paired.
        journal: journal to write and resume, JSON lines. None keeps records in memory only.
        workers: processes; each trial runs in one.
        client: whose workers run the trials instead: a `dask.distributed.Client`, or an executor as in
            `concurrent.futures`. Only this process writes the journal. Workers need the same flipproof, torch and
            processor as this machine, or they are refused by name (docs/cluster.md).
        device: where to run; None is where the model is.
        margin: stop a point once the interval of every metric's mean is within ± margin and so is its tail, what a
            rare fatal flip could still do; looking every 20 trials. At 95 % that takes 3.7 / margin trials at least.
        confidence: of all intervals.
        output: picks the tensor to judge out of what the model returns: function, dict key or tuple index.
        task: what the model is for, and so what is right, tolerable and critical: `fp.Classification`, `fp.MultiLabel`,
            `fp.Regression`, `fp.Segmentation`, `fp.Detection`, `fp.Tokens`, `fp.Generation`, `fp.Embedding` or
            `fp.Custom`. None recognises it where targets and answers leave no doubt; the header says what it is.
        decision: how outputs become classes, in short for `fp.Classification(decision=…)`: "logits", "probabilities",
            "argmax", or a number, the threshold of a single output. None recognises it; where outputs could be either,
            a warning says what was assumed. The header has it as `decision`.
        cache_bytes: memory for golden activations, with which a trial starts at the first faulted layer; 0 keeps none,
            and every trial in which any value is read otherwise runs whole. None allows the size of the model's
            parameters, less what `format` keeps of them (a campaign then holds the model and one copy), but at least
            16 MiB, and 256 MiB for neurons. Records do not depend on it.
        progress: show a progress bar; None shows it on a terminal.
        audit: share of the trials that run again whole, uncached, on a fresh copy of the model, at least five; of a
            trial over neurons also two of its upsets, each in a forward of its own. One difference stops the campaign,
            and what caused it is switched off when it is resumed. 0 audits nothing.
        shard: "3/100" runs the third of a hundred parts of the trials, for array jobs; `merge` puts the journals
            together.
        together: trials a forward: so many copies of the tensors that can be hit lie behind each other, and
            `torch.func.vmap` runs the model on all of them, whole, from no cache. For small networks on an
            accelerator, which wait for launches; it takes `together` times the memory of these tensors (twice that
            where a format quantises) and of what a forward computes. Batched kernels may round otherwise than single
            ones, so fault-free is what the stack answers, and 8 is another campaign than 1. Which trials share a
            forward changes no record. Only with `fp.Parameters` and in one process; models that cannot be run so are
            refused (docs/campaigns.md).

    Returns:
        Records and tables.

    Warns:
        FlipproofWarning: if more than 1 % of the model's stored bits cannot be hit and `where` did not say so.

    Raises:
        FlipproofError: one of its kinds, see `flipproof.errors`; nothing is half-written and the model is untouched.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net, x = torch.nn.Linear(4, 3), torch.randn(50, 4)
        >>> data = [(x, net(x).argmax(dim=1))]
        >>> result = fp.assess(net, data=data, faults=fp.BitErrorRate([1e-2, 1e-1]), trials=40)
        >>> result.golden
        {'accuracy': 1.0}
        >>> result.summary[["ber", "accuracy", "critical_total", "trials"]].round(3).shape
        (2, 4)
    """
    with _opened(
        model,
        data,
        faults=faults,
        format=format,
        where=where,
        plan=Plan(trials, margin, confidence, None if shard is None else str(Shard.read(shard))),
        metrics=metrics,
        seed=seed,
        journal=journal,
        workers=workers,
        device=device,
        output=output,
        task=task_of(task, decision),
        cache_bytes=cache_bytes,
        audit=audit,
        together=together,
    ) as campaign:
        if campaign.left:
            take_shortcuts(campaign.runner, cache_bytes, campaign.off)
        _fill(campaign, workers, client, progress)
        if audit and (last := campaign.last) is not None:
            with noting(campaign.file):
                campaign.runner.ask_without_faults(*last)
        return campaign.so_far()


@contextmanager
def on_demand(
    model: nn.Module,
    data: Data,
    *,
    faults: FaultModel,
    format: FormatChoice = None,
    where: Parameters | Neurons | Where | None = None,
    trials: int = 100,
    metrics: Metrics | None = None,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    output: Output = None,
    task: Task | None = None,
    decision: DecisionChoice = None,
    device: str | torch.device | None = None,
) -> Iterator[Callable[[int, int], list[Trial]]]:
    """A campaign of which only those trials run that are asked for, here: for searches that jump from rate to rate.

    The trials are those that `assess` runs with the same arguments, and there is one golden run for all of them. Inside
    the `with`, the model is the campaign's; behind it, it is as it came.

    Args:
        model: as for `assess`, and so are `data`, `format`, `where`, `metrics`, `seed`, `output`, `decision`, `device`.
        data: labelled batches.
        faults: all points that may be asked for.
        format: how values are stored.
        where: what is hit.
        trials: at a point, at most.
        metrics: of a trial.
        seed: of all draws.
        journal: where the trials that ran are kept; asked for again, they are read from there.
        output: picks what is judged.
        task: what the model is for.
        decision: how outputs become classes.
        device: to run on.

    Yields:
        (point, trials) → the first so many trials of a point.
    """
    with (
        _opened(
            model,
            data,
            faults=faults,
            format=format,
            where=where,
            plan=Plan(trials, None, 0.95),
            metrics=metrics,
            seed=seed,
            journal=journal,
            workers=1,
            device=device,
            output=output,
            task=task_of(task, decision),
            cache_bytes=0,
            audit=0.0,
        ) as campaign,
        _hands(campaign, 1, None, False) as hands,
    ):
        known = {trial.key: trial for trial in campaign.records}

        def ask(point: int, count: int) -> list[Trial]:
            keys = [(point, trial) for trial in range(min(count, campaign.ceilings[point]))]
            for trial in hands.run(campaign.missing(keys)):
                campaign.add(trial)
                known[trial.key] = trial
            return [known[key] for key in keys]

        yield ask


@dataclass
class _Campaign:
    """A campaign after its golden run.

    Attributes:
        runner: of its trials.
        header: what it is.
        records: of trials that ran.
        ceilings: trials that are planned at each point.
        file: the journal.
        off: shortcuts that an audit found wrong.
        done: of each point, one byte a trial: 1 if it ran.
    """

    runner: TrialRunner
    header: Header
    records: Records
    ceilings: list[int]
    file: CampaignJournal | None
    off: frozenset[str]
    done: list[bytearray] = field(init=False)

    def __post_init__(self) -> None:
        self.done = [bytearray(ceiling) for ceiling in self.ceilings]
        points, trials = self.records.column("point"), self.records.column("trial")
        for point, done in enumerate(self.done):
            ran = trials[points == point]
            np.frombuffer(done, np.uint8)[ran[ran < len(done)]] = 1

    @property
    def left(self) -> bool:
        """Whether trials are missing."""
        return next(self.missing(self.keys()), None) is not None

    @property
    def shard(self) -> Shard:
        """Which of the trials are to be run here."""
        return Shard(1, 1) if self.header.plan.shard is None else Shard.read(self.header.plan.shard)

    @property
    def planned(self) -> int:
        """How many trials are to be run here."""
        return sum(map(len, self._mine()))

    def keys(self) -> Iterator[tuple[int, int]]:
        """The trials that are to be run here."""
        return ((point, trial) for point, trials in enumerate(self._mine()) for trial in trials)

    def _mine(self) -> list[range]:
        """Numbers of the trials that are to be run here, of each point."""
        pairs = zip(self.header.points, self.ceilings, strict=True)
        return [self.shard.trials(point.faults, ceiling) for point, ceiling in pairs]

    @property
    def ran(self) -> int:
        """How many of those ran."""
        return self.planned - sum(1 for _ in self.missing(self.keys()))

    def add(self, trial: Trial) -> None:
        """One that ran."""
        self.records.append(trial)
        self.done[trial.point][trial.trial] = 1

    def missing(self, keys: Iterable[tuple[int, int]]) -> Iterator[Key]:
        """Those of these trials that did not run yet."""
        return ((point, trial) for point, trial in keys if not self.done[point][trial])

    @property
    def last(self) -> tuple[int, int] | None:
        """The last trial of the last point that ran; None if none did."""
        ran = [(point, done.rindex(1)) for point, done in enumerate(self.done) if any(done)]
        return ran[-1] if ran else None

    def first(self, point: int, count: int) -> Records:
        """The first so many trials of a point, which all ran."""
        points, trials = self.records.column("point"), self.records.column("trial")
        rows = np.flatnonzero((points == point) & (trials < count))
        return self.records.select(rows[np.argsort(trials[rows])])

    def so_far(self) -> Assessment:
        """What the trials that there are come to."""
        return Assessment(self.header, answer(self.records, self.header))


@contextmanager
def _opened(
    model: nn.Module,
    data: Data,
    *,
    faults: FaultModel,
    format: FormatChoice,
    where: Parameters | Neurons | Where | None,
    plan: Plan,
    metrics: Metrics | None,
    seed: int,
    journal: str | os.PathLike[str] | None,
    workers: int,
    device: str | torch.device | None,
    output: Output,
    task: Task | None,
    cache_bytes: int | None,
    audit: float,
    together: int = 1,
) -> Iterator[_Campaign]:
    """Check the arguments, store the model, make the golden run, open the journal; give the model back at the end."""
    if plan.shard is not None and plan.margin is not None:
        raise ConfigError(
            "margin= looks at all trials of a point to see when it is enough: it cannot be had with shard="
        )
    with ready(
        model,
        data,
        faults=faults,
        format=format,
        where=where,
        plan=plan,
        metrics=metrics,
        seed=seed,
        journal=journal,
        workers=workers,
        device=device,
        output=output,
        task=task,
        cache_bytes=cache_bytes,
        audit=audit,
        together=together,
        depth=6,
    ) as runner:
        header = header_of(runner, faults, where or Parameters(), plan, together)
        ceilings = [1 if runner.repeats(point) else plan.trials for point in runner.points]
        file = campaign_journal(journal) if journal is not None else None
        with written(file, header) as done:
            off = file.switched_off if file is not None else frozenset()
            records = done if isinstance(done, Records) else Records(header)
            switch_off(runner, off)
            if together > 1 and off & {TOGETHER, "versions"}:
                raise AuditError(
                    f"an audit of {journal} found that trials which share a forward change each other, or leave "
                    f"something behind that nothing sees; leave together={together} out, in another journal",
                    TOGETHER,
                    0,
                    0,
                )
            yield _Campaign(runner, header, records, ceilings, file, off)


@contextmanager
def ready(
    model: nn.Module,
    data: Data,
    *,
    faults: FaultModel,
    format: FormatChoice,
    where: Parameters | Neurons | Where | None,
    plan: Plan,
    metrics: Metrics | None,
    seed: int,
    journal: str | os.PathLike[str] | None,
    workers: int,
    device: str | torch.device | None,
    output: Output,
    task: Task | None,
    cache_bytes: int | None,
    audit: float,
    depth: int,
    together: int = 1,
    verb: str = "assess",
    images: int | None = None,
    parts: Callable[[Space, tuple[FaultModel, ...]], tuple[FaultModel, ...]] | None = None,
) -> Iterator[TrialRunner]:
    """Check the arguments, store the model and make the golden run; give the model back at the end.

    Args:
        model: as for `assess`, and so are all up to `audit`.
        data: labelled batches.
        faults: what goes wrong.
        format: how values are stored.
        where: what is hit.
        plan: how much is done.
        metrics: of a trial.
        seed: of all draws.
        journal: a path, to be checked.
        workers: a number, to be checked.
        device: to run on.
        output: picks what is judged.
        task: what the model is for.
        cache_bytes: a number, to be checked.
        audit: share of the trials that run again.
        depth: how far up the stack the line is that a warning is to name.
        together: trials a forward, at most.
        verb: who asks.
        images: samples of a batch, at most; None for batches as they come.
        parts: what is drawn instead of the points of `faults`, made of the stored space.

    Yields:
        What runs trials, without shortcuts yet.
    """
    chosen = resolve(metrics)
    check_task(task)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{verb} takes a torch.nn.Module first, got {model!r}{program_hint(model)}")
    check_numbers(
        trials=plan.trials,
        workers=workers,
        seed=seed,
        margin=plan.margin,
        confidence=plan.confidence,
        cache_bytes=cache_bytes,
        journal=journal,
        audit=audit,
        together=together,
        verb=verb,
    )
    if together > 1 and isinstance(where, (Neurons, Where)):
        raise ConfigError(
            f"together={together} stacks stored parameters, and where={where!r} hits something else"
            f"{': the upsets of a batch share forwards as it is' if isinstance(where, Neurons) else ''}; leave it out"
        )
    if not isinstance(faults, FaultModel):
        raise FaultModelError(f"faults= takes a fault model such as fp.BitErrorRate([1e-6, 1e-5]), got {faults!r}")
    target = check_device(model, device)
    with (
        given_back(model),
        on_device(model, target),
        as_it_came(model) as came,
        eval_mode(model),
        one_thread(target),
    ):
        points = faults.points()
        space: Space
        if isinstance(where, (Neurons, Where)):
            batches, known, reading = read(model, data, target, task, output)
            batches = _divided(batches, images)
            randomness = RandomState(seed, target)
            randomness.pin()
            space = (
                neuron_space(model, batches, where, format, reading)
                if isinstance(where, Neurons)
                else own_space(model, batches, where, format)
            )
            for point in points:
                point.fits(space)
                point.check(space)
        else:
            space = FaultSpace(model, where=where, format=format)
            for point in points:
                point.check(space)
            batches, known, reading = read(model, data, target, task, output)
            batches = _divided(batches, images)
            randomness = RandomState(seed, target)
        if (missing := space.shortfall()) is not None:
            warnings.warn(missing, FlipproofWarning, stacklevel=depth)
        ceilings = [1 if space.samples is None and point.repeats(space) else plan.trials for point in points]
        auditing = audit_of(model, audit, ceilings, seed, reading)
        pristine = auditing.pristine if auditing is not None else None
        if pristine is not None:
            came.share(pristine)
        with space.stored(), ExitStack() as held:
            state = Snapshot(model, like=pristine)
            golden = golden_run(model, batches, reading, state, randomness)
            faulty = FaultyModel(model, space, batches, reading, golden, state, randomness)
            stack = None
            if together > 1:
                auditing = _copied(on_copies(faulty, auditing), model, reading, together)
                stack, faulty.golden = held.enter_context(stacked(faulty, together))
            judge = known.judge(model, batches, reading, faulty.golden)
            state.verify()
            judge.check_targets(batches.targets)
            asked = judged_by(chosen, judge)
            runner = TrialRunner(faulty, parts(space, points) if parts else points, asked, judge, seed, target)
            if stack is None:
                runner.audit = on_copies(faulty, auditing)
                yield runner
                return
            runner.audit = auditing
            prove(stack, faulty, runner.first_draws())
            yield StackedRunner.of(runner, stack)


def _copied(audit: Audit | None, model: nn.Module, output: Output, together: int) -> Audit | None:
    """The audit of trials that share forwards, which run on copies of the model, as the audited ones do.

    Raises:
        ModelError: if a copy would not do.
    """
    reason = uncopyable(model, output) if audit is None else audit.reason
    if reason is not None:
        raise refusal(together, f"it runs copies of the model, and {reason}")
    return audit


def _divided(batches: Batches, images: int | None) -> Batches:
    return batches if images is None else batches.divided(images)


def switch_off(runner: TrialRunner, off: frozenset[str]) -> None:
    """Do without what an audit found wrong."""
    if "versions" in off:
        runner.faulty.state.watch_bits()
    if "repaired words" in off:
        runner.faulty.repaired = None


@contextmanager
def noting(journal: Journal[Any, Any] | None) -> Iterator[None]:
    """A failed audit is written down before it ends the campaign."""
    try:
        yield
    except AuditError as error:
        if journal is not None:
            journal.note_failed_audit(error)
        raise


@contextmanager
def _hands(campaign: _Campaign, workers: int, client: Client | None, progress: bool | None) -> Iterator[Crew[Trial]]:
    """What runs trials and writes them to the journal."""
    points = campaign.header.points

    def label(key: Key) -> str:
        return " ".join(f"{name} {value:g}" for name, value in points[int(key[0])].coordinates.items())

    with (
        noting(campaign.file),
        crew(
            campaign.runner,
            workers=workers,
            client=client,
            journal=campaign.file,
            total=campaign.planned,
            done=campaign.ran,
            progress=progress,
            label=label,
        ) as hands,
    ):
        yield hands


def _fill(campaign: _Campaign, workers: int, client: Client | None, progress: bool | None) -> None:
    """Run whatever the records still lack."""
    header, ceilings = campaign.header, campaign.ceilings
    with _hands(campaign, workers, client, progress) as hands:
        if header.plan.margin is None:
            for trial in hands.run(campaign.missing(campaign.keys())):
                campaign.add(trial)
            return
        for p, ceiling in enumerate(ceilings):
            for wave in range(0, ceiling, CHECK_EVERY):
                upto = min(wave + CHECK_EVERY, ceiling)
                for trial in hands.run(campaign.missing((p, t) for t in range(wave, upto))):
                    campaign.add(trial)
                if upto < ceiling and narrow(campaign.first(p, upto), header):
                    hands.skip((p, upto), ceiling - upto)
                    break


def take_shortcuts(runner: TrialRunner, cache_bytes: int | None, off: frozenset[str]) -> None:
    """Use what can be proved for this model and these faults, and was not switched off by an audit."""
    faulty = runner.faulty
    if isinstance(runner, StackedRunner):  # whose forwards are whole
        return
    if faulty.space.samples is not None:
        faulty.alone = "shared batch" in off or faulty.mixes_rows(runner.seed)
        if faulty.alone and max(faulty.batches.sizes) > 1:
            warnings.warn(
                "what a sample answers depends on the other samples of its batch, so each upset gets a forward of its "
                f"own: {faulty.batches.samples} forwards a trial. Smaller batches are as true and cheaper",
                FlipproofWarning,
                stacklevel=3,
            )
    if "suffix" not in off:
        faulty.suffixes = _suffixes_of(runner, cache_bytes)


def _suffixes_of(runner: TrialRunner, cache_bytes: int | None) -> Suffixes | None:
    """Cached cuts, if they are proved and this campaign's faults leave enough of a prefix to be worth it."""
    faulty, budget = runner.faulty, runner.cache_bytes if cache_bytes is None else cache_bytes
    if budget <= 0 or faulty.state.written or faulty.randomness.drawn:  # with state, a forward is more than its graph
        return None
    if callable(faulty.output) and refers_to_tensors(faulty.output):
        return None
    suffixes = Suffixes.trace(faulty.model, faulty.batches.inputs)
    if suffixes is None or not runner.prepare(suffixes, budget):
        return None
    return suffixes if runner.faithful(suffixes) else None
