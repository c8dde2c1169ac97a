"""The journal: JSON lines of finished jobs, appended as they end, so that long work can be killed and resumed.

Line 1 is the header: what is worked on, and how it is told from anything else. Lines after it are records, or several
of them packed together, where jobs end faster than one a second; notes of a resumption with another plan; or notes of a
failed audit, before which no record counts. A line without its newline was torn by a kill or a full disk: it is dropped
and its jobs done again. docs/journal.md has the format.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from filelock import FileLock, Timeout

from flipproof.errors import AuditError, JournalError, JournalLocked, JournalMismatch

Key = tuple[int | str, ...]
"""Names a job: its record carries it."""

SCHEMA = 2
_READ = (1, 2)
"""Schemas that are read: 1 had no packed lines."""

EVERY = 1.0
"""Seconds: records that end so soon behind the last line wait for the first that ends later. A kill loses those."""
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


class Store(Protocol[RecordT]):
    """Where the records of a journal are kept that packs several into a line, `most` at most."""

    most: int

    def append(self, record: RecordT, /) -> None:
        """One more."""

    def clear(self) -> None:
        """Forget all of them."""

    def pack(self, records: Sequence[RecordT], /) -> dict[str, Any]:
        """Some records as one line, with their number as its field ``packed``."""

    def unpack(self, line: dict[str, Any], /) -> None:
        """Add those of a line; raises KeyError, TypeError or ValueError if it cannot be one."""

    def move(self, header: Any, /) -> None:
        """The header is another one from now on: records go where it has them."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[RecordT]: ...


class Journal(Generic[HeaderT, RecordT]):
    """A file on disk that keeps what was done.

    Args:
        path: the JSONL file; its folder is made if needed. `<path>.lock` beside it keeps other writers out.
        header: class of the first line.
        record: class of the lines after it.
        kind: of work, so that a journal of one verb is not taken for that of another.
        check: holds a record that was read against the header, and raises ValueError if it cannot be of this work.
        store: makes what records are read into, which packs several into a line; None for a list, and a line a record.
        extend: (the header that is there, the one of now) → the first one, made to hold what the second one has more.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: type[HeaderT],
        record: type[RecordT],
        *,
        kind: str = CAMPAIGN,
        check: Callable[[HeaderT, RecordT], None] | None = None,
        store: Callable[[HeaderT], Store[RecordT]] | None = None,
        extend: Callable[[HeaderT, HeaderT], HeaderT] | None = None,
    ) -> None:
        self.path = Path(path)
        self.kind = kind
        self._header, self._record, self._check = header, record, check
        self._store, self._extend = store, extend
        self._descriptor: int | None = None
        self._packing: Store[RecordT] | None = None
        self._waiting: list[RecordT] = []
        self._written = 0.0
        self.switched_off: frozenset[str] = frozenset()
        """Shortcuts that an audit has found wrong; known once the journal was read."""

    def read(self) -> tuple[HeaderT, Any]:
        """Header (with the latest plan) and every whole record; a torn last line is passed over.

        Raises:
            JournalError: if the file is missing, unreadable or not a journal of this kind.
        """
        header, records, _ = self._parse()
        return header, records

    @contextmanager
    def writing(self, header: HeaderT) -> Iterator[Any]:
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
            self._packing = None if self._store is None else done
            try:
                yield done
                self.flush()
            except BaseException:
                with suppress(JournalError):  # what fails says more than that this fails too
                    self.flush()
                raise
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
        self._waiting.clear()
        self._write({"audit_failed": {"shortcut": error.shortcut, "point": error.point, "trial": error.trial}})

    def append(self, record: RecordT) -> None:
        """Write one record, whole or not at all; one that is packed waits for others, see `EVERY`."""
        if self._packing is None:
            self._write(record.to_json())
            return
        self._waiting.append(record)
        if len(self._waiting) >= self._packing.most or time.monotonic() - self._written >= EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        waiting = self._waiting
        if waiting and self._packing is not None:
            self._write(waiting[0].to_json() if len(waiting) == 1 else self._packing.pack(waiting))
        self._waiting = []
        self._written = time.monotonic()

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

    def _create(self, header: HeaderT) -> Any:
        kind = {} if self.kind == CAMPAIGN else {"kind": self.kind}
        self._write({"flipproof_journal": SCHEMA, **kind, **header.to_json()})
        return self._empty(header)

    def _empty(self, header: HeaderT) -> Any:
        return [] if self._store is None else self._store(header)

    def _resume(self, header: HeaderT) -> Any:
        there, records, whole = self._parse()
        found = there if self._extend is None else self._extend(there, header)
        for was, now in zip(found.identity, header.identity, strict=True):
            if apart := differences(was, now):
                raise JournalMismatch(
                    f"{self.path} holds another {self.kind}; nothing was changed. What differs (journal → now):\n  "
                    + "\n  ".join(apart)
                    + "\nResume with the same model, data and settings, or choose another journal="
                )
        descriptor = self._open()
        if os.fstat(descriptor).st_size > whole:
            os.ftruncate(descriptor, whole)
        note = {} if found.plan == header.plan else {"plan": header.to_json()["plan"]}
        if found is not there:
            before, after = there.to_json(), found.to_json()
            note |= {name: value for name, value in after.items() if name != "plan" and before[name] != value}
        if note:
            self._write({"resumed": True, **note})
        if found is not there:
            records.move(found)
        return records

    def _parse(self) -> tuple[HeaderT, Any, int]:
        """Header, records, and the number of bytes in whole lines."""
        self._refuse_folder()
        whole = 0
        try:
            with self.path.open("rb") as file:
                line = file.readline()
                raw = self._first(line)
                header = self._header_in(raw)
                records = self._empty(header)
                switched_off: set[str] = set()
                whole = len(line)
                for number, line in enumerate(file, start=2):
                    if not line.endswith(b"\n"):
                        break
                    header = self._take(line, number, raw, header, records, switched_off)
                    whole += len(line)
        except OSError as error:
            raise JournalError(f"cannot read {self.path}: {error.strerror or error}") from error
        self.switched_off = frozenset(switched_off)
        return header, records, whole

    def _header_in(self, raw: dict[str, Any]) -> HeaderT:
        try:
            return self._header.from_json(raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JournalError(
                f"{self.path}, line 1: not the header of a {self.kind} ({type(error).__name__}: {error}); the file was "
                f"edited or damaged. Nothing was changed"
            ) from None

    def _take(
        self, line: bytes, number: int, raw: dict[str, Any], header: HeaderT, records: Any, switched_off: set[str]
    ) -> HeaderT:
        """One line after the first; the header from there on."""
        try:
            found = json.loads(line)
            if "resumed" in found:
                changed = {name: value for name, value in found.items() if name != "resumed"}
                if foreign := sorted(changed.keys() - {"plan", "points", "fingerprint"}):
                    raise ValueError(f"a resumption cannot change {foreign[0]}")
                raw |= changed
                later = self._header.from_json(raw)
                if self._store is not None:
                    records.move(later)
                return later
            if "audit_failed" in found:
                records.clear()
                switched_off.add(str(found["audit_failed"]["shortcut"]))
            elif "packed" in found and self._store is not None:
                records.unpack(found)
            else:
                record = self._record.from_json(found)
                if self._check is not None:
                    self._check(header, record)
                records.append(record)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise JournalError(
                f"{self.path}, line {number}: not a record of a {self.kind} ({error}); the file was edited or "
                f"damaged. Nothing was changed: remove that line to do its job again"
            ) from None
        return header

    def _first(self, line: bytes) -> dict[str, Any]:
        try:
            raw: dict[str, Any] = json.loads(line if line.endswith(b"\n") else b"")
            schema, kind = raw.pop("flipproof_journal"), raw.pop("kind", CAMPAIGN)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise JournalError(
                f"{self.path} is not a flipproof journal (its first line is no header); nothing was changed"
            ) from None
        if schema not in _READ:
            raise JournalError(f"{self.path} has schema {schema}; this flipproof reads schemas {_READ[0]} to {SCHEMA}")
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
                f"cannot write {self.path}: {error.strerror or error}. Every finished job up to here is kept"
                f"{', but for the last second' if len(self._waiting) > 1 else ''}; make room and run the same call "
                f"again to resume"
            ) from error


def written(journal: Journal[HeaderT, RecordT] | None, header: HeaderT) -> AbstractContextManager[Any]:
    """`journal.writing(header)`; without a journal nothing is known and nothing is kept."""
    return nullcontext([]) if journal is None else journal.writing(header)


def differences(journal: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line a field that differs."""
    lines = []
    for key in sorted(journal.keys() | now.keys()):
        old, new = journal.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} → {new!r}")
    return lines
