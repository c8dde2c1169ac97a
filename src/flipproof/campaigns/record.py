"""The record that one trial leaves: one line of the journal."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from math import isinf, isnan, nan
from typing import Any

from flipproof._fields import Fields, wrong

NAMED_FAULTS = 16
"""A record names up to this many faults; larger draws are told apart by their digest and can be drawn again."""

WORD_OUTCOMES = ("corrected", "detected", "miscorrected")
"""How a stored word that faults hit is read: as before, as the value for what cannot be repaired, or as another."""


@dataclass(frozen=True)
class Trial:
    """What one trial drew and what came of it: one line of the journal.

    Attributes:
        point: index of the fault point in the sweep.
        trial: index of the trial at this point.
        coordinates: what names the point, e.g. ``{"ber": 1e-05}``.
        faults: bits drawn; `flips`: bits that changed (the same, except for stuck cells).
        digest: tells this draw from any other.
        where: the faults as (name, value, bit), if there are at most 16 of them.
        metrics: one number a metric over all samples.
        outcomes: samples by outcome; they sum to `samples`.
        seconds: wall time, the only field that differs between two runs of a campaign.
        versions: what computed it.
        error: why every sample is a DUE, if the faulty model raised or gave outputs of another shape. In a campaign
            over neurons, where each sample has a fault of its own, why the first such sample is one.
        answers: how each sample ended and whether it is correct, see `decode_answers`; None if nobody noted it.
        layer: the layer that a neuron campaign's upsets of this trial share; None for stored bits.
        audited: whether it ran again, whole, on a fresh copy of the model, with the same answers.
        words: stored words that were hit, by how they were read (`WORD_OUTCOMES`); None where no words are hit.
    """

    point: int
    trial: int
    coordinates: dict[str, float | int]
    faults: int
    flips: int
    digest: str
    metrics: dict[str, float]
    outcomes: dict[str, int]
    samples: int
    seconds: float
    versions: dict[str, str]
    where: list[tuple[str, int, int]] = field(default_factory=list)
    error: str | None = None
    answers: str | None = None
    layer: str | None = None
    audited: bool = False
    words: dict[str, int] | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Which job of the campaign it was."""
        return self.point, self.trial

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, which has no word for such numbers: NaN is null, infinities are "inf" and "-inf"."""
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        record["metrics"] = {
            name: None if isnan(value) else str(value) if isinf(value) else value
            for name, value in self.metrics.items()
        }
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Trial:
        """The inverse of `to_json`, also for a record of an older version that lacks what came later.

        Raises:
            ConfigError: naming the field, what was expected and what came.
        """
        about = Fields(record, "the record")
        coordinates, outcomes, versions = (about.inside(name) for name in ("coordinates", "outcomes", "versions"))
        given: dict[str, Any] = {}
        for name in ("error", "answers", "layer"):
            if about.has(name) and about.take(name) is not None:
                given[name] = about.text(name)
        if about.has("audited"):
            given["audited"] = about.flag("audited")
        if about.has("words") and about.take("words") is not None:
            words = about.inside("words")
            given["words"] = {name: words.whole(name) for name in WORD_OUTCOMES}
            words.end()
        found = cls(
            point=about.whole("point"),
            trial=about.whole("trial"),
            coordinates={name: coordinates.as_is(name) for name in about.mapping("coordinates")},
            faults=about.whole("faults"),
            flips=about.whole("flips"),
            digest=_digest(about),
            metrics={name: _metric(about, name, value) for name, value in about.mapping("metrics").items()},
            outcomes={name: outcomes.whole(name) for name in about.mapping("outcomes")},
            samples=about.whole("samples", 1),
            seconds=_seconds(about),
            versions={name: versions.text(name) for name in about.mapping("versions")},
            where=_where(about),
            **given,
        )
        about.end()
        return found

    def row(self) -> dict[str, Any]:
        """As a flat row of `Assessment.trials`."""
        return {
            "point": self.point,
            **self.coordinates,
            "trial": self.trial,
            "faults": self.faults,
            "flips": self.flips,
            **self.metrics,
            **self.outcomes,
            **(self.words or dict.fromkeys(WORD_OUTCOMES)),
            "samples": self.samples,
            "seconds": self.seconds,
            "digest": self.digest,
            "error": self.error,
            "audited": self.audited,
        }


def _digest(about: Fields) -> str:
    text = about.text("digest")
    if not re.fullmatch("[0-9a-f]{16}", text):
        raise wrong(about.at("digest"), "16 hex digits", text)
    return text


def _seconds(about: Fields) -> float:
    found = about.number("seconds")
    if not 0 <= found < 1e30:
        raise wrong(about.at("seconds"), "a number from 0", found)
    return found


def _where(about: Fields) -> list[tuple[str, int, int]]:
    """The named faults, at most `NAMED_FAULTS`."""
    places = about.take("where")
    if not isinstance(places, list) or len(places) > NAMED_FAULTS:
        raise wrong(about.at("where"), f"a list of at most {NAMED_FAULTS} places", places)
    found = []
    for place in places:
        if not isinstance(place, list) or len(place) != 3:
            raise wrong(about.at("where"), "[name, value, bit]", place)
        parts = Fields(dict(zip(("name", "value", "bit"), place, strict=True)), about.at("where"))
        name, value, bit = parts.text("name"), parts.whole("value"), parts.whole("bit")
        if bit > 63:
            raise wrong(about.at("where"), "a bit up to 63", bit)
        found.append((name, value, bit))
    return found


def _metric(about: Fields, name: str, value: Any) -> float:
    """A number, as `to_json` wrote it."""
    if value is None:
        return nan
    if value in ("inf", "-inf"):
        return float(value)
    return Fields({name: value}, about.at("metrics")).number(name)
