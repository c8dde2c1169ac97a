from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.errors import ConfigError, InfrastructureError
from flipproof.running.evaluation import is_infrastructure

CALLS = [itertools.count()]


class Failing(nn.Module):
    """Raises `error` in the calls named, counting from 0; two are the golden run's."""

    def __init__(self, error: Exception, calls: set[int]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(4, 3)
        CALLS[0] = itertools.count()  # outside the model, whose state is put back after every batch
        self.error, self.failing = error, calls

    def forward(self, x):
        if next(CALLS[0]) in self.failing:
            raise self.error
        return self.linear(x)


@pytest.fixture
def setup():
    torch.manual_seed(2)
    data = [(torch.randn(9, 4), torch.arange(9) % 3)]
    return {"data": data, "faults": fp.RandomBits(2), "trials": 6, "cache_bytes": 0, "audit": 0}


def rows(result):
    return result.trials.drop(columns="seconds")


def healthy(model):
    """The same model on a machine with memory."""
    CALLS[0] = itertools.count(1000)
    return model


OUT_OF_MEMORY = [
    MemoryError("Unable to allocate 8 GiB"),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 1 TB"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_failing_machine_is_no_outcome(setup, error):
    expected = fp.assess(Failing(error, set()), **setup)
    retried = Failing(error, {4, 5, 9})
    result = fp.assess(retried, **setup)
    assert rows(result).equals(rows(expected))
    assert result.trials["error"].isna().all()
    assert next(CALLS[0]) == 2 + 6 + 3


def test_a_machine_that_keeps_failing_ends_the_campaign(setup, tmp_path):
    journal = tmp_path / "journal.jsonl"
    model = Failing(MemoryError("none left"), {4, 5, 6})
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InfrastructureError, match="point 0, trial 2, failed 3 times: batch 0: MemoryError: none left"):
        fp.assess(model, **setup, journal=journal)
    assert len(fp.Assessment.load(journal).records) == 2
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    resumed = fp.assess(healthy(model), **setup, journal=journal)
    assert rows(resumed).equals(rows(fp.assess(Failing(MemoryError(), set()), **setup)))


def test_the_golden_run_does_not_blame_the_model_for_the_machine(setup):
    with pytest.raises(InfrastructureError, match="golden run, batch 0: MemoryError"):
        fp.assess(Failing(MemoryError(), {0}), **setup)


def test_other_errors_are_the_models_own():
    assert all(is_infrastructure(error) for error in OUT_OF_MEMORY)
    assert not is_infrastructure(ValueError("out of memory is only mentioned here"))
    assert not is_infrastructure(RuntimeError("shapes cannot be multiplied"))


class Strict(nn.Module):
    """Checks its own weights, as careful code does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        if not torch.isfinite(self.linear.weight).all() or self.linear.weight.abs().max() > 1e6:
            raise ValueError("a weight is not what it should be")
        return self.linear(x)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_that_raises_under_faults_is_a_due(setup, tmp_path, workers):
    journal = tmp_path / "journal.jsonl"
    result = fp.assess(Strict(), **{**setup, "faults": fp.BitPosition([2, 30])}, workers=workers, journal=journal)
    fine, raised = result.records
    assert (fine.error, fine.outcomes["due"]) == (None, 0)
    assert raised.error == "ValueError: a weight is not what it should be"
    assert raised.outcomes == {"masked": 0, "non_critical_sdc": 0, "critical_sdc": 0, "due": 9}
    assert raised.metrics == {"accuracy": 0.0}
    assert fp.Assessment.load(journal).records == result.records


class Shrinking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        out = self.linear(x)
        return out[out.abs().amax(dim=1) < 1e6]  # drops samples it finds absurd


def test_outputs_of_another_shape_are_a_due(setup):
    (record,) = fp.assess(Shrinking(), **{**setup, "faults": fp.BitPosition(30)}).records
    assert record.outcomes["due"] == 9
    assert record.error == "outputs of shape (0, 3) instead of (9, 3)"


def test_an_output_function_that_raises_under_faults_is_a_due(setup):
    def picky(raw):
        if raw.abs().max() > 1e6:
            raise KeyError("no box left")
        return raw

    torch.manual_seed(1)
    (record,) = fp.assess(nn.Linear(4, 3), **{**setup, "faults": fp.BitPosition(30)}, output=picky).records
    assert record.outcomes["due"] == 9
    assert "output= raises KeyError: 'no box left' on what the model returns" in record.error


def test_an_error_in_a_metric_is_the_users_to_see(setup, tmp_path):
    calls = 0

    def broken(outputs, targets):
        nonlocal calls
        calls += 1
        return 1 / (4 - calls)

    journal = tmp_path / "journal.jsonl"
    with pytest.raises(ZeroDivisionError):
        fp.assess(nn.Linear(4, 3), **setup, metrics=broken, journal=journal)
    assert len(fp.Assessment.load(journal).records) == 2


def test_workers_are_processes_and_leave_with_the_campaign(setup):
    seen = fp.assess(
        nn.Linear(4, 3), **{**setup, "trials": 30}, workers=2, metrics={"pid": lambda outputs, targets: os.getpid()}
    )
    pids = {int(pid) for pid in seen.trials["pid"]}
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("workers", [0, -1])
def test_fewer_than_one_worker(setup, workers):
    with pytest.raises(ConfigError, match=f"workers ≥ 1.*workers={workers}"):
        fp.assess(nn.Linear(4, 3), **setup, workers=workers)


THREADS_THAT_WERE_NOT_FORKED = """
import torch
from flipproof.engine.jobs import executor

class Adding:
    serial_only = ""
    def __call__(self, key):
        return torch.get_num_threads(), torch.ones(1_000_000).round().sum().item()  # split among threads, if there are
    def describe(self, key):
        return str(key)
    def wake(self):
        pass
    def recover(self):
        pass

torch.set_num_threads(2)
torch.ones(1_000_000).round()  # starts the threads of the parent
with executor(Adding(), 2) as crew:
    print(sorted(crew.run([(0,), (1,), (2,)])))
"""


def test_a_worker_does_not_wait_for_threads_that_were_not_forked():
    """Whatever work it is: an operator with threads waits for ever in a child that was forked without them."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS_THAT_WERE_NOT_FORKED],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == str([(1, 1_000_000.0)] * 3), done.stderr
