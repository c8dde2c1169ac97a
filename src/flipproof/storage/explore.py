"""FORTUNE's exploration: in how few bits a network can be stored and still survive (Nazari et al. 2024)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from flipproof._interrupts import gives_back
from flipproof.campaigns.assess import assess
from flipproof.campaigns.assessment import Assessment
from flipproof.campaigns.fingerprint import digest_of
from flipproof.campaigns.plan import Fingerprint
from flipproof.engine.cluster import Client
from flipproof.engine.journal import Journal
from flipproof.errors import ConfigError, FormatError, JournalError
from flipproof.faults import BitErrorRate
from flipproof.formats import Affine, Format, TripleMSB
from flipproof.hardening.harden import harden
from flipproof.hardening.methods.base import Hardening
from flipproof.hardening.overhead import time_ratio
from flipproof.running.data import Data, Output, read_batches
from flipproof.running.decision import DecisionChoice
from flipproof.running.device import device_of
from flipproof.running.evaluation import one_thread
from flipproof.running.tasks.base import Task, unlabelled
from flipproof.running.tasks.classification import task_of
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Parameters
from flipproof.storage.indicators import p_drop, rap
from flipproof.storage.pack import pack_

RATES = (1e-5, 3e-5, 1e-4, 3e-4)
"""Bit error rates of the paper's sweep."""

BASELINE = Affine(bits=8)
"""What memory and time are relative to, as in the paper: unprotected 8 bits."""

WEIGHTS = Parameters(kinds=("weight",))
"""FORTUNE's view of memory: the weights and nothing else. Biases, norms and the bounds of hardenings are not in it."""


@dataclass(frozen=True)
class Exploration:
    """What was tried, and what it came to.

    Attributes:
        candidates: one row a stored form: `hardening`, `format`, `width`, `weights`, `memory` (stored bits), `coverage`
            (of all that the model stores, see `FaultSpace`), `memory_ratio` and `time_ratio` to unprotected 8 bits
            (time of a forward that decodes packed words, see `pack_`), `accuracy` without faults, `drop` (the largest
            mean drop over the rates, a fraction) with `drop_low` and `drop_high`, `rap`, `feasible`, `front`. A form
            below the accuracy threshold is not injected, as in Algorithm 1: its `drop` is empty.
        rates: one row a stored form and rate: `accuracy_drop` with its interval, `p_drop` (Eq. 6 as printed) and
            `p_drop_published` (with the drop at the highest rate, as the paper's table has it).
        chosen: the narrowest feasible format, None if none is.
        assessments: the campaigns by name, for `compare` and `report`.
        metric: the task's main metric, by which all this is judged: what is called accuracy here, and its column.
    """

    candidates: pd.DataFrame
    rates: pd.DataFrame
    chosen: Format | None
    assessments: dict[str, Assessment]
    metric: str = "accuracy"

    def __str__(self) -> str:
        table = self.candidates[["hardening", "format"]].copy()
        table["format"] = table["format"].map(short_name)
        table[f"{self.metric.replace('_', ' ')} %"] = (100 * self.candidates[self.metric]).round(2)
        table["drop %"] = (100 * self.candidates["drop"]).round(2)
        table["memory"], table["time"] = (
            self.candidates["memory_ratio"].round(3),
            self.candidates["time_ratio"].round(2),
        )
        table["feasible"], table["front"] = self.candidates["feasible"], self.candidates["front"]
        verdict = (
            f"narrowest feasible: {self.chosen!r}" if self.chosen is not None else "no width meets both thresholds"
        )
        return f"{table.to_string(index=False)}\n{verdict}"


@gives_back
def explore(
    model: nn.Module,
    data: Data,
    *,
    accuracy: float,
    drop: float,
    bits: tuple[int, int] = (3, 8),
    faults: BitErrorRate | None = None,
    protect: Callable[[Format], Format] = TripleMSB,
    axis: Literal[0] | None = None,
    search: Literal["bisection", "exhaustive"] = "bisection",
    formats: Sequence[Format] = (),
    hardenings: Mapping[str, Hardening] | None = None,
    calibration: Data | None = None,
    where: Parameters = WEIGHTS,
    trials: int = 100,
    margin: float | None = None,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    workers: int = 1,
    client: Client | None = None,
    output: Output = None,
    task: Task | None = None,
    decision: DecisionChoice = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Exploration:
    """Which stored form of a network is small, accurate and survives (Nazari et al. 2024, Algorithm 1 and beyond).

    The bisection tries widths between `bits` and ends with the narrowest whose protected form has an accuracy without
    faults of at least `accuracy` and loses at most `drop` at every rate. (As printed, Algorithm 1 moves by the same
    step in both directions and tests the drop before it has injected; this is its intent.) A width below the accuracy
    threshold is not injected. `search="exhaustive"` tries all widths. Every width that is tried is reported, with the
    unprotected 8-bit form beside it, to which memory and time are relative. Golden accuracy is measured.

    The wide mode adds any `formats`, and all of them again on each of the `hardenings`; the front marks the forms that
    no other one beats in accuracy, drop and memory at once.

    Args:
        model: any module that `assess` takes; stays untouched.
        data: batches `(inputs, targets)` to judge on.
        accuracy: the least accuracy without faults, a fraction.
        drop: the largest mean drop at any rate, a fraction.
        bits: the narrowest and the widest width to try, 2 to 8.
        faults: the rates; the paper's 1e-5 to 3e-4 by default.
        protect: makes the stored form of ``Affine(bits)``: `TripleMSB` is FORTUNE, ``lambda inner: inner`` protects
            nothing.
        axis: see `Affine`.
        search: "bisection" or "exhaustive".
        formats: more stored forms to try, e.g. ``[fp.SECDED(fp.Affine(bits=8))]``.
        hardenings: by name, each combined with every stored form.
        calibration: data for the hardenings, not the data that is judged on.
        where: what counts as memory and is hit. By default the weights alone, as in the paper; ``fp.Parameters()``
            takes everything, what a format does not store in its own type, and charges hardenings for their bounds.
        trials: see `assess`.
        margin: see `assess`.
        seed: of all draws.
        journal: folder of the journals: run again after an interruption and it resumes.
        workers: see `assess`.
        client: see `assess`.
        output: see `assess`.
        task: see `assess`.
        decision: see `assess`.
        device: see `assess`.
        progress: see `assess`.

    Raises:
        ConfigError: on thresholds outside [0, 1], widths outside 2 to 8, or hardenings without calibration data.

    Example:
        >>> import flipproof as fp, torch
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> x = torch.randn(100, 8)
        >>> data = [(x, net(x).argmax(dim=1))]
        >>> rates = fp.BitErrorRate([1e-3, 1e-2])
        >>> found = fp.explore(net, data, accuracy=0.8, drop=0.2, faults=rates, trials=20)
        >>> found.chosen, found.candidates["width"].tolist()
        (TripleMSB(inner=Affine(bits=3, axis=None), copies=2, protect=1), [8, 7, 5])
    """
    low, high = bits
    if not (0 <= accuracy <= 1 and 0 <= drop <= 1):
        raise ConfigError(f"explore takes accuracy and drop as fractions from 0 to 1, got {accuracy} and {drop}")
    if not 2 <= low <= high <= 8:
        raise ConfigError(f"explore takes bits=(narrowest, widest) from 2 to 8, got {bits}")
    if search not in ("bisection", "exhaustive"):
        raise ConfigError(f"search is 'bisection' or 'exhaustive', got {search!r}")
    if hardenings and calibration is None:
        raise ConfigError("explore hardens on calibration= data, which must not be the data that is judged on")
    batches, asked = list(data), task_of(task, decision)
    campaign = partial(
        assess,
        data=batches,
        where=where,
        trials=trials,
        seed=seed,
        output=output,
        task=asked,
        device=device,
    )
    exploring = _Exploring(
        plain=model,
        first=batches[:1],
        where=where,
        fault_free=partial(campaign, faults=BitErrorRate(0.0), progress=False),
        injected=partial(
            campaign,
            faults=faults or BitErrorRate(RATES),
            margin=margin,
            workers=workers,
            client=client,
            progress=progress,
        ),
        accuracy=accuracy,
        drop=drop,
        folder=None if journal is None else Path(journal),
    )

    def stored(width: int) -> Format:
        return protect(Affine(bits=width, axis=axis))

    if not any(site.format == BASELINE for site in FaultSpace(model, format=BASELINE, where=where).sites):
        raise ConfigError(
            f"explore stores weights in other formats, and no weight of this {type(model).__name__} can be stored as "
            f"{BASELINE!r}: they are quantised already, or where= leaves them out. Pass the floating-point model"
        )
    feasible: dict[int, bool] = {}
    with exploring.resumed():
        exploring.judge(model, BASELINE, full=True)
        while (width := _next_width(low, high, feasible, search)) is not None:
            feasible[width] = exploring.judge(model, stored(width)).feasible
        for extra in formats:
            exploring.judge(model, extra, full=True)
        tried = [BASELINE, *(stored(width) for width in feasible), *formats]
        for name, method in (hardenings or {}).items():
            assert calibration is not None
            safe = harden(model, method, data=calibration, output=output, task=asked, progress=progress, gate=False)
            for format in tried:
                exploring.judge(safe, format, hardening=name, full=True)
    narrowest = min((width for width, good in feasible.items() if good), default=None)
    judged = list(exploring.judged.values())
    metric = next(one.found.metrics[0] for one in judged if one.found is not None)  # the baseline always is injected
    return Exploration(
        candidates=_candidates(judged).rename(columns={"accuracy": metric}),
        rates=pd.concat([_rates(one.form, one.found) for one in judged if one.found is not None], ignore_index=True),
        chosen=None if narrowest is None else stored(narrowest),
        assessments={one.form.name: one.found for one in judged if one.found is not None},
        metric=metric,
    )


@dataclass(frozen=True)
class Question:
    """What an exploration asks: the first line of its journal. A journal of another question is not resumed.

    Attributes:
        network: fingerprint of a fault-free campaign: weights, data, code and outputs.
        asked: the settings that change an answer, as JSON.
    """

    network: Fingerprint
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[Mapping[str, Any], ...]:
        """All of it must be the same to resume."""
        return asdict(self.network), self.asked

    @property
    def plan(self) -> None:
        """There is none: which forms are judged, or what fits the budget, may change when it is resumed."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, header: dict[str, Any]) -> Question:
        """The inverse of `to_json`."""
        network = header["network"] | {"metrics": tuple(header["network"]["metrics"])}
        return cls(Fingerprint(**network), dict(header["asked"]))


@dataclass(frozen=True)
class _Form:
    """One stored form of a network, and what it is without faults: one line of the journal.

    `network` is a digest of what is stored, so that a hardened copy that came out otherwise is measured again.
    """

    network: str
    name: str
    hardening: str
    format: str
    width: int
    weights: int
    memory: int
    coverage: float
    accuracy: float
    time_ratio: float

    @property
    def key(self) -> tuple[str]:
        return (self.name,)

    def to_json(self) -> dict[str, Any]:
        untimed = self.time_ratio != self.time_ratio  # JSON has no NaN
        return asdict(self) | {"time_ratio": None if untimed else self.time_ratio}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> _Form:
        untimed = record["time_ratio"] is None
        return cls(**record | {"time_ratio": float("nan") if untimed else record["time_ratio"]})


@dataclass(frozen=True)
class _Judged:
    """A stored form and its campaign; None where it is not accurate enough to be injected."""

    form: _Form
    found: Assessment | None
    feasible: bool


@dataclass
class _Exploring:
    """Judges stored forms by campaigns that share data, rates and seed, and so, where spaces are equal, draws."""

    plain: nn.Module
    first: list[Any]
    where: Parameters
    fault_free: Callable[..., Assessment]
    injected: Callable[..., Assessment]
    accuracy: float
    drop: float
    folder: Path | None
    judged: dict[str, _Judged] = field(default_factory=dict)
    _known: dict[str, _Form] = field(default_factory=dict)
    _journal: Journal[Question, _Form] | None = None

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """While forms are judged: those that are in the journal are not measured again."""
        if self.folder is None:
            yield
            return
        question = Question(self.fault_free(self.plain, format=BASELINE).header.fingerprint)
        if self.folder.is_file():
            raise JournalError(f"{self.folder} is a file; explore takes journal= a folder, for a journal of each form")
        self._journal = Journal(self.folder / "forms.jsonl", Question, _Form, kind="width exploration")
        with self._journal.writing(question) as known:
            self._known = {form.name: form for form in known}
            yield

    def judge(self, model: nn.Module, format: Format, *, hardening: str = "none", full: bool = False) -> _Judged:
        """One stored form of a model, injected if it is accurate enough without faults; `full` injects in any case."""
        name = repr(format) if hardening == "none" else f"{hardening}/{format!r}"
        before = self.judged.get(name)
        if before is not None and (before.found is not None or not full):
            return before
        network = digest_of(model.state_dict())
        form = before.form if before is not None else self._known.get(name)
        if form is None or form.network != network:
            form = self._measured(model, format, network, name, hardening)
            if self._journal is not None:
                self._journal.append(form)
        enough = form.accuracy >= self.accuracy
        journal = None if self.folder is None else self.folder / file_name(name)
        found = self.injected(model, format=format, journal=journal) if enough or full else None
        feasible = enough and found is not None and float(found.summary[f"{found.metrics[0]}_drop"].max()) <= self.drop
        self.judged[name] = _Judged(form, found, feasible)
        return self.judged[name]

    def _measured(self, model: nn.Module, format: Format, network: str, name: str, hardening: str) -> _Form:
        space = FaultSpace(model, format=format, where=self.where)
        return _Form(
            network=network,
            name=name,
            hardening=hardening,
            format=repr(format),
            width=format.width,
            weights=sum(site.values for site in space.sites),
            memory=space.bits,
            coverage=space.coverage,
            accuracy=next(iter(self.fault_free(model, format=format).golden.values())),
            time_ratio=self._time_ratio(model, format),
        )

    def _time_ratio(self, model: nn.Module, format: Format) -> float:
        """A forward of the model in packed words, decoded at use ÷ the same with unprotected 8 bits, in turn.

        NaN where `pack_` cannot pack the model (tied parameters).
        """
        device = device_of(model)
        inputs = read_batches(self.first, device, unlabelled).inputs[0]
        try:
            ours = pack_(deepcopy(model), format, where=self.where)
            theirs = pack_(deepcopy(self.plain), BASELINE, where=self.where)
        except FormatError:
            return float("nan")
        with one_thread(device):
            return time_ratio(theirs, ours, inputs, 9)


def _candidates(judged: Sequence[_Judged]) -> pd.DataFrame:
    """One row a stored form; memory and time relative to the first, the baseline."""
    table = pd.DataFrame([asdict(one.form) for one in judged]).drop(columns="network")
    table[["drop", "drop_low", "drop_high"]] = [_worst(one.found) for one in judged]
    table["feasible"] = [one.feasible for one in judged]
    table["memory_ratio"] = table["memory"] / table["memory"].iloc[0]
    table["rap"] = [
        rap(accuracy_drop=100 * drop, memory=memory, time=seconds)
        if drop == drop and seconds == seconds
        else float("nan")
        for drop, memory, seconds in table[["drop", "memory_ratio", "time_ratio"]].to_numpy(float).tolist()
    ]
    table["front"] = _front(table.assign(loss=-table["accuracy"])[["loss", "drop", "memory"]].to_numpy(float))
    return table


def _worst(found: Assessment | None) -> list[float]:
    """The largest mean drop over the rates with its interval, NaN where nothing was injected."""
    if found is None:
        return [float("nan")] * 3
    worst = int(found.summary[f"{found.metrics[0]}_drop"].to_numpy().argmax())
    return [float(found.summary[f"{found.metrics[0]}_drop{end}"].iloc[worst]) for end in ("", "_low", "_high")]


def _front(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """True where no other row is as small in all columns and smaller in one; never with a NaN.

    >>> _front(np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0], [0.0, np.nan]]))
    array([ True,  True, False, False])
    """
    as_small = (points[:, None] <= points).all(axis=2)
    smaller = (points[:, None] < points).any(axis=2)
    return np.asarray(~(as_small & smaller).any(axis=0) & ~np.isnan(points).any(axis=1))


def _rates(form: _Form, found: Assessment) -> pd.DataFrame:
    """One row a rate: the drop with its interval, P_drop and outcome rates."""
    drop = f"{found.metrics[0]}_drop"
    columns = ["ber", drop, f"{drop}_low", f"{drop}_high", "critical_total", "due", "trials"]
    table = found.summary[[column for column in columns if column in found.summary]].copy()
    drops = (100 * table[drop]).tolist()
    for column, used in (("p_drop", drops), ("p_drop_published", [drops[-1]] * len(drops))):
        table[column] = [
            p_drop(parameters=form.memory, width=1, ber=float(ber), accuracy_drop=float(value))
            for ber, value in zip(table["ber"], used, strict=True)
        ]
    table.insert(0, "name", form.name)
    table.insert(1, "hardening", form.hardening)
    table.insert(2, "format", form.format)
    return table


def file_name(name: str) -> str:
    """A file for each name: its letters and digits for people, a digest of all of it for those that look alike.

    >>> file_name("Guard/Affine(bits=8)")
    'guard-affine-bits-8-84504bf6.jsonl'
    """
    readable = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:80]
    return f"{readable}-{blake2b(name.encode(), digest_size=4).hexdigest()}.jsonl"


def short_name(format: str) -> str:
    """The repr of a format without its defaults.

    >>> short_name("TripleMSB(inner=Affine(bits=3, axis=None), copies=2, protect=1)")
    'TripleMSB(Affine(bits=3))'
    """
    for default in ("inner=", ", axis=None", ", block=None", ", copies=2", ", protect=1)"):
        format = format.replace(default, ")" if default.endswith(")") else "")
    return format


def paper_name(format: str) -> str | None:
    """What the paper calls a format, given its repr: "8" for plain widths, "P-3" for protected ones; else None.

    >>> paper_name("TripleMSB(inner=Affine(bits=3, axis=None), copies=2, protect=1)"), paper_name("Float16()")
    ('P-3', None)
    """
    found = re.fullmatch(r"(TripleMSB\()?Affine\(bits=(\d)\)\)?", short_name(format))
    return f"{'P-' if found[1] else ''}{found[2]}" if found else None


def _next_width(low: int, high: int, feasible: Mapping[int, bool], search: str) -> int | None:
    """The width to try after those that were, None at the end.

    >>> _next_width(3, 8, {}, "bisection"), _next_width(3, 8, {5: False}, "bisection"), _next_width(3, 3, {3: True}, "")
    (5, 7, None)
    """
    if search == "exhaustive":
        return next((width for width in range(low, high + 1) if width not in feasible), None)
    low = max((width + 1 for width, good in feasible.items() if not good), default=low)
    high = min((width - 1 for width, good in feasible.items() if good), default=high)
    return (low + high) // 2 if low <= high else None
