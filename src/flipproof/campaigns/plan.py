"""What a campaign is: the first line of its journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import nan
from typing import Any, Self

from flipproof._fields import Fields, wrong
from flipproof.running.scales import Scale

PLACE = "the header"


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        trials: a point, or the ceiling where there is a margin.
        margin: half-width at which a point stops; None for all trials.
        confidence: of all intervals.
        shard: "3/100" if only the third of a hundred parts is; None for all.
    """

    trials: int
    margin: float | None
    confidence: float
    shard: str | None = None

    @classmethod
    def from_json(cls, plan: Any) -> Plan:
        """The inverse of `to_json`."""
        about = Fields(plan, f"{PLACE}, plan")
        margin = None if about.take("margin") is None else about.number("margin")
        if not 0 < (confidence := about.number("confidence")) < 1:
            raise wrong(about.at("confidence"), "a number between 0 and 1", confidence)
        shard = about.text("shard") if about.has("shard") else None
        return cls(about.whole("trials", 1), margin, confidence, shard)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; what there always was, and a shard if there is one."""
        return {name: value for name, value in asdict(self).items() if name != "shard" or value is not None}


@dataclass(frozen=True)
class FaultPoint:
    """One point of the sweep.

    Attributes:
        faults: the fault model as text.
        coordinates: what names it in tables.
        repeats: whether one trial says all.
        stream: names its random numbers; points of one name share them. Empty in older journals, where none do.
    """

    faults: str
    coordinates: Mapping[str, float | int]
    repeats: bool
    stream: str = ""


@dataclass(frozen=True)
class StoredSite:
    """What can be hit in one tensor or layer."""

    name: str
    kind: str
    values: int
    format: str
    bits: int


@dataclass(frozen=True)
class AuditPlan:
    """Which share of the trials runs again, on what, and why on nothing better."""

    share: float = 0.0
    on: str = "nothing"
    reason: str | None = "audit=0"


@dataclass(frozen=True)
class Reading:
    """How outputs are read as classes, see `Decision`; `assumed` if nobody said so and it cannot be told for sure."""

    outputs: str
    threshold: float | None
    assumed: bool


@dataclass(frozen=True)
class Job:
    """What the model is for: the task, what a sample is called, and when an answer is critical; in words."""

    task: str = "classification"
    sample: str = "sample"
    rule: str = ""

    @property
    def samples(self) -> str:
        """Several of them."""
        return f"{self.sample}s"


@dataclass(frozen=True)
class Fingerprint:
    """Everything that changes an answer, as text, numbers and digests: only the same may be resumed."""

    model: str
    structure: str
    weights: str
    data: str
    samples: int
    faults: str
    where: str
    format: str
    bits: int
    metrics: tuple[str, ...]
    metrics_code: str
    seed: int
    device: str
    output: str | int | None
    output_code: str
    attributes: str
    code: str
    golden_outputs: str
    decision: str


@dataclass(frozen=True)
class Header:
    """What is assessed, and what it does without faults.

    Attributes:
        created: when the journal was begun.
        fingerprint: what the campaign is a campaign of.
        golden: each metric of the fault-free run.
        golden_answers: which samples the fault-free model has right, see `decode_golden`; None in journals without.
        golden_intervals: interval over samples of each metric of it, where there is one.
        metrics: what the numbers mean; empty in journals without.
        decision: how outputs are read as classes; None where they are not.
        task: what the model is for.
        points: of the sweep.
        stored: what can be hit.
        left_out: what cannot, and why.
        left_out_bits: stored bits of that.
        coverage: bits that can be hit ÷ all stored bits; NaN in journals without.
        audit: how trials are audited.
        plan: how much is done.
        versions: of what computed the golden run.
        together: trials that shared a forward, at most: batched kernels may round otherwise than single ones.
    """

    created: str
    fingerprint: Fingerprint
    golden: Mapping[str, float]
    points: tuple[FaultPoint, ...]
    stored: tuple[StoredSite, ...]
    left_out: Mapping[str, str]
    plan: Plan
    versions: Mapping[str, str]
    golden_answers: str | None = None
    golden_intervals: Mapping[str, tuple[float, float] | None] = field(default_factory=dict)
    metrics: Mapping[str, Scale] = field(default_factory=dict)
    decision: Reading | None = None
    task: Job = Job()
    left_out_bits: int = 0
    coverage: float = nan
    audit: AuditPlan = AuditPlan()
    together: int = 1

    @property
    def identity(self) -> tuple[Mapping[str, Any], ...]:
        """What must be the same to resume: the fingerprint and how many trials share a forward, then the golden run."""
        formats = ", ".join(sorted({site.format for site in self.stored}))  # a digest alone says nothing to a reader
        fingerprint = asdict(self.fingerprint) | {"format": f"{formats} ({self.fingerprint.format})"}
        return fingerprint | {"together": self.together}, {"golden": dict(self.golden)}

    def extended(self, now: Header) -> Header:
        """This one with the sweep of another one, if that has all of its points and more: draws are per point."""
        mine, theirs = [point.faults for point in self.points], [point.faults for point in now.points]
        if len(theirs) <= len(mine) or not set(mine) <= set(theirs) or len(set(theirs)) < len(theirs):
            return self
        return replace(self, points=now.points, fingerprint=replace(self.fingerprint, faults=now.fingerprint.faults))

    def to_json(self) -> dict[str, Any]:
        """As the first line of a journal; what there always was, and `together` if it is more than one."""
        return {
            **{part.name: getattr(self, part.name) for part in fields(self) if part.name != "together"},
            **({} if self.together == 1 else {"together": self.together}),
            "fingerprint": asdict(self.fingerprint),
            "points": [asdict(point) for point in self.points],
            "stored": [asdict(site) for site in self.stored],
            "metrics": {name: scale.to_json() for name, scale in self.metrics.items()},
            "decision": None if self.decision is None else asdict(self.decision),
            "task": asdict(self.task),
            "audit": asdict(self.audit),
            "plan": self.plan.to_json(),
        }

    @classmethod
    def from_json(cls, header: dict[str, Any]) -> Header:
        """Read a journal's first line, also one of an older version that lacks what came later.

        Raises:
            ConfigError: naming the field, what was expected and what came.
        """
        about = Fields(header, PLACE)
        given: dict[str, Any] = {}
        if about.has("golden_answers") and about.take("golden_answers") is not None:
            given["golden_answers"] = about.text("golden_answers")
        if about.has("golden_intervals"):
            intervals = about.inside("golden_intervals")
            given["golden_intervals"] = {name: _interval(intervals, name) for name in about.mapping("golden_intervals")}
        if about.has("metrics"):
            place = about.at("metrics")
            scales = about.mapping("metrics").items()
            given["metrics"] = {name: Scale.from_json(scale, f"{place}, {name}") for name, scale in scales}
        if about.has("decision") and about.take("decision") is not None:
            given["decision"] = _reading(about.inside("decision"))
        if about.has("task"):
            task = about.inside("task")
            given["task"] = Job(task.text("task"), task.text("sample"), task.text("rule"))
        if about.has("audit"):
            given["audit"] = _audit(about.inside("audit"))
        if about.has("coverage"):
            given |= {"coverage": about.number("coverage"), "left_out_bits": about.whole("left_out_bits")}
        if about.has("together"):
            given["together"] = about.whole("together", 1)
        golden, left_out, versions = (about.inside(name) for name in ("golden", "left_out", "versions"))
        return cls(
            created=about.text("created"),
            fingerprint=_fingerprint(about.inside("fingerprint")),
            golden={name: golden.number(name) for name in about.mapping("golden")},
            points=about.each("points", _point),
            stored=about.each("stored", _site),
            left_out={name: left_out.text(name) for name in about.mapping("left_out")},
            plan=Plan.from_json(about.take("plan")),
            versions={name: versions.text(name) for name in about.mapping("versions")},
            **given,
        )


@dataclass(frozen=True)
class Identity:
    """What is asked and of what: the first line of a journal whose work follows from that alone.

    Attributes:
        fingerprint: everything that changes what is found, by name.
    """

    fingerprint: Mapping[str, Any]

    @property
    def identity(self) -> tuple[Mapping[str, Any], ...]:
        """What must be the same to resume."""
        return (self.fingerprint,)

    @property
    def plan(self) -> None:
        """How much is to be done follows from what is asked."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"fingerprint": dict(self.fingerprint)}

    @classmethod
    def from_json(cls, header: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        about = Fields(header, PLACE)
        found = cls(about.mapping("fingerprint"))
        about.end()
        return found


def _fingerprint(about: Fields) -> Fingerprint:
    output, seed = about.take("output"), about.take("seed")
    if type(seed) is not int or seed < 0:
        raise wrong(about.at("seed"), "a whole number from 0", seed)
    if output is not None and type(output) is not int:
        output = about.text("output")
    known: dict[str, Any] = {
        "samples": about.whole("samples", 1),
        "bits": about.whole("bits", 1),
        "seed": seed,
        "metrics": about.texts("metrics"),
        "output": output,
    }
    known |= {part.name: about.text(part.name) for part in fields(Fingerprint) if part.name not in known}
    return Fingerprint(**known)


def _interval(about: Fields, name: str) -> tuple[float, float] | None:
    ends = about.take(name)
    if ends is None:
        return None
    if not isinstance(ends, list) or len(ends) != 2:
        raise wrong(about.at(name), "two numbers", ends)
    pair = Fields({"low": ends[0], "high": ends[1]}, about.at(name))
    return pair.number("low"), pair.number("high")


def _reading(about: Fields) -> Reading:
    threshold = None if about.take("threshold") is None else about.number("threshold")
    return Reading(about.text("outputs"), threshold, about.flag("assumed"))


def _audit(about: Fields) -> AuditPlan:
    reason = None if about.take("reason") is None else about.text("reason")
    return AuditPlan(about.number("share"), about.text("on"), reason)


def _point(about: Fields) -> FaultPoint:
    values = about.inside("coordinates")
    coordinates = {name: values.as_is(name) for name in about.mapping("coordinates")}
    stream = about.text("stream") if about.has("stream") else ""
    return FaultPoint(about.text("faults"), coordinates, about.flag("repeats"), stream)


def _site(about: Fields) -> StoredSite:
    return StoredSite(
        about.text("name"), about.text("kind"), about.whole("values"), about.text("format"), about.whole("bits")
    )
