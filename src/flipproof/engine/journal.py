"""The journal: one JSON line a trial, appended as it ends, so that a campaign can be killed and resumed.

Line 1 is the header: schema, fingerprint of what is assessed, golden run, plan. Lines after it are trials, notes of a
resumption, or notes of a failed audit, before which no trial counts. A line without its newline was torn by a kill or a
full disk: it is dropped and the trial redone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flipproof.campaigns.record import Trial
from flipproof.errors import AuditError, JournalError, JournalLocked, JournalMismatch

SCHEMA = 1
PATIENCE = 1.5
"""Seconds to wait for the lock: workers of a killed campaign hold it until they notice, within half a second."""
_START = b'{"flipproof_journal":'


class Journal:
    """A campaign's file on disk.

    Args:
        path: the JSONL file; its folder is made if needed. `<path>.lock` beside it keeps other writers out.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None
        self.switched_off: frozenset[str] = frozenset()
        """Shortcuts that an audit of this campaign has found wrong; known while `writing`."""

    def read(self) -> tuple[dict[str, Any], list[Trial]]:
        """Header (with the latest plan) and every whole trial; a torn last line is passed over.

        Raises:
            JournalError: if the file is missing, unreadable or not a flipproof journal.
        """
        header, trials, _ = self._parse()
        return header, trials

    @contextmanager
    def writing(self, header: dict[str, Any]) -> Iterator[list[Trial]]:
        """Open for appending, creating or resuming; yields the trials that are already there.

        Raises:
            JournalLocked: if another process writes it.
            JournalMismatch: if it belongs to another campaign, with every differing field.
            JournalError: if it cannot be written or is not a journal.
        """
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

    def note_failed_audit(self, error: AuditError) -> None:
        """Write that an audit failed: the trials before this line count no more, and the shortcut is switched off."""
        self._write({"audit_failed": {"shortcut": error.shortcut, "point": error.point, "trial": error.trial}})

    def append(self, trial: Trial) -> None:
        """Write one trial, whole or not at all."""
        self._write(trial.to_json())

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

    def _create(self, header: dict[str, Any]) -> list[Trial]:
        self._write({"flipproof_journal": SCHEMA, **header})
        return []

    def _resume(self, header: dict[str, Any]) -> list[Trial]:
        found, trials, whole = self._parse()
        differences = _differences(found["fingerprint"], header["fingerprint"])
        if not differences:
            differences = _differences({"golden": found["golden"]}, {"golden": header["golden"]})
        if differences:
            raise JournalMismatch(
                f"{self.path} holds another campaign; nothing was changed. What differs (journal → now):\n  "
                + "\n  ".join(differences)
                + "\nResume with the same model, data and settings, or choose another journal="
            )
        descriptor = self._open()
        if os.fstat(descriptor).st_size > whole:
            os.ftruncate(descriptor, whole)
        if found["plan"] != header["plan"]:
            self._write({"resumed": True, "plan": header["plan"]})
        return trials

    def _parse(self) -> tuple[dict[str, Any], list[Trial], int]:
        """Header, trials, and the number of bytes in whole lines."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise JournalError(f"cannot read {self.path}: {error.strerror or error}") from error
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].splitlines()
        try:
            header = json.loads(lines[0])
            schema = header["flipproof_journal"]
        except (IndexError, ValueError, KeyError, TypeError):
            raise JournalError(
                f"{self.path} is not a flipproof journal (its first line is no header); nothing was changed"
            ) from None
        if schema != SCHEMA:
            raise JournalError(f"{self.path} has schema {schema}; this flipproof reads schema {SCHEMA}")
        trials: list[Trial] = []
        self.switched_off = frozenset()
        for number, line in enumerate(lines[1:], start=2):
            try:
                record = json.loads(line)
                if "resumed" in record:
                    header["plan"] = record["plan"]
                elif "audit_failed" in record:
                    trials.clear()
                    self.switched_off |= {str(record["audit_failed"]["shortcut"])}
                else:
                    trials.append(Trial.from_json(record))
            except (ValueError, KeyError, TypeError) as error:
                raise JournalError(
                    f"{self.path}, line {number}: not a trial record ({error}); the file was edited or damaged. "
                    f"Nothing was changed: remove that line to redo its trial"
                ) from None
        return header, trials, whole

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
                f"cannot write {self.path}: {error.strerror or error}. Every finished trial up to here is kept; "
                f"make room and run the same call again to resume"
            ) from error


def _differences(journal: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted(journal.keys() | now.keys()):
        old, new = journal.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} → {new!r}")
    return lines
