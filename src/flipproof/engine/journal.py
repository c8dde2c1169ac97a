"""The journal: one JSON line a finished job, appended as it ends, so that long work can be killed and resumed.

Line 1 is the header: what is worked on, and how it is told from anything else. Lines after it are records, notes of a
resumption with another plan, or notes of a failed audit, before which no record counts. A line without its newline was
torn by a kill or a full disk: it is dropped and its job done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from filelock import FileLock, Timeout

from flipproof.errors import AuditError, JournalError, JournalLocked, JournalMismatch

Key = tuple[int | str, ...]
"""Names a job: its record carries it."""

SCHEMA = 1
PATIENCE = 1.5
"""Seconds to wait for the lock: workers of a killed run hold it until they notice, within half a second."""
_START = b'{"flipproof_journal":'
CAMPAIGN = "campaign"
"""The kind of a journal that does not say its kind."""


class Record(Protocol):
    """What one job leaves: one line."""

    @property
    def key(self) -> Key:
        """Which job."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """The inverse; raises KeyError, TypeError or ValueError on anything else."""


class Header(Protocol):
    """The first line: what is worked on."""

    @property
    def identity(self) -> tuple[Mapping[str, Any], ...]:
        """What must be the same to resume, compared in turn; the first that differs is shown."""

    @property
    def plan(self) -> Any:
        """How much is to be done; it may be another one when work is resumed, and has `to_json`."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, with the plan as its field ``plan``."""

    @classmethod
    def from_json(cls, header: dict[str, Any]) -> Self:
        """The inverse; raises KeyError, TypeError or ValueError on anything else."""


HeaderT = TypeVar("HeaderT", bound=Header)
RecordT = TypeVar("RecordT", bound=Record)


class Journal(Generic[HeaderT, RecordT]):
    """A file on disk that keeps what was done.

    Args:
        path: the JSONL file; its folder is made if needed. `<path>.lock` beside it keeps other writers out.
        header: class of the first line.
        record: class of the lines after it.
        kind: of work, so that a journal of one verb is not taken for that of another.
        check: holds a record that was read against the header, and raises ValueError if it cannot be of this work.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: type[HeaderT],
        record: type[RecordT],
        *,
        kind: str = CAMPAIGN,
        check: Callable[[HeaderT, RecordT], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self.kind = kind
        self._header, self._record, self._check = header, record, check
        self._descriptor: int | None = None
        self.switched_off: frozenset[str] = frozenset()
        """Shortcuts that an audit has found wrong; known once the journal was read."""

    def read(self) -> tuple[HeaderT, list[RecordT]]:
        """Header (with the latest plan) and every whole record; a torn last line is passed over.

        Raises:
            JournalError: if the file is missing, unreadable or not a journal of this kind.
        """
        header, records, _ = self._parse()
        return header, records

    @contextmanager
    def writing(self, header: HeaderT) -> Iterator[list[RecordT]]:
        """Open for appending, creating or resuming; yields the records that are already there.

        Raises:
            JournalLocked: if another process writes it.
            JournalMismatch: if it belongs to other work, with every differing field.
            JournalError: if it cannot be written or is not a journal.
        """
        self._refuse_folder()
        lock = FileLock(f"{self.path}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            if not Path(lock.lock_file).exists():  # what keeps us out is no other writer
                raise JournalError(f"cannot write {self.path}: its folder takes no new file {lock.lock_file}") from None
            raise JournalLocked(
                f"{self.path} is being written by another process; wait for it or choose another journal="
            ) from None
        except OSError as error:
            raise JournalError(f"cannot write {self.path}: {error.strerror or error}") from error
        try:
            done = self._create(header) if self._unwritten() else self._resume(header)
            try:
                yield done
            finally:
                os.close(self._open())
                self._descriptor = None
        finally:
            lock.release()

    def _refuse_folder(self) -> None:
        if self.path.is_dir():
            raise JournalError(f"{self.path} is a folder; a journal is a file, such as {self.path / 'journal.jsonl'}")

    def note_failed_audit(self, error: AuditError) -> None:
        """Write that an audit failed: the records before this line count no more; the shortcut is switched off."""
        self._write({"audit_failed": {"shortcut": error.shortcut, "point": error.point, "trial": error.trial}})

    def append(self, record: RecordT) -> None:
        """Write one record, whole or not at all."""
        self._write(record.to_json())

    def _unwritten(self) -> bool:
        """No file, an empty one, or a header of ours that was torn before its end: nothing was recorded yet."""
        try:
            if self.path.stat().st_size == 0:
                return True
            with self.path.open("rb") as file:
                start = file.read(len(_START))
                if not _START.startswith(start) or file.readline().endswith(b"\n"):
                    return False
        except FileNotFoundError:
            return True
        except OSError as error:
            raise JournalError(f"cannot read {self.path}: {error.strerror or error}") from error
        os.ftruncate(self._open(), 0)
        return True

    def _create(self, header: HeaderT) -> list[RecordT]:
        kind = {} if self.kind == CAMPAIGN else {"kind": self.kind}
        self._write({"flipproof_journal": SCHEMA, **kind, **header.to_json()})
        return []

    def _resume(self, header: HeaderT) -> list[RecordT]:
        found, records, whole = self._parse()
        for was, now in zip(found.identity, header.identity, strict=True):
            if differences := _differences(was, now):
                raise JournalMismatch(
                    f"{self.path} holds another {self.kind}; nothing was changed. What differs (journal → now):\n  "
                    + "\n  ".join(differences)
                    + "\nResume with the same model, data and settings, or choose another journal="
                )
        descriptor = self._open()
        if os.fstat(descriptor).st_size > whole:
            os.ftruncate(descriptor, whole)
        if found.plan != header.plan:
            self._write({"resumed": True, "plan": header.to_json()["plan"]})
        return records

    def _parse(self) -> tuple[HeaderT, list[RecordT], int]:
        """Header, records, and the number of bytes in whole lines."""
        self._refuse_folder()
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise JournalError(f"cannot read {self.path}: {error.strerror or error}") from error
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].splitlines()
        raw = self._first(lines)
        try:
            header = self._header.from_json(raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JournalError(
                f"{self.path}, line 1: not the header of a {self.kind} ({type(error).__name__}: {error}); the file was "
                f"edited or damaged. Nothing was changed"
            ) from None
        records: list[RecordT] = []
        switched_off: set[str] = set()
        for number, line in enumerate(lines[1:], start=2):
            try:
                record = json.loads(line)
                if "resumed" in record:
                    header = self._header.from_json({**raw, "plan": record["plan"]})
                elif "audit_failed" in record:
                    records.clear()
                    switched_off.add(str(record["audit_failed"]["shortcut"]))
                else:
                    records.append(self._record.from_json(record))
                    if self._check is not None:
                        self._check(header, records[-1])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise JournalError(
                    f"{self.path}, line {number}: not a record of a {self.kind} ({error}); the file was edited or "
                    f"damaged. Nothing was changed: remove that line to do its job again"
                ) from None
        self.switched_off = frozenset(switched_off)
        return header, records, whole

    def _first(self, lines: list[bytes]) -> dict[str, Any]:
        try:
            raw: dict[str, Any] = json.loads(lines[0])
            schema, kind = raw.pop("flipproof_journal"), raw.pop("kind", CAMPAIGN)
        except (IndexError, ValueError, KeyError, TypeError, AttributeError):
            raise JournalError(
                f"{self.path} is not a flipproof journal (its first line is no header); nothing was changed"
            ) from None
        if schema != SCHEMA:
            raise JournalError(f"{self.path} has schema {schema}; this flipproof reads schema {SCHEMA}")
        if kind != self.kind:
            raise JournalError(f"{self.path} is the journal of a {kind}, expected that of a {self.kind}")
        return raw

    def _open(self) -> int:
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            except OSError as error:
                raise JournalError(f"cannot write {self.path}: {error.strerror or error}") from error
        return self._descriptor

    def _write(self, record: dict[str, Any]) -> None:
        """One line in one system call; what a full disk left of it is cut off again."""
        descriptor = self._open()
        line = (json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n").encode()
        before = os.fstat(descriptor).st_size
        written = 0
        try:
            while written < len(line):
                written += os.write(descriptor, line[written:])
        except OSError as error:
            if written:
                os.ftruncate(descriptor, before)
            raise JournalError(
                f"cannot write {self.path}: {error.strerror or error}. Every finished job up to here is kept; "
                f"make room and run the same call again to resume"
            ) from error


def written(journal: Journal[HeaderT, RecordT] | None, header: HeaderT) -> AbstractContextManager[list[RecordT]]:
    """`journal.writing(header)`; without a journal nothing is known and nothing is kept."""
    return nullcontext([]) if journal is None else journal.writing(header)


def _differences(journal: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted(journal.keys() | now.keys()):
        old, new = journal.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} → {new!r}")
    return lines
