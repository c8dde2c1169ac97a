from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from flipproof.engine import journal


def pytest_configure() -> None:
    """Some tests press Ctrl-C; a shell that runs the tests in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def a_line_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records do not wait for others to be written with."""
    monkeypatch.setattr(journal, "EVERY", 0.0)


@pytest.fixture(autouse=True)
def same_weights_every_time() -> Iterator[None]:
    """Tests build networks with random weights; the global generator is theirs for the time of the test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def gated() -> None:
    """For tests of what `harden`, `protect` and `pack_` end with."""


@pytest.fixture(autouse=True)
def no_gate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other test goes without: an export takes longer than most of them."""
    if "gated" not in request.fixturenames:
        monkeypatch.setattr("flipproof.running.ways.Few._ways", lambda *_: iter(()))


@pytest.fixture
def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def blobs(mlp: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Two batches of 16 and 14 samples in three classes; the network is right about most of them."""
    torch.manual_seed(2)
    inputs = 2 * torch.randn(30, 4)
    with torch.no_grad():
        targets = mlp(inputs).argmax(dim=1)
    targets[::7] = (targets[::7] + 1) % 3
    targets[-3:] = torch.arange(3)
    return [(inputs[:16], targets[:16]), (inputs[16:], targets[16:])]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in a campaign: with more threads, sums are taken in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
