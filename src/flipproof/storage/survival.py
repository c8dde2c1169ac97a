"""Stored forms of a model, injected: at one rate, and for the highest rate that each survives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import nan
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from torch import Tensor, nn

from flipproof._fields import Fields
from flipproof._files import replacing
from flipproof.campaigns.assess import assess, on_demand
from flipproof.campaigns.assessment import Assessment
from flipproof.campaigns.fingerprint import digest_of
from flipproof.campaigns.record import Trial
from flipproof.engine.journal import Key
from flipproof.faults import BitErrorRate
from flipproof.formats import Format
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.running.device import device_of, release_memory
from flipproof.running.evaluation import unlike
from flipproof.storage.explore import file_name

LADDER = (*(float(f"{step}e{power}") for power in range(-8, -1) for step in (1, 2, 3, 5)), 0.1, 0.2)
"""Bit error rates that are tried: 1e-8, 2e-8, 3e-8, 5e-8, … 5e-2, 0.1, 0.2. At 0.27 no code
saves 5 bits in 32 (`ideal_rate`)."""


CLEAR = 0.1
"""Accuracy: so far from what is asked for, a few trials say enough."""

LUCK = 0.02
"""Accuracy: by how much a trial may be better than a model without faults, at most."""


class Survival(NamedTuple):
    """What was found.

    Attributes:
        ber: the highest rate of the ladder at which the mean is at least what was asked for; 0.0 if there is none.
        accuracy: the mean there, of all trials.
        next: the mean one rate above it, of as many trials as showed that it is not enough; NaN at the end of the
            ladder.
    """

    ber: float
    accuracy: float
    next: float


def survival(
    mean: Callable[[int, int], float],
    least: float,
    *,
    trials: int,
    best: float = 1.0,
    ladder: tuple[float, ...] = LADDER,
) -> Survival:
    """Look on a ladder for the highest rate at which the mean accuracy of so many trials is at least `least`.

    Where it lies is guessed by bisection, with one trial a rate. From there the ladder is climbed or descended a step
    at a time, and each rate is judged by all trials, or by the first ones if the others could not make up for them:
    n trials of mean m are out of N if n · m + (N − n) · best < N · least.

    It takes for granted that accuracy falls with the rate. Where it does not, within the noise of the trials, the
    answer may be a step of the ladder off.

    Args:
        mean: (index of a rate, n) → mean accuracy of the first n trials there.
        least: mean accuracy that is still enough, a fraction.
        trials: N, at a rate.
        best: the accuracy of the best trial that there may be.
        ladder: rates, ascending.
    """
    means: dict[int, float] = {}

    def enough(index: int) -> bool:
        for count in range(1, trials + 1):
            means[index] = mean(index, count)
            if count < trials and count * means[index] + (trials - count) * best < trials * least:
                return False
        return means[index] >= least

    def one_is(index: int) -> bool:
        means[index] = mean(index, 1)
        return means[index] >= least

    low = bisected(one_is, -1, len(ladder))
    if low >= 0 and not enough(low):
        low -= 1
        while low >= 0 and not enough(low):
            low -= 1
    else:
        while low + 1 < len(ladder) and enough(low + 1):
            low += 1
    return Survival(0.0 if low < 0 else ladder[low], means.get(low, nan), means.get(low + 1, nan))


def bisected(enough: Callable[[int], bool], low: int, high: int) -> int:
    """The last index that is enough; `low` is, and `high` is not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def survived(ask: Callable[[int, int], list[Trial]], metric: str, least: float, golden: float, trials: int) -> Survival:
    """`survival` of a campaign on demand over the `LADDER`, whose model has `golden` of a metric without faults."""

    def mean(point: int, count: int) -> float:
        return fmean(trial.metrics[metric] for trial in ask(point, count))

    return survival(mean, least, trials=trials, best=min(1.0, golden + LUCK))


AT, FRONT = "at the rate", "front"
"""What is done with a form: injected at the rate that was asked for, or at rates up to the highest that it survives."""


@dataclass(frozen=True)
class Form:
    """One way to store a model.

    Attributes:
        formats: as `assess` takes them; None for the model as it came.
        memory: extra, a share of what the model takes as it came.
        ours: whether `protect` made it.
        data: mean data bits of a value; NaN where they are not known.
    """

    formats: dict[str, Format] | None
    memory: float
    ours: bool = False
    data: float = nan


@dataclass(frozen=True)
class Tried:
    """What came of one form: where its trials are, and what it survives.

    Attributes:
        kind: `AT` or `FRONT`.
        name: of the form.
        ber: the highest rate that it survives (`FRONT`), or the one that was asked for.
        accuracy: mean accuracy there.
        next: one rate above it; NaN if that is not known.
        journal: its trials, if they were written on another machine.
    """

    kind: str
    name: str
    ber: float
    accuracy: float
    next: float
    journal: bytes | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Which job it was."""
        return self.kind, self.name

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; NaN is null."""
        found = {name: value for name, value in asdict(self).items() if name != "journal"}
        return {name: None if value != value else value for name, value in found.items()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Tried:
        """The inverse of `to_json`."""
        about = Fields({name: nan if value is None else value for name, value in record.items()}, "the record")
        found = cls(
            about.text("kind"), about.text("name"), about.number("ber"), about.number("accuracy"), about.number("next")
        )
        about.end()
        return found


@dataclass
class Trying:
    """Injects forms, one a job: many short campaigns, so that workers take forms and not trials.

    On another machine it writes to a folder of its own, begun with the journals that there are here, and what comes
    back brings the journal along.

    Attributes:
        model: in eval mode.
        forms: by name.
        verifying: what nothing was chosen on.
        some: samples of it, for the front.
        choices: arguments of `assess` that all forms share.
        least: mean accuracy that is asked for.
        ber: at which.
        trials: of the forms in `whole`, and of others that come close.
        few: trials of a form before it is seen that it is out.
        whole: forms that get all trials, audited.
        folder: of the journals.
    """

    model: nn.Module
    forms: Mapping[str, Form]
    verifying: Calibration
    some: Calibration
    choices: Mapping[str, Any]
    least: float
    ber: float
    trials: int
    few: int
    whole: tuple[str, ...]
    folder: Path
    _begun: dict[str, bytes] | None = None
    _elsewhere: TemporaryDirectory[str] | None = None
    _expected: Tensor | None = None

    def __call__(self, kind: str, name: str) -> Tried:
        """Do one job."""
        found = self._tried(kind, name)
        return found if self._elsewhere is None else replace(found, journal=self._file_of(found).read_bytes())

    def _tried(self, kind: str, name: str) -> Tried:
        if kind == AT:
            found = self.at(name)
            return Tried(kind, name, self.ber, self._mean(found), nan)
        trials = max(3, self.trials)
        with (
            _known_warnings_off(),
            on_demand(
                self.model,
                self.some.batches.pairs,
                format=self.forms[name].formats,
                faults=BitErrorRate(LADDER, exact=False),
                trials=trials,
                journal=self.path(FRONT, name, 0.0),
                **self.choices,
            ) as ask,
        ):
            least = least_on(self.some, self.least, self.verifying)
            reached = survived(ask, self.some.judge.main, least, self.some.accuracy, trials)
        return Tried(kind, name, *reached)

    def at(self, name: str) -> Assessment:
        """A form at the rate that was asked for; a few trials are enough for one that is clearly out."""
        if name in self.whole:
            return self._inject(name, AT, self.verifying, self.ber, self.trials, audit=0.01)
        found = self._inject(name, AT, self.verifying, self.ber, min(self.few, self.trials))
        if self._mean(found) < self.least - CLEAR:
            return found
        return self._inject(name, AT, self.verifying, self.ber, self.trials)

    def _inject(
        self, name: str, kind: str, data: Calibration, ber: float, trials: int, audit: float = 0.0
    ) -> Assessment:
        path = self.path(kind, name, ber)
        return inject(self.choices, self.model, self.forms[name].formats, data, ber, trials, path, audit)

    def _mean(self, found: Assessment) -> float:
        return float(found.summary[self.verifying.judge.main].iloc[0])

    def path(self, kind: str, name: str, ber: float) -> Path:
        """The journal of a form: another one if it is stored otherwise."""
        formats = self.forms[name].formats or {}
        return self.folder / file_name(f"{kind} {name} {ber:g} {digest_of([*map(str, formats.items())])}")

    def _file_of(self, tried: Tried) -> Path:
        return self.path(tried.kind, tried.name, self.ber if tried.kind == AT else 0.0)

    def keep(self, tried: Tried) -> None:
        """Write the journal of a form that was tried on another machine."""
        if tried.journal is not None:
            with replacing(self._file_of(tried)) as path:
                path.write_bytes(tried.journal)

    def __getstate__(self) -> dict[str, Any]:
        """With the journals that there are, and what the model answers here."""
        begun = {file.name: file.read_bytes() for file in self.folder.glob("*") if file.is_file()}
        return {**self.__dict__, "_begun": begun, "_expected": self.verifying.answers_of(self.model)}

    @property
    def serial_only(self) -> str:
        """Why it cannot be given to worker processes."""
        device = device_of(self.model)
        return "" if device.type == "cpu" else f"one process already fills {device}"

    def describe(self, key: Key) -> str:
        """A job in words."""
        return f"{key[1]}, {key[0]}"

    def wake(self) -> None:
        """In a worker that was not forked: a folder of its own."""
        if self._begun is not None:
            self._elsewhere = TemporaryDirectory()
            self.folder = Path(self._elsewhere.name)
            for name, content in self._begun.items():
                (self.folder / name).write_bytes(content)
            self._begun = None

    def differs(self) -> str:
        """How this copy of the model answers otherwise without faults."""
        data = self.verifying
        assert self._expected is not None  # it came from elsewhere
        return unlike(self.model, data.batches, data.output, self._expected)

    def recover(self) -> None:
        """Give memory back to a device that ran out of it."""
        release_memory()


def least_on(part: Calibration, least: float, whole: Calibration) -> float:
    """What is asked for on other samples: as large a share of the accuracy without faults as `least` is of all."""
    return least * part.accuracy / whole.accuracy


def inject(
    choices: Mapping[str, Any],
    model: nn.Module,
    formats: dict[str, Format] | None,
    data: Calibration,
    ber: float,
    trials: int,
    journal: Path | None,
    audit: float = 0.0,
) -> Assessment:
    """One campaign at one rate, every bit flipped independently: the rate at which codes are reckoned."""
    with _known_warnings_off():
        return assess(
            model,
            data.batches.pairs,
            format=formats,
            faults=BitErrorRate(ber, exact=False),
            trials=trials,
            audit=audit,
            journal=journal,
            cache_bytes=0,  # at such rates the first layer is hit: a cut behind it would be proved and never used
            progress=False,
            **choices,
        )


@contextmanager
def _known_warnings_off() -> Iterator[None]:
    with warnings.catch_warnings():
        for known in (".*clips bits that are not constant.*", "only .* % of the model's stored bits.*"):
            warnings.filterwarnings("ignore", message=known)  # `protect` says the second once, for all forms
        yield
