"""Shards of a campaign, run anywhere, put together again: record for record what one run would have left."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flipproof._files import replacing
from flipproof.campaigns.assessment import Assessment, answer, campaign_journal, planned, stops_at
from flipproof.campaigns.plan import Header
from flipproof.campaigns.records import Records
from flipproof.engine.journal import differences
from flipproof.errors import AuditError, ConfigError, JournalError, JournalMismatch


class Shard(NamedTuple):
    """One part of `of` of a campaign's trials, the `number`-th (from 1).

    Whose part a trial is depends on what its point is and on its own number, and not on how many there are: more trials
    and more rates belong to the same shards.
    """

    number: int
    of: int

    @classmethod
    def read(cls, text: object) -> Shard:
        """From a text such as "3/100".

        >>> Shard.read("3/100")
        Shard(number=3, of=100)

        Raises:
            ConfigError: on anything else.
        """
        if isinstance(text, str) and re.fullmatch("[0-9]+/[0-9]+", text):
            number, _, of = text.partition("/")
            with suppress(ValueError):  # more digits than Python reads
                found = cls(int(number), int(of))
                if 1 <= found.number <= found.of:
                    return found
        raise ConfigError(f"shard= takes a text such as '3/100', the third of a hundred, got {text!r}")

    def trials(self, point: str, ceiling: int) -> range:
        """Numbers of its trials of a point, up to a ceiling."""
        return range((self.number - 1 - zlib.crc32(point.encode())) % self.of, ceiling, self.of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def merge(*journals: str | os.PathLike[str], into: str | os.PathLike[str], partial: bool = False) -> Assessment:
    """Put the journals of a campaign's shards together into one.

    Args:
        journals: of `assess(…, shard="1/100")` and so on, or any journals of one campaign.
        into: the journal to write, whole or not at all; it can be resumed, which runs what is missing.
        partial: whether trials may be missing; else they are named, and nothing is written.

    Returns:
        What all of them come to: record for record as of one run.

    Raises:
        ConfigError: if two journals hold the same trial, or trials are missing.
        JournalMismatch: if one is of another campaign, with what differs.
        JournalError: if one is no journal.

    Example:
        >>> import flipproof as fp, tempfile, torch
        >>> net = torch.nn.Linear(2, 2)
        >>> setup = {"data": [(torch.eye(2), torch.tensor([0, 1]))], "faults": fp.RandomBits(3), "trials": 10}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = [f"{folder}/{i}.jsonl" for i in (1, 2, 3)]
        ...     for i, path in enumerate(paths, start=1):
        ...         _ = fp.assess(net, **setup, journal=path, shard=f"{i}/3")
        ...     whole = fp.merge(*paths, into=f"{folder}/whole.jsonl")
        >>> [record.digest for record in whole.records] == [record.digest for record in fp.assess(net, **setup).records]
        True
    """
    for path in (*journals, into):
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise ConfigError(f"merge takes the paths of journals, and one as into=, got {path!r}")
    if not journals:
        raise ConfigError("merge takes the journals to put together, got none")
    target = Path(into)
    if target.exists():
        raise ConfigError(f"{target} is there already; choose another into=")
    headers: list[Header] = []
    parts: list[Records] = []
    off: list[frozenset[str]] = []
    for path in journals:
        journal = campaign_journal(path)
        header, records = journal.read()
        if headers:
            _check_same(journals[0], headers[0], path, header)
        headers.append(header)
        parts.append(planned(records, header.plan.trials))
        off.append(journal.switched_off)
    _check_apart(journals, parts, headers[0])
    _check_audits(journals, off)
    header = replace(headers[0], plan=replace(headers[0].plan, shard=None))
    merged = planned(Records(header, (trial for part in parts for trial in part)), header.plan.trials)
    missing = [*_missing(merged, header)]
    if missing and not partial:
        raise ConfigError(
            f"trials are missing: {'; '.join(missing)}. Run their shards, or pass partial=True and resume into= later"
        )
    with replacing(target) as temporary:
        journal = campaign_journal(temporary)
        try:
            with journal.writing(header):
                for shortcut in sorted(off[0]):
                    journal.note_failed_audit(AuditError("", shortcut, 0, 0))
                for trial in merged:
                    journal.append(trial)
        except JournalError as error:
            raise ConfigError(f"cannot write {target}: {error.__cause__ or error}; nothing was written") from error
        finally:
            temporary.with_name(f"{temporary.name}.lock").unlink(missing_ok=True)
    return Assessment(header, answer(merged, header))


def _check_audits(journals: tuple[str | os.PathLike[str], ...], off: list[frozenset[str]]) -> None:
    """Raise if an audit found a shortcut wrong that trials of another journal rest on."""
    for path, wrong in zip(journals, off, strict=True):
        if used := sorted(frozenset().union(*off) - wrong):
            found = next(other for other, switched in zip(journals, off, strict=True) if used[0] in switched)
            raise ConfigError(
                f"an audit in {found} found the shortcut {used[0]!r} wrong, and the trials of {path} rest on it: run "
                f"that shard again with audit=1"
            )


def _check_same(first: object, ours: Header, path: object, theirs: Header) -> None:
    """Raise if two journals are of different campaigns, or of other plans."""
    plans = [{"trials": header.plan.trials, "margin": header.plan.margin} for header in (ours, theirs)]
    for was, now in zip((*ours.identity, plans[0]), (*theirs.identity, plans[1]), strict=True):
        if found := differences(was, now):
            raise JournalMismatch(
                f"{path} is of another campaign than {first}; nothing was written. What differs ({first} → {path}):\n  "
                + "\n  ".join(found)
            )


def _check_apart(journals: tuple[str | os.PathLike[str], ...], parts: list[Records], header: Header) -> None:
    """Raise if a trial is in two journals."""
    seen: dict[int, int] = {}
    for number, part in enumerate(parts):
        keys = part.column("point").astype(np.int64) * header.plan.trials + part.column("trial").astype(np.int64)
        for key in keys.tolist():
            if key in seen:
                point, trial = divmod(key, header.plan.trials)
                raise ConfigError(
                    f"{journals[seen[key]]} and {journals[number]} both hold point {point}, trial {trial}: pass each "
                    f"shard once"
                )
            seen[key] = number


def _missing(records: Records, header: Header) -> Iterator[str]:
    """The trials that are planned and not there, a sentence a point; `records` are ordered."""
    point, trial = records.column("point"), records.column("trial")
    for index, about in enumerate(header.points):
        rows = np.flatnonzero(point == index)
        ran = np.zeros(1 if about.repeats else header.plan.trials, bool)
        ran[trial[rows]] = True
        if header.plan.margin is not None and stops_at(records.select(rows), header) is not None:
            continue
        if (gaps := np.flatnonzero(~ran)).size:
            some = ", ".join(map(str, gaps[:3].tolist()))
            yield f"of point {index} ({about.faults}) {gaps.size}: {some}{', …' if gaps.size > 3 else ''}"
