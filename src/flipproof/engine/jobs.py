"""Long work: jobs that any executor does in any order, each leaving one record in a journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from flipproof.engine.cluster import Client, Cluster
from flipproof.engine.executors import Executor, Processes, Serial, Work
from flipproof.engine.journal import Header, Journal, Key, Record, written
from flipproof.engine.progress import Step, progress_bar
from flipproof.errors import ConfigError

RecordT = TypeVar("RecordT", bound=Record)
HeaderT = TypeVar("HeaderT", bound=Header)


@contextmanager
def executor(work: Work[RecordT], workers: int, client: Client | None = None) -> Iterator[Executor[RecordT]]:
    """Where jobs run: here, in this many processes, or on the workers of a client.

    Raises:
        ConfigError: for fewer than one worker, for both workers and a client, or if the work cannot be given away.
    """
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    if client is None and workers == 1:
        yield Serial(work)
        return
    if client is not None and workers != 1:
        raise ConfigError(
            f"workers={workers} are processes of this machine, and client= has workers of its own: give one of the two"
        )
    if work.serial_only:
        asked = f"workers={workers}" if client is None else "client="
        raise ConfigError(f"{asked} cannot be had: {work.serial_only}")
    hands = Processes(work, workers) if client is None else Cluster(work, client)
    try:
        yield hands
    finally:
        hands.close()


class Crew(Generic[RecordT]):
    """Executor, journal and progress of one piece of work."""

    def __init__(
        self,
        pool: Executor[RecordT],
        journal: Journal[Any, RecordT] | None,
        step: Step,
        label: Callable[[Key], str],
    ) -> None:
        self._pool, self._journal, self._step, self._label = pool, journal, step, label

    def run(self, keys: Iterable[Key]) -> Iterator[RecordT]:
        """Each job once; records are written before they are given, in whatever order jobs end."""
        for record in self._pool.run(keys):
            if self._journal is not None:
                self._journal.append(record)
            yield record
            self._step(self._label(record.key))

    def skip(self, key: Key, jobs: int) -> None:
        """So many jobs, of which this is one, need not be done."""
        self._step(self._label(key), jobs)


@contextmanager
def crew(
    work: Work[RecordT],
    *,
    workers: int,
    client: Client | None = None,
    journal: Journal[Any, RecordT] | None,
    total: int,
    done: int,
    progress: bool | None,
    label: Callable[[Key], str],
) -> Iterator[Crew[RecordT]]:
    """Start workers and progress; stop them at the end, whatever happens.

    Args:
        work: what is done.
        workers: processes; 1 is this one.
        client: whose workers do it instead.
        journal: open for writing, or None.
        total: jobs in all.
        done: jobs that need not be done.
        progress: see `progress_bar`.
        label: what progress says of a job.

    Raises:
        ConfigError: if there cannot be so many workers.
    """
    with executor(work, workers, client) as pool, progress_bar(total, done, show=progress) as step:
        yield Crew(pool, journal, step, label)


def do_all(
    work: Work[RecordT],
    keys: Sequence[Key],
    header: HeaderT,
    journal: Journal[HeaderT, RecordT] | None,
    *,
    workers: int = 1,
    client: Client | None = None,
    progress: bool | None = None,
    label: Callable[[Key], str] | None = None,
    then: Callable[[RecordT], None] | None = None,
) -> dict[Key, RecordT]:
    """Do all jobs that the journal does not have yet.

    Args:
        work: what is done.
        keys: of all jobs.
        header: what the work is.
        journal: where records are kept; None keeps them in memory alone.
        workers: processes.
        client: whose workers do it instead.
        progress: see `progress_bar`.
        label: what progress says of a job; `work.describe` by default.
        then: called with each new record.

    Returns:
        The record of each key, in the order of the keys.

    Raises:
        JournalError: one of its kinds, if the journal cannot be used.
        InfrastructureError: if the machine fails more often than a retry mends.
    """
    with written(journal, header) as known:
        found: dict[Key, RecordT] = {record.key: record for record in known}
        missing = [key for key in keys if key not in found]
        if missing:
            with crew(
                work,
                workers=workers,
                client=client,
                journal=journal,
                total=len(keys),
                done=len(keys) - len(missing),
                progress=progress,
                label=label or work.describe,
            ) as hands:
                for record in hands.run(missing):
                    found[record.key] = record
                    if then is not None:
                        then(record)
    return {key: found[key] for key in keys}
