"""Where jobs run: in this process, or in worker processes with one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

from flipproof._interrupts import check
from flipproof.engine.journal import Key
from flipproof.errors import ConfigError, InfrastructureError

R = TypeVar("R", covariant=True)
"""What a job leaves."""
T = TypeVar("T")


class Work(Protocol[R]):
    """What is done job by job. Executors call it; with worker processes each holds a copy."""

    @property
    def serial_only(self) -> str:
        """Why it cannot be given to worker processes; "" if it can."""

    def __call__(self, *key: Any) -> R:
        """Do one job: a function of its key alone."""

    def describe(self, key: Key) -> str:
        """The job in words, for messages: ``point 0, trial 3``."""

    def wake(self) -> None:
        """In a worker process, once, before the first job."""

    def differs(self) -> str:
        """On another machine, after waking: how it answers otherwise without faults, bit by bit; "" if it does not."""

    def recover(self) -> None:
        """After the machine failed, before the job is tried again: give memory back."""


@runtime_checkable
class Shared(Work[R], Protocol[R]):
    """Work of which several jobs are done at once, in this process."""

    @property
    def together(self) -> int:
        """How many."""

    def many(self, keys: Sequence[Key]) -> Sequence[R]:
        """Do so many jobs or fewer; what each leaves depends on its own key alone."""


ATTEMPTS = 3
"""How often a job is tried when the machine, not the model, fails."""


LISTENS_EVERY = 0.2
"""Seconds after which waiting for workers looks whether Ctrl-C was pressed."""


class Executor(Protocol[R]):
    """Runs jobs and yields what they leave, in whatever order they end."""

    def run(self, jobs: Iterable[Key]) -> Iterator[R]:
        """Each job once; a job whose machine failed is tried again, and never becomes a record."""


class Serial(Generic[T]):
    """This process."""

    def __init__(self, work: Work[T]) -> None:
        self._work = work

    def run(self, jobs: Iterable[Key]) -> Iterator[T]:
        """One after the other, in order; of work that is shared, as many at once as it says."""
        work, waiting = self._work, iter(jobs)
        if isinstance(work, Shared):
            while keys := list(islice(waiting, work.together)):
                yield from _attempt(work, keys[0], partial(work.many, keys))
            return
        for key in waiting:
            yield attempt(work, key)


def attempt(work: Work[T], key: Key) -> T:
    """Do a job, again if the machine fails.

    Raises:
        InfrastructureError: if it fails `ATTEMPTS` times.
    """
    return _attempt(work, key, partial(work, *key))


def _attempt(work: Work[Any], key: Key, do: Callable[[], T]) -> T:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return do()
        except InfrastructureError as error:
            if attempt == ATTEMPTS:
                raise InfrastructureError(f"{work.describe(key)}, failed {ATTEMPTS} times: {error}") from error
            work.recover()
            time.sleep(0.1 * attempt)
    raise AssertionError("unreachable")


_adopted: Work[Any] | None = None


def _adopt(work: Work[Any], parent: int) -> None:
    """Start of a worker: Ctrl-C is the parent's to handle, and a worker does not outlive it.

    It has one torch thread: the others of the parent were not forked, and an operator would wait for them for ever.
    """
    global _adopted
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    work.wake()
    _adopted = work
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _do(*key: Any) -> Any:
    assert _adopted is not None
    with torch.no_grad():  # as in the parent, also where processes are spawned
        return attempt(_adopted, key)


class Processes(Generic[T]):
    """Worker processes, each with its own copy of the model.

    On Linux they are forked, so model, data and metrics need not be picklable and unchanged memory is shared;
    elsewhere they are spawned. A worker that dies is replaced and what it was doing is done again.
    """

    def __init__(self, work: Work[T], workers: int) -> None:
        self._work = work
        self._workers = workers
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        method = "fork" if sys.platform == "linux" else "spawn"
        context = multiprocessing.get_context(method)
        pool = ProcessPoolExecutor(
            self._workers, mp_context=context, initializer=_adopt, initargs=(self._work, os.getpid())
        )
        with warnings.catch_warnings():
            # Python 3.12 warns of forking with threads about; the children use one torch thread and no lock of ours
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                pool.submit(os.getpid).result()
            except (BrokenProcessPool, AttributeError, TypeError) as error:
                raise ConfigError(
                    f"worker processes could not start ({error}); with the start method '{method}' the model, data and "
                    f"metrics must be picklable (no lambdas). Use workers=1"
                ) from error
        return pool

    def run(self, jobs: Iterable[Key]) -> Iterator[T]:
        """Records as jobs end; never more than two a worker are handed out ahead of time."""
        waiting = iter(jobs)
        retries: dict[Key, int] = {}
        pending: dict[Future[T], Key] = {}
        again: list[Key] = []
        while True:
            room = max(0, 2 * self._workers - len(pending) - len(again))
            handed_out, again = [*again, *islice(waiting, room)], []
            for job in handed_out:
                try:
                    pending[self._pool.submit(_do, *job)] = job
                except BrokenProcessPool:
                    again.append(job)
            if not pending and not again:
                return
            check()
            for future in wait(pending, LISTENS_EVERY, FIRST_COMPLETED).done if pending else ():
                job = pending.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    again.append(job)
            if again:
                again += pending.values()
                pending.clear()
                self._replace(again, retries)

    def _replace(self, lost: list[Key], retries: dict[Key, int]) -> None:
        for job in lost:
            retries[job] = retries.get(job, 0) + 1
            if retries[job] >= ATTEMPTS:
                raise InfrastructureError(
                    f"a worker process died {ATTEMPTS} times around {self._work.describe(job)} (killed, or out of "
                    f"memory?). Finished jobs are kept: run again with fewer workers to resume"
                )
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = self._start()

    def close(self) -> None:
        """Stop the workers; jobs under way end first."""
        self._pool.shutdown(wait=True, cancel_futures=True)
