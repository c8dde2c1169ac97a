"""What every single bit of a model does: a table, layer by bit, of flips that were all tried, or of some of them.

Reading it takes no torch. Its journal has one line a job: a few words of a tensor with all of their bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from flipproof._fields import Fields, wrong
from flipproof.campaigns.statistics import mean_intervals
from flipproof.engine.arrays import array_from_json, array_to_json
from flipproof.engine.journal import Journal, differences
from flipproof.errors import ConfigError, JournalError, JournalMismatch
from flipproof.running.scales import OUTCOMES

KIND = "bit table"
"""What the journal says it is of."""

_COUNTS = ("word", "bit", "non_critical_sdc", "critical_sdc", "due", "equal")
"""Columns of what a job leaves; all other answers are masked."""


@dataclass(frozen=True)
class TableSite:
    """One tensor of the table.

    Attributes:
        name: qualified name.
        layer: qualified name of the module that holds it.
        kind: "weight", "bias", "norm", "buffer" or "other"; "scale" or "zero_point" of a quantised layer.
        format: how it is stored.
        words: how many words it has.
        flips: how many words have each bit, bit 0 first.
    """

    name: str
    layer: str
    kind: str
    format: str
    words: int
    flips: tuple[int, ...]

    @classmethod
    def read(cls, about: Fields) -> TableSite:
        """From the header of a journal."""
        words, flips = about.whole("words", 1), about.take("flips")
        if not isinstance(flips, list) or not all(type(n) is int and 0 <= n <= words for n in flips):
            raise wrong(about.at("flips"), "how many words have each bit", flips)
        texts = {name: about.text(name) for name in ("name", "layer", "kind", "format")}
        return cls(**texts, words=words, flips=tuple(flips))


@dataclass(frozen=True)
class TableHeader:
    """What the table is of: the first line of its journal.

    Attributes:
        fingerprint: everything that changes an answer, by name.
        sites: the tensors.
        samples: how many samples each flip is tried on.
        chunk: words of a job.
        left_out: what is stored and not in the table, and why.
        left_out_bits: stored bits of all that.
        versions: of what computed it.
    """

    fingerprint: Mapping[str, Any]
    sites: tuple[TableSite, ...]
    samples: int
    chunk: int
    left_out: Mapping[str, str]
    left_out_bits: int
    versions: Mapping[str, str]

    @property
    def identity(self) -> tuple[Mapping[str, Any], ...]:
        """What must be the same to resume, and of shards that are put together."""
        return (self.fingerprint, {"samples": self.samples, "chunk": self.chunk})

    @property
    def plan(self) -> None:
        """Which jobs are done is not for the journal to say."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(self), "plan": None}

    @classmethod
    def from_json(cls, header: dict[str, Any]) -> TableHeader:
        """The inverse of `to_json`."""
        about = Fields(header, "the header")
        left_out, versions = about.inside("left_out"), about.inside("versions")
        return cls(
            fingerprint=about.mapping("fingerprint"),
            sites=about.each("sites", TableSite.read),
            samples=about.whole("samples", 1),
            chunk=about.whole("chunk", 1),
            left_out={name: left_out.text(name) for name in about.mapping("left_out")},
            left_out_bits=about.whole("left_out_bits"),
            versions={name: versions.text(name) for name in about.mapping("versions")},
        )


@dataclass(frozen=True, eq=False)
class WordFlips:
    """Every bit of a few words of a tensor, flipped alone: one line of the journal.

    Attributes:
        site: name of the tensor.
        chunk: number of the job in it.
        flips: one row a flip: word, bit, samples that ended as non-critical SDC, critical SDC and DUE, and whether the
            flip is read as without faults; int64 (flips, 6).
        shared: whether the flips shared forwards.
        audited: how many of them ran again, whole, on a fresh copy of the model, with the same answers.
        seconds: processor time, the only field that differs between two runs.
    """

    site: str
    chunk: int
    flips: NDArray[np.int64]
    shared: bool
    audited: int
    seconds: float

    @property
    def key(self) -> tuple[str, int]:
        """Which job it was."""
        return (self.site, self.chunk)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        largest = int(self.flips.max(initial=0))
        kind = next(np.dtype(name) for name in ("uint8", "int32", "int64") if largest <= np.iinfo(name).max)
        columns = self.flips.T.astype(kind)  # like beside like: that packs best
        about = {name: getattr(self, name) for name in ("site", "chunk", "shared", "audited", "seconds")}
        return {**about, "flips": array_to_json(columns)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> WordFlips:
        """The inverse of `to_json`."""
        about = Fields(record, "a job")
        columns = array_from_json(about.take("flips"))
        if columns.ndim != 2 or len(columns) != len(_COUNTS) or columns.dtype.kind not in "iu":
            raise wrong(about.at("flips"), f"{len(_COUNTS)} columns of whole numbers", columns.shape)
        found = cls(
            site=about.text("site"),
            chunk=about.whole("chunk"),
            flips=np.ascontiguousarray(columns.T.astype(np.int64)),
            shared=about.flag("shared"),
            audited=about.whole("audited"),
            seconds=about.number("seconds"),
        )
        about.end()
        return found


def check_record(header: TableHeader, record: WordFlips) -> None:
    """Hold a record that was read against the header.

    Raises:
        ValueError: if it cannot be of this table.
    """
    site = next((site for site in header.sites if site.name == record.site), None)
    if site is None:
        raise ValueError(f"{record.site!r} is no tensor of this table")
    word, bit, *ended, equal = record.flips.T
    few = record.flips.min(initial=0) < 0 or np.sum(ended, axis=0).max(initial=0) > header.samples
    if few or word.max(initial=0) >= site.words or bit.max(initial=0) >= len(site.flips) or equal.max(initial=0) > 1:
        raise ValueError(f"flips of {record.site!r} that it does not have")
    if len(np.unique(word * len(site.flips) + bit)) != len(word):
        raise ValueError(f"a flip of {record.site!r} is there twice")


def table_journal(path: str | os.PathLike[str]) -> Journal[TableHeader, WordFlips]:
    """The journal of a bit table at a path."""
    return Journal(path, TableHeader, WordFlips, kind=KIND, check=check_record)


class BitTable:
    """What single bit flips do, by tensor and bit: of all bits, or of the words that were tried so far.

    An answer is one sample under one flip, and ends in one of the four outcomes of `assess`. Where not all words of a
    tensor were tried, those that were are a simple random sample of them: rates are unbiased, and `_low` and `_high`
    hold the rate over all words of the tensor, for these samples (`mean_interval` over words; no narrower for the
    share that was tried). Where all were, both are the rate itself. Over several tensors, rates are weighed by their
    bits, and the distances to the ends add as squares (MOVER). What was not tried in any word has no rate: NaN.

    Args:
        header: what it is of.
        records: of the jobs that were done.
        confidence: of the intervals.
    """

    def __init__(self, header: TableHeader, records: Sequence[WordFlips], *, confidence: float = 0.95) -> None:
        if not 0 < confidence < 1:
            raise ConfigError(f"BitTable takes a confidence in (0, 1), got {confidence!r}")
        self.header, self.records, self.confidence = header, tuple(records), confidence
        self.samples = header.samples
        """Samples that each flip was tried on."""
        self.left_out = dict(header.left_out)
        """What the model stores and is not in the table, and why."""

    @classmethod
    def load(cls, *journals: str | os.PathLike[str], confidence: float = 0.95) -> BitTable:
        """Read the journals of `inject_all`: one, or those of its shards.

        Args:
            journals: paths.
            confidence: of the intervals.

        Raises:
            ConfigError: if there is none, or two hold the same words.
            JournalMismatch: if one is of another table, with what differs.
            JournalError: if one is no journal of `inject_all`.
        """
        if not journals:
            raise ConfigError("BitTable.load takes the paths of journals of inject_all, got none")
        first: TableHeader | None = None
        seen: dict[tuple[str, int], object] = {}
        records: list[WordFlips] = []
        for path in journals:
            header, found = table_journal(path).read()
            first = first or header
            for ours, theirs in zip(first.identity, header.identity, strict=True):
                if apart := differences(ours, theirs):
                    raise JournalMismatch(
                        f"{path} is of another table than {journals[0]}. What differs ({journals[0]} → {path}):\n  "
                        + "\n  ".join(apart)
                    )
            parts = {site.name: -(-site.words // header.chunk) for site in header.sites}
            for record in found:
                if record.chunk >= parts.get(record.site, record.chunk + 1):
                    raise JournalError(
                        f"{path} holds part {record.chunk} of {record.site}, a tensor that has {parts[record.site]} "
                        f"parts: the file was edited or damaged"
                    )
                if record.key in seen:
                    raise ConfigError(
                        f"{seen[record.key]} and {path} both hold part {record.chunk} of {record.site}: pass each "
                        f"shard once"
                    )
                seen[record.key] = path
            records += found
        assert first is not None
        return cls(first, records, confidence=confidence)

    @cached_property
    def flips(self) -> pd.DataFrame:
        """One row a flip that was tried: where, samples by outcome, and whether it is read as without faults."""
        names = [record.site for record in self.records for _ in range(len(record.flips))]
        rows = np.concatenate([record.flips for record in self.records] or [np.zeros((0, len(_COUNTS)), np.int64)])
        found = pd.DataFrame(rows, columns=list(_COUNTS))
        found.insert(0, "site", names)
        found.insert(3, "masked", self.samples - found[["non_critical_sdc", "critical_sdc", "due"]].sum(axis=1))
        found["equal"] = found["equal"].astype(bool)
        order = {site.name: i for i, site in enumerate(self.header.sites)}
        return found.sort_values(
            ["site", "word", "bit"], key=lambda c: c.map(order) if c.name == "site" else c
        ).reset_index(drop=True)

    @cached_property
    def _by_site(self) -> dict[str, NDArray[np.int64]]:
        """Of each tensor, one row a flip: word, bit, samples by outcome, equal."""
        parts: dict[str, list[NDArray[np.int64]]] = {site.name: [] for site in self.header.sites}
        for record in self.records:
            parts[record.site].append(record.flips)
        return {name: self._complete(np.concatenate(rows)) for name, rows in parts.items() if rows}

    def _complete(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        masked = self.samples - rows[:, 2:5].sum(axis=1)
        return np.column_stack([rows[:, :2], masked, rows[:, 2:]])

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a tensor and bit: `flips` there are, how many were `tried`, how many are `equal` to what is read
        without faults, answers by outcome, and each outcome's `_rate` with `_low` and `_high`.
        """
        rows = []
        for site in self.header.sites:
            found = self._by_site.get(site.name)
            for bit, of in enumerate(site.flips):
                here = None if found is None else found[found[:, 1] == bit]
                name = {"site": site.name, "layer": site.layer, "kind": site.kind, "bit": bit}
                rows.append(name | self._row(here, of))
        return pd.DataFrame(rows)

    def _row(self, flips: NDArray[np.int64] | None, of: int) -> dict[str, Any]:
        """Counts and rates of some flips, each of another word."""
        tried = 0 if flips is None else len(flips)
        row: dict[str, Any] = {"flips": of, "tried": tried, "equal": 0 if flips is None else int(flips[:, 6].sum())}
        shares = np.zeros((4, 0)) if flips is None else flips[:, 2:6].T / self.samples
        row |= {name: 0 if flips is None else int(flips[:, 2 + i].sum()) for i, name in enumerate(OUTCOMES)}
        ends = self._ends(shares, of)
        for i, name in enumerate(OUTCOMES):
            rate = float(shares[i].mean()) if tried else float("nan")
            row |= {f"{name}_rate": rate, f"{name}_low": ends[i, 0], f"{name}_high": ends[i, 1]}
        return row

    def _ends(self, values: NDArray[np.float64], of: int, most: float = 1.0) -> NDArray[np.float64]:
        """Interval of the mean over `of` words, of each row of values of words that were tried."""
        if values.shape[1] >= of:
            return np.array([[row.mean()] * 2 for row in values])
        if values.shape[1] < 2:
            return np.full((len(values), 2), np.nan)
        return mean_intervals(values, confidence=self.confidence, bounds=(0.0, most))

    @cached_property
    def bits(self) -> pd.DataFrame:
        """One row a bit, over all tensors."""
        width = max(len(site.flips) for site in self.header.sites)
        return pd.DataFrame([{"bit": bit} | self._over(self.table[self.table["bit"] == bit]) for bit in range(width)])

    @cached_property
    def sites(self) -> pd.DataFrame:
        """One row a tensor, over all bits: a word with all of its bits is one observation."""
        rows = []
        for site in self.header.sites:
            found, of = self._by_site.get(site.name), sum(site.flips)
            row = self._row(None if found is None else found, of)
            if found is not None:
                _, place = np.unique(found[:, 0], return_inverse=True)
                words = np.zeros((4, int(place.max()) + 1))
                for i in range(4):
                    np.add.at(words[i], place, found[:, 2 + i] / self.samples)
                ends = self._ends(words * site.words / of, site.words, len(site.flips) * site.words / of)
                for i, name in enumerate(OUTCOMES):
                    row |= {f"{name}_low": min(1.0, ends[i, 0]), f"{name}_high": min(1.0, ends[i, 1])}
            rows.append({"site": site.name, "layer": site.layer, "kind": site.kind} | row)
        return pd.DataFrame(rows)

    @cached_property
    def total(self) -> pd.Series:
        """All bits of the table."""
        return pd.Series(self._over(self.sites))

    def _over(self, rows: pd.DataFrame) -> dict[str, Any]:
        """Several tensors: counts add, rates are weighed by flips, and distances to the ends add as squares."""
        rows = rows[rows["flips"] > 0]
        found: dict[str, Any] = {name: int(rows[name].sum()) for name in ("flips", "tried", "equal", *OUTCOMES)}
        share = rows["flips"] / rows["flips"].sum()
        for name in OUTCOMES:
            rate, *ends = (rows[f"{name}_{end}"] for end in ("rate", "low", "high"))
            mean = float((share * rate).sum(skipna=False))
            below, above = (float(((share * (end - rate)) ** 2).sum(skipna=False)) ** 0.5 for end in ends)
            low, high = max(0.0, mean - below), min(1.0, mean + above)
            if found["tried"] == found["flips"]:
                mean = low = high = found[name] / (found["flips"] * self.samples)  # which no sum of shares rounds
            found |= {f"{name}_rate": mean, f"{name}_low": low, f"{name}_high": high}
        return found

    @property
    def of(self) -> int:
        """Bits of the table: flips when all are done."""
        return sum(sum(site.flips) for site in self.header.sites)

    @property
    def tried(self) -> int:
        """Flips that were tried."""
        return sum(len(record.flips) for record in self.records)

    @property
    def done(self) -> float:
        """Flips that were tried ÷ all of them."""
        return self.tried / self.of

    @property
    def coverage(self) -> float:
        """Bits of the table ÷ all bits that the model stores."""
        return self.of / (self.of + self.header.left_out_bits)

    @property
    def missing(self) -> list[str]:
        """Tensors of which no word was tried yet: without them there is no total."""
        return [site.name for site in self.header.sites if site.name not in self._by_site]

    @property
    def audited(self) -> int:
        """Flips that ran again, whole, on a fresh copy of the model, with the same answers."""
        return sum(record.audited for record in self.records)

    @property
    def hours(self) -> float:
        """Processor hours that all bits take: of what was done, seconds a flip of each tensor × its flips."""
        seconds = dict.fromkeys(self._by_site, 0.0)
        for record in self.records:
            seconds[record.site] += record.seconds
        if self.missing:
            return float("nan")
        return sum(seconds[s.name] / len(self._by_site[s.name]) * sum(s.flips) for s in self.header.sites) / 3600

    def __iter__(self) -> Iterator[WordFlips]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"<BitTable of {self.of:,} bits on {self.samples:,} samples, {100 * self.done:.4g} % done>"
