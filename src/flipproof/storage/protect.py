"""`protect`: one verb that chooses how a model is stored so that it survives, and shows why."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import ceil, floor, inf, prod
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from flipproof._files import replacing
from flipproof._hooks import check_hooks_run
from flipproof._interrupts import gives_back
from flipproof.campaigns.assessment import Assessment
from flipproof.campaigns.estimates import gain
from flipproof.campaigns.fingerprint import digest_of
from flipproof.engine.cluster import Client
from flipproof.engine.jobs import do_all
from flipproof.engine.journal import Journal
from flipproof.errors import ConfigError, DataError, FlipproofError, JournalError
from flipproof.formats import (
    BCH,
    CEP,
    MSET,
    SECDED,
    Affine,
    BitClipped,
    FixedPoint,
    Float32,
    Format,
    InPlaceECC,
    LSBParity,
    RangeChecked,
    Rounded,
    SignVote,
    Symmetric,
    TripleMSB,
)
from flipproof.hardening.files import save_hardened
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.hardening.harden import deployed, harden
from flipproof.hardening.methods.base import Hardening
from flipproof.hardening.methods.guard import Guard
from flipproof.hardening.overhead import time_ratio
from flipproof.running.data import Data, Output
from flipproof.running.decision import DecisionChoice
from flipproof.running.deployment import Deployment
from flipproof.running.device import check_device, device_of
from flipproof.running.evaluation import one_thread
from flipproof.running.tasks.base import Task
from flipproof.running.tasks.classification import task_of
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Parameters, check_where
from flipproof.spaces.tensors import Candidate, inventory
from flipproof.storage.budget import (
    INNERS,
    Drift,
    Measuring,
    Plan,
    Planner,
    constant_bits,
    copy_in_eval_mode,
    held_by,
    kept_by,
    keys_of,
)
from flipproof.storage.coded import save_coded
from flipproof.storage.codes import LINE, ideal_rate, untouched
from flipproof.storage.explore import Question, file_name
from flipproof.storage.files import save_packed
from flipproof.storage.pack import pack_, unpack_
from flipproof.storage.survival import AT, FRONT, LADDER, Form, Tried, Trying, bisected, inject, least_on

PROTECTED = "protected"
"""The form that was chosen, in tables."""

KEPT = 0.99
"""Share of the fault-free accuracy that has to be kept, where no accuracy is asked for."""

BUDGETS = (-0.75, -0.5, -0.25, 0.0)
"""Extra memory of the forms on the front, as shares, beside the one that was asked for."""

_STEP = 0.005
"""Extra memory of forms on the front that meet a rival: at most as much as the rival has, and so much less."""

_FEW = 2
"""Trials of a rival before it is seen that it is out."""

AS_IT_CAME = "as it came"
"""The form of the model as it came, in tables."""

MEMORY_CODE = "SECDED (72, 64) around the words"
"""The rival of numbers that a library reads by itself, in tables."""

_OURS = "protect, memory "
"""How the names of our forms on the front begin."""

_SURE = 1e-3
"""Where a code word is beyond repair less often than this, bounds cannot help."""

_DRIFT = 0.05
"""Nats: a plan that is expected to drift farther is not tried for the front."""


def published() -> dict[str, Format]:
    """Stored forms that others have published, or that are common, by what they are called.

    >>> sorted(published())[:2]
    ['8 bits', '8 bits a channel']
    """
    return {
        "WBC, bit 30": BitClipped(Float32(), zeros=(30,)),
        "MSET": MSET(Float32()),
        "CEP D3P1": CEP(Float32()),
        "LSB parity": LSBParity(Float32()),
        "SECDED (72, 64)": SECDED(Float32(), block=64),
        "SECDED in the word": SECDED(Rounded(Float32(), bits=26)),
        "Q15.16": FixedPoint(),
        "Q15.16, sign vote": SignVote(FixedPoint()),
        "Q15.16, range check": RangeChecked(FixedPoint(), per="channel"),
        "8 bits": Affine(bits=8),
        "8 bits a channel": Affine(bits=8, axis=0),
        "8 bits, in-place ECC": InPlaceECC(Symmetric(bits=8, axis=0, largest=63)),
        "8 bits, SECDED (72, 64)": SECDED(Affine(bits=8, axis=0), block=64),
        "FORTUNE P-3": TripleMSB(Affine(bits=3, axis=0)),
        "FORTUNE P-4": TripleMSB(Affine(bits=4, axis=0)),
        "FORTUNE P-5": TripleMSB(Affine(bits=5, axis=0)),
    }


@dataclass(frozen=True)
class Protection:
    """A protected model, and its evidence.

    Attributes:
        model: a copy whose parameters are packed words, decoded and repaired at every use; see `unpack_`, `scrub_`, and
            `at_load`.
        formats: {qualified name: format} of what is packed, or coded where it is stored.
        hardening: the bounds that were added, "none" if there are none.
        ber: the bit error rate it is made for.
        least: the mean accuracy that was asked for at that rate, a fraction.
        golden: accuracy of the model as it came, without faults, on the data that it was verified on.
        verdict: "met", "not met" or "cannot be told": whether the interval of the mean accuracy at `ber` over trials
            lies above `least`, below it, or holds it. What is `certain` narrows it.
        certain: a mean accuracy over faults that needs no trial: (the probability that no code word has more faults
            than its code corrects) × (accuracy without faults, of these samples).
        why: the same in sentences.
        table: one row a tensor, see `Plan`.
        evidence: one row a stored form, injected at `ber` on the data that nothing was chosen on: `form`, `memory`
            (extra, a share), `time` (a forward that decodes ÷ one of the model as it came; NaN where not measured),
            `clean` (accuracy without faults), `accuracy` with intervals, `accuracy_gain` over the unprotected model,
            paired, words by outcome, and between which means it is without any trial (`certain`, `certain_high`).
        front: one row a stored form: `form`, `memory`, `ber` (the rate of a ladder that it survives while it does not
            survive the next one: the highest, where accuracy falls with the rate; 0 if there is none), `accuracy`
            there, `limit` (what its memory could survive at best, if its data bits were coded ideally).
        assessments: the campaigns of `evidence` by name, for `compare` and `report`.
        metric: the task's main metric, by which all this is judged: what is called accuracy here, and its column.
        deployment: whether the protected model answers alike one sample at a time and exported (`check_deployment`);
            None if that was not asked for (``gate=False``).
        at_load: names of all tensors, if the model is quantised already, in numbers that a library's own kernels read.
            `model` holds them as they came then; `save` writes their coded words, which `load_coded` repairs.
    """

    model: nn.Module
    formats: dict[str, Format]
    hardening: str
    ber: float
    least: float
    golden: float
    verdict: str
    certain: float
    why: str
    table: pd.DataFrame
    evidence: pd.DataFrame
    front: pd.DataFrame
    assessments: dict[str, Assessment]
    hardened: nn.Module | None = field(default=None, repr=False)
    metric: str = "accuracy"
    deployment: Deployment | None = None
    at_load: tuple[str, ...] = ()

    @property
    def kept(self) -> float:
        """The share of the accuracy without faults that was asked for."""
        return self.least / self.golden

    def __str__(self) -> str:
        low, high, name = f"{self.metric}_low", f"{self.metric}_high", self.metric.replace("_", " ")
        shown = self.evidence[["form", "memory", "time", "clean", self.metric, low, high]].copy()
        shown[low] = shown[low].clip(lower=self.evidence["certain"])
        shown[high] = shown[high].clip(upper=self.evidence["certain_high"])
        for column in ("memory", "clean", self.metric, low, high):
            shown[column] = (100 * shown[column]).round(2)
        shown["time"] = shown["time"].round(3)
        shown.columns = ["form", "memory %", "time", "clean %", f"{name} %", "low", "high"]
        text = (
            f"{self.why}\n\nAt a bit error rate of {self.ber:g}, with 95 % intervals over trials, narrowed by what is "
            f"certain:\n{shown.to_string(index=False)}"
        )
        if len(self.front):
            front = self.front[["form", "memory", "ber", "limit"]].copy()
            front["memory"] = (100 * front["memory"]).round(1)
            front["ber"] = ["none" if rate == 0 else f"{rate:g}" for rate in front["ber"]]
            front["limit"] = ["" if rate != rate else f"{rate:.3g}" for rate in front["limit"]]
            front.columns = ["form", "memory %", "survives", "ideal"]
            text += (
                f"\n\nHighest bit error rate at which {100 * self.kept:.2f} % of the {name} without "
                f"faults are kept (none: not even without faults, or at no rate that was tried):\n"
                f"{front.to_string(index=False)}"
            )
        return text if self.deployment is None else f"{text}\n\n{self.deployment}"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the words, the tables and the verdict to a folder.

        ``words.safetensors`` is for `load_packed`; where bounds were added, around the model that `load_hardened` makes
        of ``hardened.safetensors``. Of a model that is quantised already it is ``coded.safetensors``, for `load_coded`.

        Raises:
            ConfigError: if a file cannot be written.
        """
        where = Path(folder)
        if self.hardened is not None:
            save_hardened(self.hardened, where / "hardened.safetensors")
        if self.at_load:
            save_coded(self.model, where / "coded.safetensors", self.formats)
        else:
            save_packed(self.model, where / "words.safetensors")
        for name, table in (("table", self.table), ("evidence", self.evidence), ("front", self.front)):
            with replacing(where / f"{name}.csv") as target:
                table.to_csv(target, index=False)
        with replacing(where / "verdict.txt") as target:
            target.write_text(f"{self}\n", encoding="utf-8")
        return where


@gives_back
def protect(
    model: nn.Module,
    data: Data,
    *,
    ber: float,
    accuracy: float | None = None,
    memory: float = 0.0,
    time: float | None = None,
    verify: Data | None = None,
    rivals: Mapping[str, Format] | None = None,
    hardenings: Mapping[str, Hardening] | None = None,
    inners: Sequence[Format] = INNERS,
    line: int = LINE,
    where: Parameters | None = None,
    images: int = 250,
    trials: int = 10,
    front: int = 500,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    workers: int = 1,
    client: Client | None = None,
    output: Output = None,
    task: Task | None = None,
    decision: DecisionChoice = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    gate: bool = True,
) -> Protection:
    """Choose how a model is stored so that it survives a bit error rate within budgets, and prove it.

    One half of the data, drawn at random, is to choose on and the other one to verify on (or `verify` is). On the
    first, each weight in turn is stored in each of `inners`, and has some of its blocks lost: that says what rounding
    and lost words cost. A multiple-choice knapsack then takes the width and the code of each tensor, so that the
    expected cost at `ber` is least and all fits into the memory (`Planner`). What memory is left over buys a higher
    rate. On the second half the chosen form, the model as it came and every rival are injected at `ber`: that is the
    evidence, paired where spaces are equal. Bounds are added only if the stored form alone does not meet what was asked
    for and they help.

    Args:
        model: what `assess` takes; stays untouched. Of a model that is quantised already, words, scales and zero points
            keep their bits and get a code: they are coded where they are stored, and repaired when they are loaded.
        data: labelled batches that the network has not been trained on.
        ber: the bit error rate to survive.
        accuracy: the least mean accuracy at that rate, a fraction; by default 99 % of the accuracy without faults.
        memory: extra memory, as a share of what the parameters take in their own types: 0.0 for none, −0.5 for half.
            Parameters that cannot be packed count on both sides.
        time: the longest forward that decodes at use ÷ a forward of the model as it came; None for any. It is measured:
            with it, the choice may differ from run to run.
        verify: labelled batches to verify on, none of which are in `data`; by default half of `data`, at random.
        rivals: stored forms to compare with, by name; by default those of `published`. What a form does not store
            (biases and norms, with formats that quantise) is stored as in the chosen form, which favours the rival.
        hardenings: bounds to try, by name, if the stored form alone does not do on the data of the choice and they fit
            into the memory; by default `Guard`. Pass {} for none.
        inners: what values of weights may be stored in.
        line: stored bits of the longest code word of a weight, 64 at least; the last one of a tensor may be up to twice
            as long, and those of biases and norms, which are few, up to 2,048.
        where: which parameters; all by default. Buffers are never packed.
        images: samples that choices are made on, at most.
        trials: injections a form at `ber`, and at a rate of the front, three at least; fewer where the first ones show
            that a form is out.
        front: samples on which the highest rate that each form survives is looked for, at most; 0 looks for none.
            Survived is a rate at which as large a share of their accuracy is kept as is asked for at `ber`.
        seed: of all draws.
        journal: folder of the journals: run again after an interruption and it resumes.
        workers: processes.
        client: see `assess`.
        output: see `assess`.
        task: see `assess`.
        decision: see `assess`.
        device: see `assess`.
        progress: see `assess`.
        gate: end with `check_deployment` of the protected model on a few samples to verify on, beside the model as it
            came. What is exported there is the model that `unpack_` makes: its decoders may be long. See `harden`.

    Raises:
        ConfigError: on rates or shares that are none, or if nothing fits the memory: it says how much is needed.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> x = torch.randn(400, 16)
        >>> safe = fp.protect(net, [(x, net(x).argmax(dim=1))], ber=1e-2, trials=5, front=0)
        >>> safe.verdict, float(safe.evidence["memory"].iloc[1]) <= 0
        ('met', True)
    """
    _check(ber=ber, accuracy=accuracy, memory=memory, time=time)
    _check_counts(
        images=(images, 1), trials=(trials, 1), line=(line, 64), front=(front, 0), seed=(seed, 0), workers=(workers, 1)
    )
    images, trials, line, front, seed, workers = map(int, (images, trials, line, front, seed, workers))
    ber, memory = float(ber), float(memory)
    rivals = published() if rivals is None else rivals
    _check_forms(rivals, inners, {} if hardenings is None else hardenings)
    if journal is not None and (not isinstance(journal, (str, os.PathLike)) or not os.fspath(journal)):
        raise ConfigError(f"protect takes the path of a folder as journal=, got {journal!r}")
    _check_module(model)
    place = check_device(model, device)
    if place.type == "meta":
        raise ConfigError("protect runs the model, and nothing runs on device='meta'")
    work = copy_in_eval_mode(model).to(place)
    chosen_task = task_of(task, decision)
    choosing = Calibration.read(work, data, place, output, chosen_task)
    if verify is None:
        choosing, verifying = choosing.split(0.5, seed)
    else:
        verifying = Calibration.read(work, verify, place, output, chosen_task)
    golden = verifying.accuracy
    if golden == 0 or choosing.accuracy == 0:
        raise DataError(
            f"protect: the model gets none of the {verifying.samples} samples right that it is verified on, or none of "
            f"the {choosing.samples} to choose on, so there is nothing to keep; are labels and model of the same task?"
        )
    some = _drawn(choosing, images, seed)
    weights, rest, words, whole = _tensors(work, where)
    folder = None if journal is None else Path(journal)
    if folder is not None and folder.is_file():
        raise JournalError(f"{folder} is a file; protect takes journal= a folder, for a journal of each form")
    question = Question(
        _fingerprint(work, some, device),
        {"tensors": [[c.name, list(c.tensor.shape)] for c in weights], "inners": [*map(repr, inners)], "seed": seed},
    )
    file = None if folder is None else Journal(folder / "drift.jsonl", Question, Drift, kind="protection")
    found = do_all(
        Measuring(work, [c.name for c in weights], inners, some, seed),
        keys_of(len(weights), len(inners)),
        question,
        file,
        workers=workers,
        client=client,
        progress=progress,
    )
    least = KEPT * golden if accuracy is None else accuracy
    choices = {
        "where": where,
        "metrics": (verifying.judge.main,),
        "seed": seed,
        "output": verifying.output,
        "task": verifying.task,
        "device": device,
    }
    making = _Making(
        model=work,
        planner=Planner(weights, rest, found, inners, line, sum(c.bits for c in whole), words),
        choosing=some,
        some=_drawn(verifying, max(front, 1), seed),
        verifying=verifying,
        choices=choices,
        least=least,
        trials=trials,
        folder=folder,
        ber=ber,
    )
    plan = making.within(memory, time)
    making.forms = {AS_IT_CAME: Form(None, 0.0), PROTECTED: making.form(plan)}
    stored = {name: making.rival(format, plan) for name, format in rivals.items()} if weights else {}
    if words:
        stored[MEMORY_CODE] = making.memory_code(plan)
    making.forms |= {name: form for name, form in stored.items() if form is not None}
    jobs = [(AT, name) for name in making.forms]
    if front:
        others = [form.memory for form in making.forms.values() if not form.ours and form.memory < -_STEP]
        smaller = {floor(extra / _STEP) * _STEP for extra in others}
        making.forms |= making.highest({memory, *BUDGETS, *smaller})
        jobs += [(FRONT, name) for name in making.forms if name != PROTECTED]
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder)) as where_to:
        trying = making.trying(Path(where_to))
        reached = do_all(
            trying, jobs, question, None, workers=workers, client=client, progress=progress, then=trying.keep
        )
        for kind, name in jobs:
            if kind == AT:
                making.found[name] = Assessment.load(trying.path(AT, name, ber))
    if all(site.name in plan.formats for site in FaultSpace(work, where=where, format=plan.formats).sites):
        sure = prod(untouched(plan.formats[c.name], tuple(c.tensor.shape), ber) for c in making.planner.all)
        clean = making.found[PROTECTED].golden[making.metric]
        making.certain[PROTECTED] = (sure * clean, sure * clean + 1 - sure)
    else:
        sure = 0.0
    bounds: str | None = None
    hardened: nn.Module | None = None
    refused: list[str] = []
    if sure < 1 - _SURE and hardenings != {}:
        bounds, hardened, refused = _bounded(making, plan, memory, hardenings, choosing)
    chosen = PROTECTED if bounds is None else f"{PROTECTED}, {bounds}"
    safe = making.packed(work if hardened is None else hardened, plan)
    evidence = making.evidence()
    took = making.time_of(safe)
    evidence.loc[evidence["form"] == chosen, "time"] = took
    verdict = making.verdict(chosen)
    notes = [f"Bounds that do not fit into the memory: {', '.join(refused)}."] if refused else []
    if time is not None and took > time:
        verdict = "not met"
        notes = [
            f"A forward that decodes takes {took:.3g} × one of the model as it came, more than the {time:g} asked for: "
            f"decode once, at load (fp.unpack_).",
            *notes,
        ]
    if unable := [name for name, form in stored.items() if form is None]:
        notes.append(f"Not compared, since they cannot hold some weight: {', '.join(unable)}.")
    if making.at_load:
        notes.append(
            "The model is quantised already, in numbers that a library's own kernels read: all of it keeps its bits, "
            "is coded where it is stored and repaired when it is loaded (fp.load_coded), not at every use. Faults "
            "that come later are not repaired until it is loaded again."
        )
    if wide := [c.name for c in whole if len(c.names) == 1 and not c.problem]:
        notes.append(f"Stored as they came, since words of 64 bits leave no room for a code: {', '.join(wide)}.")
    if tied := [c.name for c in whole if len(c.names) > 1]:
        notes.append(f"Stored as they came, since tied parameters cannot be packed: {', '.join(tied)}.")
    table = making.front([found for (kind, _), found in reached.items() if kind == FRONT])
    return Protection(
        model=safe,
        formats=plan.formats,
        at_load=making.at_load,
        hardening="none" if bounds is None else bounds,
        ber=ber,
        least=least,
        golden=golden,
        verdict=verdict,
        certain=making.certain.get(chosen, (0.0, 1.0))[0],
        why="\n".join([*_why(making, chosen, verdict, plan, evidence), *notes]),
        table=plan.table,
        evidence=evidence,
        front=table,
        assessments=making.found,
        hardened=hardened,
        metric=making.metric,
        deployment=deployed(safe, work, verifying, making.plain(safe)) if gate else None,
    )


@dataclass
class _Making:
    """Campaigns of stored forms that share data, seed and rate."""

    model: nn.Module
    planner: Planner
    choosing: Calibration
    some: Calibration
    verifying: Calibration
    choices: dict[str, Any]
    least: float
    trials: int
    folder: Path | None
    ber: float
    forms: dict[str, Form] = field(default_factory=dict)
    found: dict[str, Assessment] = field(default_factory=dict)
    certain: dict[str, tuple[float, float]] = field(default_factory=dict)
    cleaned: dict[str, float] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """By which forms are judged: the task's main one."""
        return self.verifying.judge.main

    def within(self, memory: float, time: float | None) -> Plan:
        """The plan for a budget: for the rate that was asked for, or a higher one if that costs no more.

        Raises:
            ConfigError: if nothing fits.
        """
        bits = (1 + memory) * self.planner.now
        lines = [self.planner.line, *(line for line in (64, 0) if line < self.planner.line)]
        fits: list[tuple[float, Plan]] = []
        for line in lines if time is not None else lines[:1]:
            planner = self.planner
            if line != planner.line:
                planner = replace(planner, line=line)
            plan = planner.plan(self.ber, bits)
            if plan is None:
                continue
            plan = self._spent(planner, plan, bits)
            if time is None:
                return plan
            took = self.time_of(self.packed(self.model, plan))
            if took <= time:
                return plan
            fits.append((took, plan))
        if fits:
            return min(fits, key=lambda found: found[0])[1]
        enough, any_code = self.planner.least(self.ber), self.planner.least(self.ber, enough=False)
        if any_code == inf:
            raise ConfigError(
                "protect: none of inners= can hold the values of every weight under a code; pass others, such as "
                "fp.Affine(bits=5, axis=0)"
            )
        need = f"{_extra(any_code if enough == inf else enough, self.planner.now)} are needed"
        if enough == inf:
            need += f", and then some code words are lost: none of {self.planner.line} bits corrects so many faults"
        raise ConfigError(
            f"protect: nothing that survives ber={self.ber:g} fits memory={memory:+g} ({100 * memory:+.0f} %): {need}. "
            f"Allow more memory, narrower inners= or a longer line="
        )

    def _spent(self, planner: Planner, plan: Plan, bits: float) -> Plan:
        """What is left of the budget buys a higher rate, as long as the expected drift stays about the same."""
        best = plan
        for rate in (rate for rate in LADDER if rate > self.ber):
            higher = planner.plan(rate, bits)
            if higher is None or higher.drift > 1.1 * plan.drift + 1e-3:
                break
            best = higher
        return best

    def rival(self, format: Format, plan: Plan) -> Form | None:
        """How a rival stores the model, and its extra memory with constants; None if it cannot hold some weight."""
        formats = dict(plan.formats)
        bits = 0
        rows = plan.table.set_index("name")["bits"]
        for candidate in self.planner.weights:
            if held_by(format, candidate.tensor) is None:
                return None
            formats[candidate.name] = format
            bits += format.stored_bits(tuple(candidate.tensor.shape)) + constant_bits(format, candidate.tensor)
        bits += sum(int(rows[candidate.name]) for candidate in (*self.planner.rest, *self.planner.words))
        return Form(formats, (bits + self.planner.apart) / self.planner.now - 1)

    def memory_code(self, plan: Plan) -> Form:
        """What a memory with error correction does for numbers that a library reads: eight check bits for 64."""
        formats, bits = dict(plan.formats), self.planner.apart
        rows = plan.table.set_index("name")["bits"]
        for candidate in self.planner.words:
            own, values = kept_by(candidate.tensor), candidate.tensor.numel()
            assert own is not None  # or it would not be planned for
            format = formats[candidate.name] = SECDED(own, block=min(64, own.width * values))
            bits += format.stored_bits(tuple(candidate.tensor.shape))
        bits += sum(int(rows[candidate.name]) for candidate in (*self.planner.weights, *self.planner.rest))
        return Form(formats, bits / self.planner.now - 1)

    @property
    def at_load(self) -> tuple[str, ...]:
        """What is coded where it is stored, and not packed: all of a model that a library has quantised."""
        words = self.planner.words
        return tuple(c.name for c in words) if any(c.held for c in words) else ()

    def packed(self, model: nn.Module, plan: Plan) -> nn.Module:
        """A copy that holds packed words; of a model that a library has quantised, as it came."""
        return deepcopy(model) if self.at_load else pack_(deepcopy(model), plan.formats)

    def plain(self, packed: nn.Module) -> nn.Module:
        """A copy of that with plain parameters."""
        return deepcopy(packed) if self.at_load else unpack_(deepcopy(packed))

    def verdict(self, name: str) -> str:
        """Whether the interval of the mean over trials lies above what was asked for."""
        low, high = self.interval(name)
        return "met" if low >= self.least else "not met" if high < self.least else "cannot be told"

    def interval(self, name: str) -> tuple[float, float]:
        """Of the mean accuracy: over trials, narrowed by what is certain without any."""
        row = self.found[name].summary.iloc[0]
        low, high = self.certain.get(name, (0.0, 1.0))
        return max(low, float(row[f"{self.metric}_low"])), min(high, float(row[f"{self.metric}_high"]))

    def evidence(self) -> pd.DataFrame:
        """One row a form at the rate."""
        base, rows = next(iter(self.found.values())).point(0), []
        for name, found in self.found.items():
            point = found.point(0)
            assert point is not None  # every form was injected
            gained = gain(point, base, self.metric)
            first = {
                "form": name,
                "memory": self.forms[name].memory,
                "time": float("nan"),
                "clean": found.golden[self.metric],
            }
            certain = self.certain.get(name, (0.0, 1.0))
            more = {"certain": certain[0], "certain_high": certain[1], "draws": gained.draws}
            rows.append(first | found.summary.iloc[0].to_dict() | gained.estimate.columns(f"{self.metric}_gain") | more)
        return pd.DataFrame(rows)

    def front(self, reached: Sequence[Tried]) -> pd.DataFrame:
        """One row a form: the highest rate that it survives, beside the limit of its memory."""
        values = sum(c.tensor.numel() for c in self.planner.all)
        rows = []
        for found in reached:
            form = self.forms[found.name]
            rows.append(
                {
                    "form": found.name,
                    "ours": form.ours,
                    "memory": form.memory,
                    "ber": found.ber,
                    self.metric: found.accuracy,
                    "next": found.next,
                    "limit": ideal_rate(form.data, (1 + form.memory) * self.planner.now / values),
                }
            )
        table = pd.DataFrame(rows)
        if table.empty:
            return table
        ours = table[table["ours"]].sort_values("memory")
        beaten = ours[ours["ber"] < ours["ber"].cummax()].index  # by one of ours that takes no more memory
        return table.drop(index=beaten).reset_index(drop=True)

    def highest(self, budgets: set[float]) -> dict[str, Form]:
        """For each memory, the plan for the highest rate that is expected to be survived."""
        found = {}
        for budget in sorted(budgets):
            best = self._highest((1 + budget) * self.planner.now)
            if best is not None:
                found[f"{_OURS}{100 * budget:+.3g} %"] = self.form(best)
        return found

    def form(self, plan: Plan) -> Form:
        """A plan as a form."""
        values = plan.table["values"]
        data = float((plan.table["data"] * values).sum() / values.sum())
        return Form(plan.formats, plan.bits / self.planner.now - 1, ours=True, data=data)

    def trying(self, folder: Path) -> Trying:
        """What injects the forms."""
        return Trying(
            model=self.model,
            forms=self.forms,
            verifying=self.verifying,
            some=self.some,
            choices=self.choices,
            least=self.least,
            ber=self.ber,
            trials=self.trials,
            few=_FEW,
            whole=(AS_IT_CAME, PROTECTED),
            folder=folder,
        )

    def _highest(self, bits: float) -> Plan | None:
        """The plan for the highest rate that is expected to be survived within so many bits."""
        rates = LADDER[LADDER.index(1e-5) :]
        plans: dict[int, Plan] = {}

        def drifts_little(index: int) -> bool:
            plan = self.planner.plan(rates[index], bits)
            if plan is not None and plan.drift <= _DRIFT:
                plans[index] = plan
            return index in plans

        for index in range(bisected(drifts_little, -1, len(rates)), -1, -1):
            if drifts_little(index) and self._keeps(plans[index]):
                return plans[index]
        return plans[min(plans)] if plans else None

    def _keeps(self, plan: Plan) -> bool:
        """Whether without faults, on the data of the choice, at most half of what may be lost is lost."""
        share = self.least / self.verifying.accuracy
        return self._clean(plan) >= max(share, (1 + share) / 2) * self.choosing.accuracy

    def _clean(self, plan: Plan) -> float:
        """Accuracy without faults on the data of the choice, with all values as the plan stores them.

        A code gives back what it was given, so this depends on the formats inside alone.
        """
        words = {candidate.name for candidate in self.planner.words}  # which keep their bits
        coded = {name: f for name, f in plan.formats.items() if name not in words}
        inside = {name: f.inner if isinstance(f, BCH) else f for name, f in coded.items()}
        key = repr(inside)
        if key not in self.cleaned:
            stored = deepcopy(self.model)
            with torch.no_grad(), one_thread(device_of(stored)):
                for name, format in inside.items():
                    parameter = stored.get_parameter(name)
                    values = held_by(format, parameter)
                    assert values is not None  # or the plan would not store it so
                    parameter.copy_(values)
                self.cleaned[key] = self.choosing.accuracy_of(stored)
        return self.cleaned[key]

    def time_of(self, packed: nn.Module) -> float:
        """A forward that decodes at use ÷ one of the model as it came, in turn, on the first batch."""
        with one_thread(device_of(self.model)):
            return time_ratio(self.model, packed, self.verifying.batches.inputs[0], 7)


def _bounded(
    making: _Making,
    plan: Plan,
    memory: float,
    hardenings: Mapping[str, Hardening] | None,
    choosing: Calibration,
) -> tuple[str | None, nn.Module | None, list[str]]:
    """The bounds that help the stored form most, and those that do not fit; all judged on the data of the choice."""
    named = {"Guard": Guard()} if hardenings is None else hardenings

    def judged(model: nn.Module, name: str, data: Calibration) -> Assessment:
        stored = digest_of([*map(str, plan.formats.items()), repr(named)])
        path = None if making.folder is None else making.folder / file_name(f"{name} {making.ber:g} {stored}")
        return inject(making.choices, model, plan.formats, data, making.ber, making.trials, path)

    mean = float(judged(making.model, "choose plain", making.choosing).summary[making.metric].iloc[0])
    if mean >= least_on(making.choosing, making.least, making.verifying):
        return None, None, []
    best: tuple[float, str, nn.Module, float] | None = None
    refused, own = [], {name for name, _ in making.model.named_parameters()}
    for name, method in named.items():
        try:
            safe = harden(
                making.model,
                method,
                data=choosing.batches.pairs,
                output=choosing.output,
                task=choosing.task,
                progress=False,
                gate=False,
            )
        except FlipproofError:
            if not making.planner.words:
                raise
            continue  # a quantised graph has no activations to bound
        extra = sum(p.numel() * p.element_size() * 8 for n, p in safe.named_parameters() if n not in own)
        takes = (plan.bits + extra) / making.planner.now - 1
        if takes > memory:
            refused.append(f"{name} ({100 * takes:+.2f} %)")
            continue
        bounded = float(judged(safe, f"choose {name}", making.choosing).summary[making.metric].iloc[0])
        if bounded > (mean if best is None else best[0]):
            best = (bounded, name, safe, takes)
    if best is None:
        return None, None, refused
    _, name, safe, takes = best
    chosen = f"{PROTECTED}, {name}"
    making.forms[chosen] = replace(making.form(plan), memory=takes)
    making.found[chosen] = judged(safe, f"at {chosen}", making.verifying)
    return name, safe, refused


def _why(making: _Making, chosen: str, verdict: str, plan: Plan, evidence: pd.DataFrame) -> list[str]:
    """What was chosen and what came of it, in sentences."""
    row = evidence[evidence["form"] == chosen].iloc[0]
    plain = evidence[evidence["form"] == AS_IT_CAME].iloc[0]
    weights = plan.table[plan.table["kind"] == "weight"]
    counts = weights.groupby("data")["values"].sum()
    widths = ", ".join(f"{100 * n / counts.sum():.0f} % in {bits}" for bits, n in counts.items())
    low, high = making.interval(chosen)
    word = making.metric.replace("_", " ")
    sentences = [
        f"{verdict.capitalize()}: at a bit error rate of "
        f"{making.ber:g} the mean {word} is {100 * row[making.metric]:.2f} % [{100 * low:.2f}, {100 * high:.2f}]; "
        f"asked for were {100 * making.least:.2f} %. "
        + (
            f"Whatever the trials show, {100 * making.certain[chosen][0]:.2f} % are certain: the chance that no code "
            f"word has more faults than its code corrects, × the {word} without faults."
            if making.certain.get(chosen, (0.0, 1.0))[0] > making.least
            else ""
        ),
        f"The model as it came has {100 * plain['clean']:.2f} % without faults and {_percent(plain, making.metric)} at "
        f"that rate; without faults the protected one has {100 * row['clean']:.2f} %.",
        f"Of the weights, {widths} bits, coded for {plan.ber:g}; memory {100 * row['memory']:+.1f} %, "
        f"with the constants of formats, which are taken to lie in protected memory, charged as if the same codes "
        f"protected them.",
    ]
    # rivals store biases, norms and quantised words as we do: what that adds is not theirs
    ours = (*making.planner.rest, *making.planner.words)
    coded = int(plan.table.loc[plan.table["name"].isin({candidate.name for candidate in ours}), "bits"].sum())
    added = (coded - sum(candidate.bits for candidate in ours)) / making.planner.now
    rivals = evidence[~evidence["form"].isin([AS_IT_CAME, PROTECTED, chosen])]
    fair = rivals[rivals["memory"] - max(added, 0.0) <= max(float(row["memory"]), 0.0) + 1e-9]
    if len(fair):
        best = fair.sort_values(making.metric).iloc[-1]
        sentences.append(
            f"The best of other forms ({len(fair)}) whose weights take no more memory than "
            f"{'the model had' if row['memory'] <= 1e-9 else 'these'} is {best['form']!r} with "
            f"{_percent(best, making.metric)}."
        )
    found = making.found[chosen]
    if found.coverage < 1:
        outside = sorted(name for name in found.left_out if not name.endswith("num_batches_tracked"))
        sentences.append(
            f"Faults hit {100 * found.coverage:.2f} % of what the model stores; outside are {', '.join(outside[:2])}"
            f"{f' and {len(outside) - 2} more' if len(outside) > 2 else ''}, which stay as they are: buffers, and what "
            f"where= leaves out. Faults there are not part of the verdict."
        )
    return sentences


def _extra(bits: float, now: int) -> str:
    """Extra memory in percent, rounded up: what is said to be enough is enough."""
    return f"{ceil(1000 * (bits / now - 1)) / 10:+.1f} %"


def _percent(row: Any, name: str) -> str:
    return f"{100 * row[name]:.2f} % [{100 * row[f'{name}_low']:.2f}, {100 * row[f'{name}_high']:.2f}]"


def _tensors(
    model: nn.Module, where: Parameters | None
) -> tuple[list[Candidate], list[Candidate], list[Candidate], list[Candidate]]:
    """Weights that have a choice, other parameters, what keeps its bits under a code, and what stays as it is."""
    asked = check_where(where)
    chosen = [c for c in inventory(model) if not c.is_buffer and not asked.leaves_out(c)]
    fit = [c for c in chosen if len(c.names) == 1 and not c.problem and c.tensor.numel()]
    quantised = any(c.held for c in fit)  # then nothing is packed, and all keep their bits
    words = [c for c in fit if (quantised or not c.tensor.is_floating_point()) and kept_by(c.tensor) is not None]
    free = [] if quantised else [c for c in fit if c.tensor.is_floating_point()]
    if not free and not words:
        raise ConfigError(f"protect: this {type(model).__name__} has no parameters that can be packed or coded")
    masks = [c for c in free if not c.quantisable and kept_by(c.tensor) and not bool(torch.isfinite(c.tensor).all())]
    words += masks  # −∞ for what attention shall not see
    free = [c for c in free if all(c is not mask for mask in masks)]
    for candidate in free:
        if not bool(torch.isfinite(candidate.tensor).all()):
            raise ConfigError(
                f"protect: {candidate.name} holds NaN or infinite values, which no code can keep apart from faults; "
                f"mend the weights, or leave it out: where=fp.Parameters(exclude=[{candidate.name!r}])"
            )
        if candidate.tensor.dtype == torch.float64:
            raise ConfigError(
                f"protect: {candidate.name} is float64, which is hardly what is deployed; pass model.float() or "
                f"model.half()"
            )
    weights = [c for c in free if c.quantisable]
    named = {c.name for c in (*free, *words)}
    return weights, [c for c in free if not c.quantisable], words, [c for c in chosen if c.name not in named]


def _drawn(part: Calibration, count: int, seed: int) -> Calibration:
    """So many samples at random, in their order; whole batches where samples cannot be taken apart."""
    if count >= part.samples or (part.cut is None and len(part.batches.sizes) == 1):
        return part
    try:
        return part.split(count / part.samples, seed)[1]
    except DataError:  # all but a part of a batch: all
        return part


def _fingerprint(model: nn.Module, data: Calibration, device: Any) -> Any:
    choices = {"output": data.output, "task": data.task, "metrics": data.judge.main, "device": device}
    return inject(choices, model, None, data, 0.0, 1, None).header.fingerprint


def _check(**given: Any) -> None:
    """Refuse rates and shares that are none."""
    numbers = {"ber": (0, 0.5), "accuracy": (0, 1), "memory": (-1, inf), "time": (0, inf)}
    for name, (low, high) in numbers.items():
        value = given[name]
        if value is None and name in ("accuracy", "time"):
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not low < float(value) < high:
            closed = name == "accuracy" and value in (0, 1) and not isinstance(value, bool)
            if not closed:
                raise ConfigError(f"protect takes {name}= a number between {low} and {high}, got {value!r}")


def _check_counts(**given: tuple[Any, int]) -> None:
    """Refuse counts that are no whole numbers, or too small."""
    for name, (value, least) in given.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < 2**63:
            raise ConfigError(f"protect takes {name}= a whole number from {least}, got {value!r}")


def _check_forms(rivals: Any, inners: Any, hardenings: Any) -> None:
    """Refuse what are no named formats, no formats, or no named bounds, and names that tables have already."""
    example = "such as fp.Affine(bits=5, axis=0)"
    if not isinstance(rivals, Mapping) or not all(isinstance(name, str) for name in rivals):
        raise ConfigError(f"protect takes {{name: format}} as rivals=, got {rivals!r}")
    if isinstance(inners, Format) or not isinstance(inners, Sequence) or not inners:
        raise ConfigError(f"protect takes one or more formats in a list as inners=, {example}, got {inners!r}")
    for what, given in (("rivals", rivals.values()), ("inners", inners)):
        if wrong := [format for format in given if not isinstance(format, Format)]:
            raise ConfigError(f"protect takes formats as {what}=, {example}, got {wrong[0]!r}")
    if not isinstance(hardenings, Mapping) or not all(
        isinstance(name, str) and isinstance(method, Hardening) for name, method in hardenings.items()
    ):
        raise ConfigError(f"protect takes {{name: bounds}} as hardenings=, such as fp.Guard(), got {hardenings!r}")
    for name in rivals:
        if name in (AS_IT_CAME, PROTECTED) or name.startswith((_OURS, f"{PROTECTED}, ")):
            raise ConfigError(f"a rival cannot be called {name!r}: that names another row of the tables")
    if "none" in hardenings:
        raise ConfigError("bounds cannot be called 'none': that says that there are none")


def _check_module(model: nn.Module) -> None:
    """Refuse models whose parameters cannot be packed, by name."""
    stored = inventory(model)
    if packed := [c.name for c in stored if c.packed is not None]:
        raise ConfigError(f"{packed[0]} is packed already; protect takes the model as it was before")
    check_hooks_run(model)
    for name, module in model.named_modules():
        place = f"{name} of the model" if name else "the model"
        if parametrize.is_parametrized(module):
            raise ConfigError(
                f"{place} computes a parameter from others (torch.nn.utils.parametrize, as weight_norm does); store "
                f"what it computes first: torch.nn.utils.parametrize.remove_parametrizations"
            )
        if any(isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False)):
            raise ConfigError(f"{place} has parameters that are not initialised yet; run the model once")
