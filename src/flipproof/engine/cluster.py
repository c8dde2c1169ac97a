"""Jobs done by the workers of a cluster: of a Dask client, or of anything like an executor of `concurrent.futures`.

The driver is the process that was called. It alone reads and writes the journal. It sends the work (model, data, cached
activations) to each worker once, then chunks of jobs that take a second or more, at most two for each worker at a time.
A worker does one chunk at a time. Before its first one it says which software it has, and answers the data without
faults: other software, or an answer that differs in one bit, and it is refused by name.

Jobs are functions of their keys alone. So a chunk that got lost, or that takes far longer than others, is given out
again, and the first answer counts.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import platform
import queue
import socket
import sys
import threading
import time
import traceback
import uuid
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from hashlib import blake2b
from importlib.machinery import PathFinder
from itertools import islice
from math import ceil, inf
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import fx, nn
from torch.nn.utils import parametrize

import flipproof
from flipproof._interrupts import check
from flipproof.engine.executors import ATTEMPTS, LISTENS_EVERY, Work, attempt
from flipproof.engine.journal import Key
from flipproof.errors import ConfigError, FlipproofWarning, InfrastructureError

T = TypeVar("T")

CHUNK = 1.0
"""Seconds that a chunk of jobs takes at least, where jobs are shorter: a task costs a scheduler about 10 kB."""

LARGEST = 1000
"""Jobs in a chunk at most."""

AHEAD = 2
"""Chunks given out for each worker: one that it does, and the next."""

STALLED = 60.0
"""Seconds, at least, after which a chunk is given out a second time; see `SLOWER`."""

SLOWER = 20.0
"""So many times as long as the slowest chunk so far, a chunk is thought to have stalled."""

CHECKED = 5.0
"""Seconds that a job may take to be done once more by the driver, to see that a worker does it alike."""

RETURNS = 300.0
"""Seconds for which a scheduler may be gone. Workers are waited for without end: a queue may hold them for hours."""


class Client(Protocol):
    """What `client=` takes: a `dask.distributed.Client`, or an executor as in `concurrent.futures`."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        """Have a function called by a worker; the future has `result`, `cancel` and `add_done_callback`."""


# What a worker does.


class _Refused(Exception):
    """This worker cannot do that work; the text says why."""


HELD = 2
"""Works that a worker keeps at a time: two drivers may share a cluster."""

_one_at_a_time = threading.Lock()
if hasattr(os, "register_at_fork"):  # a thread that held it is not there in the child

    def _free() -> None:
        global _one_at_a_time
        _one_at_a_time = threading.Lock()

    os.register_at_fork(after_in_child=_free)
_held: dict[str, Work[Any]] = {}


def software() -> dict[str, str]:
    """What has to be the same on all machines, and a digest of flipproof's own source."""
    return {
        "flipproof": f"{flipproof.__version__} ({_source()})",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


@cache
def _source() -> str:
    root, state = Path(__file__).parents[1], blake2b(digest_size=6)
    for path in sorted(root.rglob("*.py")):
        state.update(path.relative_to(root).as_posix().encode())
        state.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return state.hexdigest()


@dataclass(frozen=True)
class Modes:
    """Settings of a process or thread that change what torch computes.

    Attributes:
        flush: whether denormal numbers are taken for 0.
        dtype: of new tensors.
        precision: of float32 products.
        deterministic: whether only deterministic algorithms are used.
        mkldnn: whether oneDNN is.
        autocast: to which type products are cast on a CPU; None for none.
    """

    flush: bool
    dtype: torch.dtype
    precision: str
    deterministic: bool
    mkldnn: bool
    autocast: torch.dtype | None

    @classmethod
    def here(cls) -> Modes:
        """Of this thread."""
        cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        return cls(
            flush=bool(torch.tensor(1e-40, dtype=torch.float32) * 1 == 0),
            dtype=torch.get_default_dtype(),
            precision=torch.get_float32_matmul_precision(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            mkldnn=bool(torch.backends.mkldnn.enabled),
            autocast=cast,
        )

    def set(self) -> None:
        """Make them those of this thread."""
        torch.set_flush_denormal(self.flush)
        torch.set_default_dtype(self.dtype)
        if torch.get_float32_matmul_precision() != self.precision:
            torch.set_float32_matmul_precision(self.precision)
        if torch.are_deterministic_algorithms_enabled() != self.deterministic:
            torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.mkldnn.set_flags(self.mkldnn)  # type: ignore[no-untyped-call]
        torch.set_autocast_enabled("cpu", self.autocast is not None)
        if self.autocast is not None:
            torch.set_autocast_dtype("cpu", self.autocast)


def do_chunk(token: str, needed: dict[str, str], asked: Modes, sent: bytes | None, chunk: bytes) -> bytes:
    """In a worker: do a chunk of jobs, one after the other.

    Args:
        token: of the work.
        needed: the driver's `software`.
        asked: the driver's modes.
        sent: the work; None if this worker may have it already.
        chunk: pickled keys.

    Returns:
        A pickled `Answer`.
    """
    answer = Answer(_name())
    with _one_at_a_time:
        threads, modes = torch.get_num_threads(), Modes.here()
        torch.set_num_threads(1)
        asked.set()
        try:
            work = _held.get(token)
            if work is None:
                if sent is None:
                    answer.kind = "missing"
                    return pickle.dumps(answer)
                work = _unpacked(token, needed, sent)
            with torch.no_grad():  # as in the driver; every thread has a mode of its own
                began = time.perf_counter()
                for key in pickle.loads(chunk):
                    answer.records.append(attempt(work, key))
                    answer.seconds = time.perf_counter() - began
        except _Refused as refused:
            answer.kind, answer.why = "refused", str(refused)
        except Exception as error:
            answer.kind, answer.error = "failed", _portable(error)
        finally:
            torch.set_num_threads(threads)
            modes.set()
    return pickle.dumps(answer)


async def forget(token: str) -> None:
    """In a worker: let go of a work that is done."""
    _held.pop(token, None)


@dataclass
class Answer:
    """What became of a chunk.

    Attributes:
        worker: which did it.
        kind: "done"; "missing": the worker does not have the work; "refused": it cannot do it; "failed": a job raised.
        records: of the jobs that were done, in order.
        why: it was refused.
        error: that a job raised.
        seconds: that its jobs took.
    """

    worker: str
    kind: str = "done"
    records: list[Any] = field(default_factory=list)
    why: str = ""
    error: BaseException | None = None
    seconds: float = 0.0


def _unpacked(token: str, needed: dict[str, str], sent: bytes) -> Work[Any]:
    """The work, ready; what this worker had before is let go."""
    here = software()
    if others := [f"{name} {here[name]}, not {what}" for name, what in needed.items() if here[name] != what]:
        raise _Refused(f"has {'; '.join(others)}")
    while len(_held) >= HELD:
        del _held[next(iter(_held))]
    try:
        work: Work[Any] = torch.load(io.BytesIO(sent), weights_only=False, pickle_module=pickle)
    except (ImportError, AttributeError) as error:
        raise _Refused(f"cannot load the model, data or metrics: {type(error).__name__}: {error}") from error
    work.wake()
    if differs := work.differs():
        raise _Refused(
            f"answers otherwise than the driver without any fault ({differs}), so its records would be others; it is a "
            f"{platform.processor() or platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
        )
    _held[token] = work
    return work


def _name() -> str:
    """Of this worker: its address in Dask, else host and process."""
    if "distributed.worker" in sys.modules:
        from distributed.worker import get_worker

        try:
            return str(get_worker().address)
        except ValueError:  # Dask is only imported here
            pass
    return f"{socket.gethostname()}, process {os.getpid()}"


def _portable(error: Exception) -> Exception:
    """An exception that can be sent, with where it was raised."""
    place = f"on worker {_name()}:\n{''.join(traceback.format_exception(error))}"
    error.__traceback__ = error.__cause__ = error.__context__ = None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does when it is pickled
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(place)
    return error


# What the driver does.


@dataclass(eq=False)
class _Chunk:
    """Jobs that were given out together.

    Attributes:
        keys: of the jobs.
        lost: how often it came back undone.
        futures: of it that are under way.
        since: when it was given out last.
    """

    keys: list[Key]
    lost: int = 0
    futures: list[Any] = field(default_factory=list)
    since: float = 0.0


class _Hands(Protocol):
    """How chunks get to workers."""

    def give(self, chunk: bytes, *, whole: bool) -> Any:
        """The future of a chunk; `whole` sends the work with it to a worker that lacks it."""

    def workers(self, seen: int) -> int:
        """How many workers there are, of which so many were heard of."""

    def excuse(self, error: BaseException, jobs: str) -> bool:
        """Whether these jobs are only lost, and can be given again; brings back what can be brought back.

        Raises:
            InfrastructureError: if nothing can be given any more.
        """

    def suspect(self, future: Any) -> str:
        """Who has had this chunk for so long: no more is given to it. "" if that is not known."""

    def close(self) -> None:
        """Let workers forget the work."""


class Cluster(Generic[T]):
    """The workers of a client."""

    def __init__(self, work: Work[T], client: Client) -> None:
        self._work = work
        self._hands: _Hands
        about = (uuid.uuid4().hex, software(), Modes.here())
        kind = _Dask if _is_dask(client) else _Futures
        self._hands = kind(client, about, packed(work))
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._under_way: dict[Any, _Chunk] = {}
        self._again: deque[_Chunk] = deque()
        self._seen: set[str] = set()
        self._lacking = 0
        self._each = 0.0
        self._slowest = 0.0
        self._vouched: set[str] = set()
        self._checking = 0.0
        self._began = time.monotonic()

    def run(self, jobs: Iterable[Key]) -> Iterator[T]:
        """Records as chunks end."""
        waiting = iter(jobs)
        while True:
            self._give_out(waiting)
            if not self._under_way:
                return
            check()
            try:
                future = self._ended.get(timeout=LISTENS_EVERY)
            except queue.Empty:
                self._look_for_stalled()
                continue
            chunk = self._under_way.pop(future, None)
            if chunk is not None:  # else another worker had done it before
                chunk.futures.remove(future)
                yield from self._taken(future, chunk)

    def _give_out(self, waiting: Iterator[Key]) -> None:
        under_way = len({id(chunk) for chunk in self._under_way.values()})
        free = AHEAD * max(1, self._hands.workers(len(self._seen))) - under_way
        while self._again and free > 0:
            self._give(self._again.popleft())
            free -= 1
        if free <= 0:
            return
        size = min(LARGEST, ceil(CHUNK / self._each)) if self._each else 1
        keys = list(islice(waiting, free * size))
        size = max(1, min(size, ceil(len(keys) / free)))
        for first in range(0, len(keys), size):
            self._give(_Chunk(keys[first : first + size]))

    def _give(self, chunk: _Chunk) -> None:
        whole, self._lacking = self._lacking > 0, max(0, self._lacking - 1)
        try:
            future = self._hands.give(pickle.dumps(chunk.keys), whole=whole)
        except OSError as error:
            if not self._hands.excuse(error, self._work.describe(chunk.keys[0])):
                raise
            self._again.append(chunk)
            return
        chunk.since = time.monotonic()
        chunk.futures.append(future)
        self._under_way[future] = chunk
        future.add_done_callback(self._ended.put)

    def _taken(self, future: Any, chunk: _Chunk) -> Iterator[T]:
        """What an answer brings; what was not done is given out again."""
        try:
            answer: Answer = pickle.loads(future.result())
        except BaseException as error:
            if not self._hands.excuse(error, self._work.describe(chunk.keys[0])):
                raise
            self._lost(chunk, error)
            return
        self._seen.add(answer.worker)
        done = [record.key for record in answer.records]
        if done != chunk.keys[: len(done)] or (answer.kind == "done" and len(done) < len(chunk.keys)):
            raise InfrastructureError(
                f"{answer.worker} was given {len(chunk.keys)} jobs, from {self._work.describe(chunk.keys[0])} on, and "
                f"answers {len(done)}{f', from {done[0]} on' if done else ''}: client= mixes up or shortens answers. "
                f"Nothing of this one was kept; finished jobs are"
            )
        if answer.kind == "missing":
            self._lacking += 1
            self._again.append(chunk)
            return
        if answer.kind == "refused":
            raise ConfigError(
                f"the worker {answer.worker} {answer.why}. Give it the same software and processor as here, or take it "
                f"out of the cluster. Finished jobs are kept: run again to resume"
            )
        for other in chunk.futures:
            del self._under_way[other]
            other.cancel()
        chunk.futures.clear()
        self._slowest = max(self._slowest, time.monotonic() - chunk.since)
        if answer.records:
            self._check(answer, chunk.keys[0])
            each = answer.seconds / len(answer.records)
            self._each = 0.7 * self._each + 0.3 * each if self._each else each
        chunk.keys = chunk.keys[len(answer.records) :]
        yield from answer.records
        if isinstance(answer.error, InfrastructureError):
            self._lost(chunk, answer.error)
        elif answer.error is not None:
            raise answer.error

    def _check(self, answer: Answer, key: Key) -> None:
        """Do the first job of a worker here too, if that costs little: whatever was lost on the way shows.

        Raises:
            ConfigError: if the records differ.
        """
        if answer.worker in self._vouched or answer.seconds / len(answer.records) > CHECKED:
            return
        began = time.monotonic()
        if self._vouched and self._checking > (began - self._began) / 50:
            return
        self._vouched.add(answer.worker)
        with _one_at_a_time:  # the worker may be a thread of this process
            ours = _said(attempt(self._work, key))
        theirs = _said(answer.records[0])
        self._checking += time.monotonic() - began
        if differ := [name for name in ours if ours[name] != theirs.get(name)]:
            raise ConfigError(
                f"the worker {answer.worker} leaves another record of {self._work.describe(key)} than this process: "
                f"{', '.join(f'{name} {theirs.get(name)}, not {ours[name]}' for name in differ[:3])}. Its processor or "
                f"libraries compute otherwise, or the model depends on something that was not sent. Nothing of it was "
                f"kept"
            )

    def _lost(self, chunk: _Chunk, error: BaseException) -> None:
        """Given out again, unless another worker is at it, or it was lost too often."""
        chunk.lost += 1
        if chunk.futures:
            return
        if chunk.lost >= ATTEMPTS:
            raise InfrastructureError(
                f"{self._work.describe(chunk.keys[0])} was lost {chunk.lost} times ({type(error).__name__}: {error}). "
                f"Finished jobs are kept: run again to resume"
            ) from error
        self._again.append(chunk)

    def _look_for_stalled(self) -> None:
        if not self._slowest:
            return
        limit = max(STALLED, SLOWER * self._slowest)
        for future, chunk in [*self._under_way.items()]:
            took = time.monotonic() - chunk.since
            if took <= limit or len(chunk.futures) >= ATTEMPTS:
                continue
            worker = self._hands.suspect(future)
            warnings.warn(
                f"{self._work.describe(chunk.keys[0])} has taken {took:.0f} s"
                f"{f' on worker {worker}' if worker else ''}, and nothing before it more than {self._slowest:.1f} s: "
                f"it is given to another worker as well, and the first answer counts",
                FlipproofWarning,
                stacklevel=2,
            )
            self._give(chunk)

    def close(self) -> None:
        """Take back what was not begun, and let workers forget."""
        for future in self._under_way:
            future.cancel()
        self._under_way.clear()
        self._hands.close()


def _said(record: Any) -> dict[str, str]:
    """What a record says, time aside."""
    return {name: json.dumps(value) for name, value in record.to_json().items() if name != "seconds"}


class _Futures:
    """An executor as in `concurrent.futures`. Whose worker takes a task is not known before it answers."""

    def __init__(self, client: Any, about: tuple[str, dict[str, str], Modes], sent: bytes) -> None:
        self._client, self._about, self._sent = client, about, sent

    def give(self, chunk: bytes, *, whole: bool) -> Any:
        try:
            return self._client.submit(do_chunk, *self._about, self._sent if whole else None, chunk)
        except RuntimeError as error:  # broken, or shut down
            raise self._gone(error) from error

    def workers(self, seen: int) -> int:
        given = getattr(self._client, "_max_workers", None)
        return given if isinstance(given, int) else seen + 1

    def excuse(self, error: BaseException, jobs: str) -> bool:
        if not isinstance(error, KeyboardInterrupt):
            raise self._gone(error) from error
        return False

    def _gone(self, error: BaseException) -> InfrastructureError:
        return InfrastructureError(
            f"the executor given as client= can do no more ({type(error).__name__}: {error}). Finished jobs are kept: "
            f"run again with a new one to resume"
        )

    def suspect(self, future: Any) -> str:
        return ""

    def close(self) -> None:
        """Processes hold their copy until they get other work, or end."""
        _held.pop(self._about[0], None)  # threads of this process


class _Dask:
    """A `dask.distributed.Client`."""

    def __init__(self, client: Any, about: tuple[str, dict[str, str], Modes], sent: bytes) -> None:
        self._client, self._about, self._sent = client, about, sent
        if client.asynchronous:
            raise ConfigError("client= takes a distributed.Client(…) that is not asynchronous")
        self._suspects: set[str] = set()
        self._looked = -inf
        self._count = 0
        self._there = self._scattered()

    def _scattered(self) -> Any:
        """The work on every worker that there is now; others fetch it from these."""
        self._wait_for_workers()
        self._refuse_others()
        several = {worker: threads for worker, threads in self._client.nthreads().items() if threads > 1}
        if several:
            warnings.warn(
                f"a worker does one job at a time, since a model is changed in place: {len(several)} of the "
                f"{sum(several.values())} threads of {len(several)} workers are used. Start workers with one thread "
                f"each (dask worker --nthreads 1 --nworkers N; LocalCluster(threads_per_worker=1))",
                FlipproofWarning,
                stacklevel=2,
            )
        return self._client.scatter(self._sent, broadcast=True, hash=False)

    def _refuse_others(self) -> None:
        """Refuse workers with other software by name, before any of them loads anything."""
        found = self._client.get_versions(packages=["flipproof", "torch", "numpy"])
        own = _versions(found["client"])
        for worker, facts in found["workers"].items():
            has = _versions(facts)
            others = [
                f"{name} {has[name] or 'not at all'}, not {version}"
                for name, version in own.items()
                if facts is not None and has[name] != version
            ]
            if others:
                raise ConfigError(
                    f"the worker {worker} has {'; '.join(others)}. Install the same there, or take it out of the "
                    f"cluster. Nothing was given to it"
                )

    def _wait_for_workers(self) -> None:
        if self._client.nthreads():
            return
        self._say_that_none_is_there()
        asked = self._client.submit(os.getpid, pure=False)  # a cluster that scales by itself waits for this
        while not self._client.nthreads():
            check()
            time.sleep(LISTENS_EVERY)
        asked.release()

    def _say_that_none_is_there(self) -> None:
        warnings.warn(
            f"the scheduler {self._client.scheduler.address} has no worker: waiting for one. Ctrl-C ends that, and "
            f"finished jobs are kept",
            FlipproofWarning,
            stacklevel=2,
        )

    def _wait_for_scheduler(self) -> None:
        """For `RETURNS` seconds.

        Raises:
            InfrastructureError: if it does not come back.
        """
        until = time.monotonic() + RETURNS
        while self._client.status != "running":
            if time.monotonic() > until or self._client.status in ("closing", "closed"):
                raise InfrastructureError(
                    "the scheduler has gone and did not come back. Finished jobs are kept: run again to resume"
                )
            check()
            time.sleep(LISTENS_EVERY)

    def give(self, chunk: bytes, *, whole: bool) -> Any:
        self._wait_for_scheduler()
        restricted: dict[str, Any] = {}
        if self._suspects and (others := [one for one in self._client.nthreads() if one not in self._suspects]):
            restricted = {"workers": others, "allow_other_workers": True}
        name = f"flipproof-{uuid.uuid4().hex}"
        return self._client.submit(do_chunk, *self._about, self._there, chunk, pure=False, key=name, **restricted)

    def workers(self, seen: int) -> int:
        if time.monotonic() - self._looked > 2 and self._client.status == "running":
            before, there = self._count, set(self._client.nthreads())
            self._count = len(there - self._suspects)
            self._looked = time.monotonic()
            if before and not there:
                self._say_that_none_is_there()
        return self._count

    def excuse(self, error: BaseException, jobs: str) -> bool:
        from distributed.scheduler import KilledWorker

        if isinstance(error, KilledWorker):
            raise InfrastructureError(
                f"several workers died around {jobs} ({error}). Finished jobs are kept: run again to resume"
            ) from error
        if isinstance(error, (ImportError, AttributeError, pickle.UnpicklingError)):
            self._refuse_others()  # one that came later
            return False
        if not (isinstance(error, (OSError, TimeoutError)) or "Cancelled" in type(error).__name__):
            return False
        self._wait_for_scheduler()
        if self._there.status in ("cancelled", "lost", "error"):
            self._there = self._scattered()
        return True

    def suspect(self, future: Any) -> str:
        for worker, keys in self._client.processing().items():
            if future.key in keys:
                self._suspects.add(worker)
                return str(worker)
        return ""

    def close(self) -> None:
        if self._client.status == "running":
            self._there.release()
            there = [worker for worker in self._client.nthreads() if worker not in self._suspects]
            self._client.run(forget, self._about[0], workers=there, wait=False, on_error="ignore")


def _versions(facts: Any) -> dict[str, str | None]:
    """Out of what `distributed.Client.get_versions` says of one process."""
    facts = facts or {"packages": {}, "host": {}}
    names = ("flipproof", "torch", "numpy")
    python = str(facts["host"].get("python", "")).split(".")[:2]
    return {name: facts["packages"].get(name) for name in names} | {"python": ".".join(python)}


def _is_dask(client: object) -> bool:
    """Whether it is a Dask client, without importing Dask for that.

    Raises:
        ConfigError: if it cannot be given work at all.
    """
    distributed = sys.modules.get("distributed")
    if distributed is not None and isinstance(client, distributed.Client):
        return True
    if not callable(getattr(client, "submit", None)):
        raise ConfigError(
            f"client= takes a distributed.Client or an executor with submit(), as in concurrent.futures, got {client!r}"
        )
    return False


def packed(work: Work[Any]) -> bytes:
    """The work as bytes: tensors that share memory go on sharing it, and what this project defines goes along by value.

    Raises:
        ConfigError: naming what cannot be sent.
    """
    try:
        import cloudpickle
    except ImportError:
        cloudpickle, own = None, []
    else:
        own = [module for module in [*sys.modules.values()] if _not_installed(module)]
    file, pickling = io.BytesIO(), _Pickling(cloudpickle or pickle)
    try:
        with _packing:
            own = [module for module in own if module.__name__ not in cloudpickle.list_registry_pickle_by_value()]
            try:
                for module in own:
                    cloudpickle.register_pickle_by_value(module)
                torch.save(work, file, pickle_module=pickling, pickle_protocol=5)
            finally:
                for module in own:
                    cloudpickle.unregister_pickle_by_value(module)
        pickling.check_arrays()
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        hint = "" if cloudpickle else ". With the package cloudpickle, functions written in place can be sent too"
        raise ConfigError(
            f"client= sends model, data, metrics and output to other processes, and something in them cannot be sent: "
            f"{type(error).__name__}: {error}{hint}"
        ) from error
    return file.getvalue()


_packing = threading.Lock()
"""What is pickled by value is the whole process's affair."""


class _Pickling:
    """A pickle module for models.

    Parametrised modules, which PyTorch does not pickle, are taken apart and put together again. Traced models that come
    back as others are refused: `torch.fx` traces them anew.
    """

    def __init__(self, module: Any) -> None:
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._tensors: list[tuple[str, torch.Tensor]] = []
        outer = self

        class Pickler(module.Pickler):  # type: ignore[misc]
            def reducer_override(self, obj: Any) -> Any:
                if isinstance(obj, np.ndarray) and obj.size:
                    outer._arrays.append(obj)
                if isinstance(obj, nn.Module):
                    held = [*obj._parameters.items(), *obj._buffers.items()]
                    outer._tensors += [(name, tensor) for name, tensor in held if tensor is not None]
                if isinstance(obj, fx.GraphModule):
                    _check_traced(obj)
                elif isinstance(obj, nn.Module) and any(isinstance(v, torch.ScriptObject) for v in vars(obj).values()):
                    return _bare, (type(obj),), dict(vars(obj)), None, None, _filled  # what torch.ao's own way forgets
                if isinstance(obj, MethodType) and isinstance(obj.__func__, partial):  # as torchao prints its layers
                    return MethodType, (obj.__func__, obj.__self__)
                if isinstance(obj, nn.Module) and parametrize.is_parametrized(obj):
                    plain = parametrize.type_before_parametrizations(obj)
                    state = {name: value for name, value in vars(obj).items() if name != "_flat_weight_refs"}
                    return _bare, (plain,), state, None, None, _parametrised
                found = getattr(super(), "reducer_override", None)
                return NotImplemented if found is None else found(obj)

        self.Pickler = Pickler
        self.__name__ = module.__name__

    def check_arrays(self) -> None:
        """Refuse NumPy arrays over the memory of a parameter or buffer: they would no longer share it.

        Raises:
            PicklingError: naming the tensor.
        """
        for name, tensor in self._tensors:
            if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.numel():
                continue
            memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
            for array in self._arrays:
                if np.may_share_memory(array, memory):
                    raise pickle.PicklingError(
                        f"a NumPy array of shape {array.shape} lies in the memory of {name!r}, and would no longer do "
                        f"so where it arrives: faults would not reach it. Read the tensor instead"
                    )


def _bare(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _filled(module: nn.Module, attributes: dict[str, Any]) -> None:
    vars(module).update(attributes)


def _parametrised(module: nn.Module, attributes: dict[str, Any]) -> None:
    """Make of a bare module the parametrised one that had these attributes."""
    vars(module).update(attributes)
    if isinstance(module, nn.RNNBase):  # which keeps weak references to its weights, and those cannot be sent
        held = module._flat_weights
        module._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in held]
    parametrize._inject_new_class(module)
    for name in module.parametrizations:  # type: ignore[union-attr]
        parametrize._inject_property(module, name)


def _check_traced(module: fx.GraphModule) -> None:
    made, arguments = module.__reduce__()[:2]
    steps = [[(node.op, str(node.target)) for node in one.graph.nodes] for one in (module, made(*arguments))]
    if steps[0] != steps[1]:
        raise pickle.PicklingError(
            f"a traced model ({type(module).__name__}) is traced anew where it arrives, and comes out otherwise: a "
            f"buffer that it reads becomes a constant, which faults would not reach. Pass the module that was traced"
        )


def _not_installed(module: ModuleType) -> bool:
    """Whether other machines can hardly have it: a file of the user's project, or one that was loaded by its path."""
    name, file = getattr(module, "__name__", ""), getattr(module, "__file__", None)
    if file is None or "." in name or name in ("__main__", "flipproof"):
        return False
    path = Path(file).resolve()
    if path.is_relative_to(sys.prefix) or path.is_relative_to(sys.base_prefix):
        return False
    here = [Path.cwd(), *(Path(p).resolve() for p in [getattr(sys.modules["__main__"], "__file__", None)] if p)]
    if any(path.is_relative_to(place if place.is_dir() else place.parent) for place in here):
        return True
    found = PathFinder.find_spec(name)
    return found is None or found.origin is None or Path(found.origin).resolve() != path
