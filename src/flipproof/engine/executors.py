"""Where trials run: in this process, or in worker processes with one torch thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Protocol

import torch

from flipproof._interrupts import check
from flipproof.campaigns.record import Trial
from flipproof.campaigns.trial import TrialRunner
from flipproof.errors import ConfigError, InfrastructureError

Job = tuple[int, int]
"""(point, trial)."""

ATTEMPTS = 3
"""How often a trial is tried when the machine, not the model, fails."""


LISTENS_EVERY = 0.2
"""Seconds after which waiting for workers looks whether Ctrl-C was pressed."""


class Executor(Protocol):
    """Runs jobs and yields their trials in whatever order they end."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Trial]:
        """Each job once; a trial whose machine failed is tried again, and never becomes an outcome."""


class Serial:
    """This process."""

    def __init__(self, runner: TrialRunner) -> None:
        self._runner = runner

    def run(self, jobs: Iterable[Job]) -> Iterator[Trial]:
        """One after the other, in order."""
        for point, trial in jobs:
            yield _attempt(self._runner, point, trial)


def _attempt(runner: TrialRunner, point: int, trial: int) -> Trial:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return runner(point, trial)
        except InfrastructureError as error:
            if attempt == ATTEMPTS:
                raise InfrastructureError(f"point {point}, trial {trial}, failed {ATTEMPTS} times: {error}") from error
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            time.sleep(0.1 * attempt)
    raise AssertionError("unreachable")


_adopted: TrialRunner | None = None


def _adopt(runner: TrialRunner, parent: int) -> None:
    """Start of a worker: Ctrl-C is the parent's to handle, and a worker does not outlive it."""
    global _adopted
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    runner.wake()
    _adopted = runner
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(point: int, trial: int) -> Trial:
    assert _adopted is not None
    return _attempt(_adopted, point, trial)


class Processes:
    """Worker processes, each with its own copy of the model.

    On Linux they are forked, so model, data and metrics need not be picklable and unchanged memory is shared;
    elsewhere they are spawned. A worker that dies is replaced and what it was doing is done again.
    """

    def __init__(self, runner: TrialRunner, workers: int) -> None:
        self._runner = runner
        self._workers = workers
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        method = "fork" if sys.platform == "linux" else "spawn"
        context = multiprocessing.get_context(method)
        pool = ProcessPoolExecutor(
            self._workers, mp_context=context, initializer=_adopt, initargs=(self._runner, os.getpid())
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

    def run(self, jobs: Iterable[Job]) -> Iterator[Trial]:
        """Trials as they end; never more than two a worker are handed out ahead of time."""
        waiting = iter(jobs)
        retries: dict[Job, int] = {}
        pending: dict[Future[Trial], Job] = {}
        again: list[Job] = []
        while True:
            room = max(0, 2 * self._workers - len(pending) - len(again))
            handed_out, again = [*again, *islice(waiting, room)], []
            for job in handed_out:
                try:
                    pending[self._pool.submit(_work, *job)] = job
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

    def _replace(self, lost: list[Job], retries: dict[Job, int]) -> None:
        for job in lost:
            retries[job] = retries.get(job, 0) + 1
            if retries[job] >= ATTEMPTS:
                raise InfrastructureError(
                    f"a worker process died {ATTEMPTS} times around point {job[0]}, trial {job[1]} (killed, or out of "
                    f"memory?). Finished trials are kept: run again with fewer workers to resume"
                )
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = self._start()

    def close(self) -> None:
        """Stop the workers; trials under way end first."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def executor(runner: TrialRunner, workers: int) -> Iterator[Executor]:
    """The executor for this many workers.

    Raises:
        ConfigError: for fewer than one, or for several on a GPU.
    """
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    if workers == 1:
        yield Serial(runner)
        return
    if runner.device.type != "cpu":
        raise ConfigError(f"workers={workers} needs the CPU; on {runner.device} one process already fills the device")
    processes = Processes(runner, workers)
    try:
        yield processes
    finally:
        processes.close()
