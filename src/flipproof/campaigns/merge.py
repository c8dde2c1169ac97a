"""Shards of a campaign, run anywhere, put together again: record for record what one run would have left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flipproof._files import replacing
from flipproof.campaigns.assessment import Assessment, answer, campaign_journal, planned
from flipproof.campaigns.plan import Header
from flipproof.campaigns.records import Records
from flipproof.engine.journal import differences
from flipproof.errors import ConfigError, JournalMismatch


class Shard(NamedTuple):
    """Every `of`-th trial of a campaign, the `number`-th of them first (from 1)."""

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
        if isinstance(text, str):
            number, _, of = text.partition("/")
            with suppress(ValueError):
                found = cls(int(number), int(of))
                if 1 <= found.number <= found.of:
                    return found
        raise ConfigError(f"shard= takes a text such as '3/100', the third of a hundred, got {text!r}")

    def takes(self, index: int) -> bool:
        """Whether the trial of this number in the whole campaign, counted from 0, is one of them."""
        return index % self.of == self.number - 1

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
    if not journals:
        raise ConfigError("merge takes the journals to put together, got none")
    target = Path(into)
    if target.exists():
        raise ConfigError(f"{target} is there already; choose another into=")
    headers: list[Header] = []
    parts: list[Records] = []
    for path in journals:
        header, records = campaign_journal(path).read()
        if headers:
            _check_same(journals[0], headers[0], path, header)
        headers.append(header)
        parts.append(planned(records, header.plan.trials))
    _check_apart(journals, parts, headers[0])
    header = replace(headers[0], plan=replace(headers[0].plan, shard=None))
    together = Records(header, (trial for part in parts for trial in part))
    missing = [*_missing(together, header)]
    if missing and not partial:
        raise ConfigError(
            f"trials are missing: {'; '.join(missing)}. Run their shards, or pass partial=True and resume into= later"
        )
    merged = planned(together, header.plan.trials)
    with replacing(target) as temporary:
        journal = campaign_journal(temporary)
        with journal.writing(header):
            for trial in merged:
                journal.append(trial)
        temporary.with_name(f"{temporary.name}.lock").unlink(missing_ok=True)
    return Assessment(header, answer(merged, header))


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
    """The trials that are planned and not there, a sentence a point."""
    if header.plan.margin is not None:
        return
    point, trial = records.column("point"), records.column("trial")
    for index, about in enumerate(header.points):
        ran = np.zeros(1 if about.repeats else header.plan.trials, bool)
        ran[trial[point == index]] = True
        if (gaps := np.flatnonzero(~ran)).size:
            some = ", ".join(map(str, gaps[:3].tolist()))
            yield f"of point {index} ({about.faults}) {gaps.size}: {some}{', …' if gaps.size > 3 else ''}"
