"""Faults in an accelerator's memory. The CPU stands in for it: the same code, with its bytes at the same addresses."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.faults.sampling import TrialGenerator
from flipproof.formats.base import bit_pattern
from flipproof.spaces import device_words
from flipproof.spaces.cell import Cell
from flipproof.spaces.device_words import DeviceMemory
from flipproof.spaces.parameters import FaultSpace

FAULTS = [
    fp.RandomBits(1),
    fp.RandomBits(40),
    fp.BitErrorRate(2e-2),
    fp.StuckAt(2e-2, value=0),
    fp.StuckAt(2e-2, value=1),
]


WIDE = {"b.*": fp.formats.Float64()}


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 12).double(), nn.Linear(12, 3)
        self.scale = nn.Parameter(torch.tensor(0.7).bfloat16())
        self.halves = nn.Parameter(torch.randn(5).half())
        self.apart = nn.Parameter(torch.randn(3, 4).t())  # not contiguous

    def forward(self, x):
        x = self.b(torch.relu(self.a(x)).double()).float() * self.scale.float() + self.halves.float().sum()
        return self.c(torch.relu(x)) + self.apart.sum()


def data():
    torch.manual_seed(5)
    return [(torch.randn(20, 6), torch.arange(20) % 3)]


@pytest.fixture
def accelerator(monkeypatch):
    """What lies in memory as it is goes the way of an accelerator; returns how often that was gone."""
    gone = []
    stretch, apply = Cell.stretch.fget, DeviceMemory.apply

    def counted(self, positions, operation, undo):
        gone.append(positions)
        return apply(self, positions, operation, undo)

    monkeypatch.setattr(device_words, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(Cell, "stretch", property(lambda cell: None if cell.addressed else stretch(cell)))
    monkeypatch.setattr(DeviceMemory, "apply", counted)
    return gone


def corrupted(faults, seed):
    """What the parameters hold, how many bits changed, and how words are read."""
    net = Mixed()
    space = FaultSpace(net, format=WIDE)
    golden = [parameter.detach().clone() for parameter in net.parameters()]
    draw = faults.draw(space, TrialGenerator(seed, "point", 0))
    with space.stored(), space.corrupted(draw) as flips:
        held = [bit_pattern(parameter.detach()).clone() for parameter in net.parameters()]
        words = space.word_outcomes
        as_stored = space.as_stored
    for parameter, before in zip(net.parameters(), golden, strict=True):
        assert torch.equal(bit_pattern(parameter.detach()), bit_pattern(before))
    return held, flips, words, as_stored


@pytest.mark.parametrize("faults", FAULTS, ids=repr)
def test_memory_is_changed_as_on_the_cpu(faults, request):
    expected = [corrupted(faults, seed) for seed in range(20)]
    gone = request.getfixturevalue("accelerator")
    for seed, (held, *facts) in enumerate(expected):
        found, *others = corrupted(faults, seed)
        assert all(torch.equal(one, other) for one, other in zip(found, held, strict=True))
        assert others == facts
    assert gone


def test_records_are_those_of_the_cpu(request):
    setup = {"faults": fp.BitErrorRate([1e-3, 1e-2]), "trials": 20, "audit": 0.5, "format": WIDE}
    expected = fp.assess(Mixed(), data(), **setup).trials.drop(columns="seconds")
    gone = request.getfixturevalue("accelerator")
    found = fp.assess(Mixed(), data(), **setup).trials.drop(columns="seconds")
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert len(gone) > 40


def test_a_draw_is_one_change_for_all_tensors(accelerator):
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    space = FaultSpace(net)
    with space.stored():
        with space.corrupted(fp.RandomBits(1).draw(space, TrialGenerator(0, "first", 0))):  # the proof is made here
            pass
        accelerator.clear()
        with space.corrupted(fp.RandomBits(50).draw(space, TrialGenerator(0, "second", 0))) as flips:
            assert flips == 50
    assert len(accelerator) == 1


def test_memory_that_does_not_show_what_is_written_is_not_used(accelerator, monkeypatch):
    expected = corrupted(FAULTS[1], 0)
    weight = nn.Linear(6, 16).weight.data
    elsewhere = weight.clone()
    memory = DeviceMemory([weight], [0], [weight.numel() * 32], [32])
    assert memory.faithful()
    memory._memory = elsewhere.view(-1).view(torch.uint8)
    assert not memory.faithful()
    monkeypatch.setattr(DeviceMemory, "faithful", lambda memory: False)
    accelerator.clear()
    found = corrupted(FAULTS[1], 0)
    assert not accelerator
    assert all(torch.equal(one, other) for one, other in zip(found[0], expected[0], strict=True))
    assert found[1:] == expected[1:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("faults", FAULTS, ids=repr)
def test_cuda_memory_is_changed_as_on_the_cpu(faults):
    net = Mixed()
    there = Mixed().cuda()
    for seed in range(20):
        held = []
        for model in (net, there):
            space = FaultSpace(model, format=WIDE)
            draw = faults.draw(space, TrialGenerator(seed, "point", 0))
            with space.stored(), space.corrupted(draw) as flips:
                held.append([flips, *(bit_pattern(p.detach()).cpu().clone() for p in model.parameters())])
        assert held[0][0] == held[1][0]
        assert all(torch.equal(one, other) for one, other in zip(held[0][1:], held[1][1:], strict=True))
