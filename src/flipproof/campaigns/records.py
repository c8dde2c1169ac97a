"""The trials of a campaign, kept by columns: a million of them are tens of bytes each, in memory and in the journal."""

from __future__ import annotations

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from flipproof._fields import Fields
from flipproof.campaigns.answers import Bytes, decode_answers, decode_golden, encode_answers
from flipproof.campaigns.plan import Header
from flipproof.campaigns.record import NAMED_FAULTS, WORD_OUTCOMES, Trial
from flipproof.errors import ConfigError
from flipproof.running.scales import OUTCOMES

Rows = NDArray[np.int64]
"""Numbers of trials."""

CHUNK = 4096
"""Trials that are packed together, at most."""

BLOCK_BYTES = 2**24
"""Bytes of answers that are packed together or unpacked at a time, at most, but those of one trial."""

_NUMBERS = ("point", "trial", "faults", "flips", "audited", "error", "layer", "versions", *OUTCOMES, *WORD_OUTCOMES)
_NAMED = ("site", "value", "bit")
_UNNOTED, _ALL_MASKED, _NOTED = 0, 1, 2
"""Whether a trial says how each sample ended: not, all masked, or in a row of its own."""
_WIDTHS = (np.uint8, np.int16, np.int32, np.int64)


@dataclass(frozen=True)
class _Chunk:
    """Some trials.

    Attributes:
        columns: of numbers, (T,); `digest` uint64; `seconds`; one float64 a metric; `error`, `layer`, `versions` are
            numbers of texts; `named` is how many faults of a trial are named; `noted` whether its answers are.
        named: `site`, `value` and `bit` of named faults, one trial after the other.
        answers: zlib of the rows of trials whose `noted` is 2: outcome + 4 · correct of each sample, XOR 4 · correct
            without faults.
    """

    columns: dict[str, NDArray[Any]]
    named: dict[str, NDArray[Any]]
    answers: bytes

    def __len__(self) -> int:
        return len(self.columns["point"])


@dataclass(frozen=True)
class Tally:
    """Counts over the answers of some trials: what tables of trials × samples are summed up from.

    Attributes:
        by_sample: how often each sample ended with each code (outcome index + 4 · correct), (8, N).
        right: correct samples of each trial, (T,).
        kept: those of them that are correct without faults as well, (T,).
    """

    by_sample: NDArray[np.int64]
    right: NDArray[np.int64]
    kept: NDArray[np.int64]


class Records(Sequence[Trial]):
    """The trials of a campaign, in the order in which they came, or a selection of them.

    A trial that is asked for is made of its columns; `column` gives one of them for all.

    Args:
        header: of the campaign.
        trials: to begin with.
    """

    def __init__(self, header: Header, trials: Iterable[Trial] = ()) -> None:
        self.header = header
        self.samples = header.fingerprint.samples
        self.most = max(1, min(CHUNK, BLOCK_BYTES // self.samples))
        """Trials that are packed together, at most."""
        text = header.golden_answers
        self.golden = None if text is None else decode_golden(text, self.samples)
        self._texts: list[str] = []
        self._number_of: dict[str, int] = {}
        self._chunks: list[_Chunk] = []
        self._late: list[Trial] = []
        self._rows: Rows | None = None
        for trial in trials:
            self.append(trial)

    # what came

    def append(self, trial: Trial) -> None:
        """One more; not to a selection.

        Raises:
            TypeError: if this is one.
        """
        if self._rows is not None:
            raise TypeError("a selection of records takes no more of them")
        vars(self).pop("tally", None)
        self._late.append(trial)
        if len(self._late) == self.most:
            self._settle()

    def clear(self) -> None:
        """Forget all of them."""
        self._chunks, self._late = [], []  # selections keep theirs
        vars(self).pop("tally", None)

    def move(self, header: Header) -> None:
        """Another header of the same campaign: points go where it has them, by what they are."""
        if [point.faults for point in header.points] != [point.faults for point in self.header.points]:
            self._settle()
            place = {point.faults: index for index, point in enumerate(header.points)}
            if missing := [point.faults for point in self.header.points if point.faults not in place]:
                raise ConfigError(f"points: expected all that there were, got none for {missing[0]}")
            to = np.array([place[point.faults] for point in self.header.points], np.int64)
            self._chunks = [
                _Chunk({**chunk.columns, "point": _narrow(to[chunk.columns["point"]])}, chunk.named, chunk.answers)
                for chunk in self._chunks
            ]
        self.header = header

    def pack(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """Some trials as one line of a journal, see docs/journal.md; `unpack` is the inverse."""
        chunk, texts = _chunked(trials, self.header, self.golden)
        parts = {name: _little(part) for name, part in (chunk.columns | chunk.named).items()}
        content = b"".join(part.tobytes() for part in parts.values())
        line = {
            "packed": len(trials),
            "columns": [[name, part.dtype.str] for name, part in parts.items()],
            "texts": texts,
            "named": int(chunk.columns["named"].sum()),
            "data": b64encode(zlib.compress(content, 6)).decode("ascii"),
            "answers": b64encode(chunk.answers).decode("ascii"),
        }
        return line | {"crc": _crc(line)}

    def unpack(self, line: dict[str, Any]) -> None:
        """Add the trials of a line that `pack` made.

        Raises:
            ConfigError: naming what does not fit the header, or itself.
        """
        self._settle()
        about = Fields(line, "the packed trials")
        if about.whole("crc") != _crc({name: value for name, value in line.items() if name != "crc"}):
            raise ConfigError("the packed trials: their checksum differs")
        count, named = about.whole("packed", 1), about.whole("named")
        if count > self.most or named > NAMED_FAULTS * count:
            raise ConfigError(f"packed: expected at most {self.most} trials that name {NAMED_FAULTS} faults each")
        texts = [*about.texts("texts")]
        kinds = {str(name): np.dtype(str(kind)) for name, kind in about.take("columns")}
        expected = [*_NUMBERS, "digest", "seconds", "named", "noted", *map(_metric, self.header.golden)]
        if [*kinds] != [*expected, *_NAMED] or any(kind.kind not in "iuf" for kind in kinds.values()):
            raise ConfigError(f"columns: expected {[*expected, *_NAMED]}, got {[*kinds]}")
        sizes = {name: (named if name in _NAMED else count) for name in kinds}
        content = _inflated(about.text("data"), sum(sizes[name] * kind.itemsize for name, kind in kinds.items()))
        answers = b64decode(about.text("answers"), validate=True)
        about.end()
        parts, start = {}, 0
        for name, kind in kinds.items():
            parts[name] = np.frombuffer(content, kind, sizes[name], start)
            start += sizes[name] * kind.itemsize
        columns = {name: part for name, part in parts.items() if name not in _NAMED}
        chunk = _Chunk(columns, {name: parts[name] for name in _NAMED}, answers)
        _check(chunk, texts, self.header)
        self._add(chunk, texts)

    def _settle(self) -> None:
        """Pack what came one by one."""
        if self._late:
            self._add(*_chunked(self._late, self.header, self.golden))
            self._late = []

    def _add(self, chunk: _Chunk, texts: list[str]) -> None:
        numbers = np.array([*(self._number(text) for text in texts), -1], np.int64)  # the last is that of no text
        columns = dict(chunk.columns)
        for name in ("error", "layer", "versions"):
            columns[name] = _narrow(numbers[columns[name].astype(np.int64)])
        named = {**chunk.named, "site": _narrow(numbers[chunk.named["site"].astype(np.int64)])}
        self._chunks.append(_Chunk(columns, named, chunk.answers))

    def _number(self, text: str) -> int:
        if text not in self._number_of:
            self._number_of[text] = len(self._texts)
            self._texts.append(text)
        return self._number_of[text]

    # what there is

    def __len__(self) -> int:
        if self._rows is not None:
            return len(self._rows)
        return sum(map(len, self._chunks)) + len(self._late)

    @overload
    def __getitem__(self, index: int) -> Trial: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Trial | Records:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return next(iter(self.select(np.arange(len(self))[[index]])))

    def __iter__(self) -> Iterator[Trial]:
        for rows, chunk in self._parts():
            yield from self._trials(chunk, rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def select(self, rows: NDArray[Any]) -> Records:
        """These trials, by their numbers here, in this order."""
        self._settle()
        found = copy(self)
        vars(found).pop("tally", None)
        rows = np.asarray(rows, np.int64)
        found._chunks, found._late = [*self._chunks], []
        found._rows = rows if self._rows is None else self._rows[rows]
        return found

    def column(self, name: str) -> NDArray[Any]:
        """One number a trial: an outcome, `point`, `trial`, `faults`, `flips`, `digest`, `seconds`, a word outcome."""
        self._settle()
        return self._gathered([chunk.columns[name] for chunk in self._chunks])

    def metric(self, name: str) -> NDArray[np.float64]:
        """A metric, a trial."""
        return np.asarray(self.column(_metric(name)), np.float64)

    def texts(self, name: str) -> list[str | None]:
        """`error`, or the `layer` that a trial's upsets share in campaigns over neurons; a trial."""
        return [self._text(number) for number in self.column(name).tolist()]

    @property
    def answered(self) -> bool:
        """Whether every trial says how each sample ended."""
        return self.golden is not None and bool((self.column("noted") != _UNNOTED).all())

    @cached_property
    def tally(self) -> Tally:
        """Counts over the answers, each unpacked once."""
        golden = np.zeros(self.samples, bool) if self.golden is None else self.golden
        by_sample = np.zeros((8, self.samples), np.int64)
        right, kept = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        place = 8 * np.arange(self.samples)
        for rows, chunk in self._parts():
            mine, changed = self._noted(chunk, rows)
            codes = changed ^ (4 * golden.astype(np.uint8))
            counted = np.bincount((codes + place).reshape(-1), minlength=8 * self.samples)
            by_sample += counted.reshape(self.samples, 8).T
            by_sample[0, ~golden] += len(rows) - len(codes)  # trials whose samples are all masked
            by_sample[4, golden] += len(rows) - len(codes)
            for found, correct in ((right, codes >> 2), (kept, (codes >> 2) & golden)):
                here = np.full(len(rows), int(golden.sum()))
                here[mine] = np.count_nonzero(correct, axis=1)
                found.append(here)
        return Tally(by_sample, np.concatenate(right), np.concatenate(kept))

    def codes(self) -> Iterator[Bytes]:
        """How each sample of each trial ended, (some trials, N): outcome index + 4 · correct."""
        for rows, chunk in self._parts():
            yield self._codes(chunk, rows)

    def _gathered(self, parts: list[NDArray[Any]]) -> NDArray[Any]:
        whole = np.concatenate(parts) if parts else np.empty(0, np.int64)
        return whole if self._rows is None else whole[self._rows]

    def _parts(self) -> Iterator[tuple[Rows, _Chunk]]:
        """(numbers in a chunk, chunk), in the order of the trials; few enough at a time to unpack their answers."""
        self._settle()
        firsts = np.cumsum([0, *map(len, self._chunks)])
        rows = np.arange(firsts[-1]) if self._rows is None else self._rows
        which = np.searchsorted(firsts, rows, side="right") - 1
        turns = np.flatnonzero(np.diff(which, prepend=-1)).tolist()
        for start, end in pairwise([*turns, len(rows)]):
            chunk = int(which[start])
            for first in range(start, end, self.most):
                yield rows[first : min(first + self.most, end)] - firsts[chunk], self._chunks[chunk]

    def _codes(self, chunk: _Chunk, rows: Rows) -> Bytes:
        golden = np.zeros(self.samples, np.uint8) if self.golden is None else 4 * self.golden.astype(np.uint8)
        found = np.zeros((len(rows), self.samples), np.uint8)
        mine, changed = self._noted(chunk, rows)
        found[mine] = changed
        return found ^ golden

    def _noted(self, chunk: _Chunk, rows: Rows) -> tuple[NDArray[np.bool_], Bytes]:
        """Which of these trials have a row of answers, and those rows, as `_Chunk` has them."""
        noted = chunk.columns["noted"] == _NOTED
        mine = noted[rows]
        kept = _unpacked(chunk.answers, int(noted.sum()), self.samples)
        return mine, kept[(np.cumsum(noted) - 1)[rows[mine]]]

    def _trials(self, chunk: _Chunk, rows: Rows) -> Iterator[Trial]:
        columns = {name: column[rows].tolist() for name, column in chunk.columns.items()}
        ends = np.cumsum(chunk.columns["named"], dtype=np.int64)
        codes = self._codes(chunk, rows)
        for i, row in enumerate(rows.tolist()):
            named = slice(int(ends[row]) - columns["named"][i], int(ends[row]))
            places = zip(*(chunk.named[name][named].tolist() for name in _NAMED), strict=True)
            words = {name: columns[name][i] for name in WORD_OUTCOMES}
            yield Trial(
                point=columns["point"][i],
                trial=columns["trial"][i],
                coordinates=dict(self.header.points[columns["point"][i]].coordinates),
                faults=columns["faults"][i],
                flips=columns["flips"][i],
                digest=f"{columns['digest'][i]:016x}",
                metrics={name: columns[_metric(name)][i] for name in self.header.golden},
                outcomes={name: columns[name][i] for name in OUTCOMES},
                samples=self.samples,
                seconds=seconds(columns["seconds"][i]),
                versions=json.loads(self._texts[columns["versions"][i]]),
                where=[(self._texts[site], value, bit) for site, value, bit in places],
                error=self._text(columns["error"][i]),
                answers=self._answer(columns["noted"][i], codes[i]),
                layer=self._text(columns["layer"][i]),
                audited=bool(columns["audited"][i]),
                words=None if words["corrected"] < 0 else words,
            )

    def _text(self, number: int) -> str | None:
        return None if number < 0 else self._texts[number]

    def _answer(self, noted: int, codes: Bytes) -> str | None:
        if noted != _NOTED:
            return None if noted == _UNNOTED else ""
        return encode_answers(codes & 3, codes >> 2)


def seconds(elapsed: float) -> float:
    """A time as records keep it, to three digits."""
    return float(f"{elapsed:.3g}")


def _metric(name: str) -> str:
    return f"metric {name}"


def _chunked(trials: Sequence[Trial], header: Header, golden: NDArray[np.bool_] | None) -> tuple[_Chunk, list[str]]:
    """Trials as a chunk, and the texts that it numbers."""
    texts: dict[str, int] = {}

    def number(text: str | None) -> int:
        return -1 if text is None else texts.setdefault(text, len(texts))

    samples = header.fingerprint.samples
    start = np.zeros(samples, bool) if golden is None else golden
    columns: dict[str, NDArray[Any]] = {}
    for name in ("point", "trial", "faults", "flips", "audited"):
        columns[name] = _narrow([getattr(trial, name) for trial in trials])
    columns["error"] = _narrow([number(trial.error) for trial in trials])
    columns["layer"] = _narrow([number(trial.layer) for trial in trials])
    columns["versions"] = _narrow([number(json.dumps(trial.versions)) for trial in trials])
    for name in OUTCOMES:
        columns[name] = _narrow([trial.outcomes[name] for trial in trials])
    for name in WORD_OUTCOMES:
        columns[name] = _narrow([-1 if trial.words is None else trial.words[name] for trial in trials])
    columns["digest"] = np.array([int(trial.digest, 16) for trial in trials], np.uint64)
    columns["seconds"] = np.array([trial.seconds for trial in trials], np.float32)
    columns["named"] = _narrow([len(trial.where) for trial in trials])
    noted = [_UNNOTED if t.answers is None else _NOTED if t.answers else _ALL_MASKED for t in trials]
    columns["noted"] = np.array(noted, np.uint8)
    for name in header.golden:
        columns[_metric(name)] = np.array([trial.metrics[name] for trial in trials], np.float64)
    places = [place for trial in trials for place in trial.where]
    named = {
        "site": _narrow([number(site) for site, _, _ in places]),
        "value": _narrow([value for _, value, _ in places]),
        "bit": _narrow([bit for _, _, bit in places]),
    }
    rows = [decode_answers(t.answers, start) ^ (4 * start.astype(np.uint8)) for t in trials if t.answers]
    return _Chunk(columns, named, zlib.compress(np.concatenate([np.empty(0, np.uint8), *rows]).tobytes(), 6)), [*texts]


def _check(chunk: _Chunk, texts: list[str], header: Header) -> None:
    """Raise if packed trials contradict their header or themselves."""
    columns, samples = chunk.columns, header.fingerprint.samples
    for name in (*_NUMBERS, "named", "noted"):
        if columns[name].dtype.kind == "f" or columns["digest"].dtype != np.uint64:
            raise ConfigError(f"{name}: expected whole numbers, got {columns[name].dtype}")
    limits = {
        "point": (0, len(header.points)),
        "trial": (0, 2**63),
        "faults": (0, 2**63),
        "audited": (0, 2),
        "error": (-1, len(texts)),
        "layer": (-1, len(texts)),
        "versions": (0, len(texts)),
        "noted": (0, _NOTED + 1),
        **dict.fromkeys(OUTCOMES, (0, samples + 1)),
        **dict.fromkeys(WORD_OUTCOMES, (-1, 2**63)),
    }
    for name, (low, high) in limits.items():
        if int(columns[name].min()) < low or int(columns[name].max()) >= high:
            raise ConfigError(f"{name}: expected numbers from {low} and below {high}")
    if (np.sum([columns[name].astype(np.int64) for name in OUTCOMES], axis=0) != samples).any():
        raise ConfigError(f"sum of outcomes: expected {samples}")
    if (columns["flips"] > columns["faults"]).any() or (columns["flips"] < 0).any():
        raise ConfigError("flips: expected at most as many as faults")
    if not (np.isfinite(columns["seconds"]) & (columns["seconds"] >= 0)).all():
        raise ConfigError("seconds: expected numbers from 0")
    if int(columns["named"].min()) < 0 or int(columns["named"].sum(dtype=np.int64)) != len(chunk.named["site"]):
        raise ConfigError("named: expected as many as there are places")
    for name, high in (("site", len(texts)), ("value", 2**63), ("bit", 64)):
        part = chunk.named[name]
        if part.size and (part.dtype.kind == "f" or int(part.min()) < 0 or int(part.max()) >= high):
            raise ConfigError(f"{name}: expected whole numbers from 0 and below {high}")
    for number in np.unique(columns["versions"]).tolist():
        versions = json.loads(texts[number])
        about = Fields(versions, "versions")
        for name in versions:
            about.text(name)
    codes = _unpacked(chunk.answers, int((columns["noted"] == _NOTED).sum()), samples)
    if codes.size and int(codes.max()) > 7:
        raise ConfigError("answers: expected numbers up to 7")
    rows = columns["noted"] == _NOTED
    for index, name in enumerate(OUTCOMES):
        counted = np.full(len(rows), samples if index == 0 else 0)
        counted[rows] = np.count_nonzero((codes & 3) == index, axis=1)
        wrong = (columns["noted"] != _UNNOTED) & (counted != columns[name])
        if wrong.any():
            raise ConfigError(f"{name}: expected {counted[wrong][0]}, as many as the answers have")


def _crc(line: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(line, sort_keys=True, separators=(",", ":")).encode())


@lru_cache(maxsize=4)
def _unpacked(answers: bytes, rows: int, samples: int) -> Bytes:
    """Rows of answers; no more is ever unpacked than there may be."""
    unpacking = zlib.decompressobj()
    try:
        content = unpacking.decompress(answers, rows * samples + 1)
    except zlib.error as error:
        raise ConfigError(f"answers: {error}") from None
    if len(content) != rows * samples:
        raise ConfigError(f"answers: expected those of {rows} trials and {samples} samples, got {len(content)} bytes")
    return np.frombuffer(content, np.uint8).reshape(rows, samples)


def _inflated(text: str, size: int) -> bytes:
    try:
        content = zlib.decompressobj().decompress(b64decode(text, validate=True), size + 1)
    except zlib.error as error:
        raise ConfigError(f"data: {error}") from None
    if len(content) != size:
        raise ConfigError(f"data: expected {size} bytes, got {len(content)}{' or more' if len(content) > size else ''}")
    return content


def _narrow(numbers: Any) -> NDArray[Any]:
    """Whole numbers in as few bytes as they need."""
    whole = np.asarray(numbers, np.int64)
    if not whole.size:
        return whole.astype(np.uint8)
    low, high = int(whole.min()), int(whole.max())
    return whole.astype(next(width for width in _WIDTHS if np.iinfo(width).min <= low and high <= np.iinfo(width).max))


def _little(part: NDArray[Any]) -> NDArray[Any]:
    return part.astype(part.dtype.newbyteorder("<"), copy=False)
