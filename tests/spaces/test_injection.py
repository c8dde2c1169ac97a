"""Exactly the chosen bits change, and every bit comes back: whatever the format, the model and the way out."""

from __future__ import annotations

import signal
import struct
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flipproof as fp
from flipproof.errors import FaultSpaceError, FormatError
from flipproof.formats.base import bit_pattern
from flipproof.spaces import parameters as space_module
from flipproof.spaces.contract import Faults
from flipproof.spaces.parameters import FaultSpace

FORMATS = [
    fp.Float32(), fp.Float16(), fp.BFloat16(), fp.Float8E4M3(), fp.Float8E5M2(), fp.FixedPoint(),
    fp.FixedPoint(3, 4), *(fp.Affine(bits=bits) for bits in range(2, 9)), fp.Affine(bits=5, axis=0),
]  # fmt: skip


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).to(dtype)


def memory(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: bit_pattern(value).clone() for name, value in model.state_dict().items() if value.is_floating_point()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@settings(deadline=None)  # the first call may compile
@given(st.lists(st.integers(0, 10 * 32 - 1), unique=True, max_size=60))
def test_float32_faults_are_xor_of_the_bytes(positions):
    """Against `struct`: no torch, no kernel."""
    net = nn.Linear(9, 1)
    floats = torch.cat([p.detach().view(-1) for p in net.parameters()]).tolist()
    words = [struct.unpack("<I", struct.pack("<f", x))[0] for x in floats]
    for position in positions:
        words[position // 32] ^= 1 << (position % 32)
    space = FaultSpace(net)
    with space.corrupted(Faults(np.array(sorted(positions), np.int64))) as changed:
        now = torch.cat([p.detach().view(-1) for p in net.parameters()]).view(torch.int32).tolist()
    assert [word & 0xFFFFFFFF for word in now] == words
    assert changed == len(positions)


@pytest.mark.parametrize("format", FORMATS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), dense=st.booleans())
def test_the_model_comes_back_bit_for_bit(format, dtype, seed, dense):
    net = network(dtype)
    before = memory(net)
    space = FaultSpace(net, format=format)
    faults = fp.RandomBits(space.bits // 2 if dense else 3).draw(space, fp.faults.TrialGenerator(seed, "p", 0))
    with space.stored():
        golden = memory(net)
        with space.corrupted(faults) as changed:
            assert changed == len(faults)
        assert same(memory(net), golden)
    assert same(memory(net), before)
    with space.corrupted(faults):  # stores for the time being by itself
        pass
    assert same(memory(net), before)


@pytest.mark.parametrize("format", [fp.Float32(), fp.FixedPoint()], ids=repr)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_whatever_is_raised_inside(format, error):
    net = network()
    before = memory(net)
    space = FaultSpace(net, format=format)
    faults = fp.RandomBits(50).draw(space, fp.faults.TrialGenerator(0, "p", 0))
    with pytest.raises(error), space.stored(), space.corrupted(faults):
        raise error
    assert same(memory(net), before)
    with pytest.raises(error), space.corrupted(faults):
        raise error
    assert same(memory(net), before)


@pytest.mark.parametrize("step", ["scatter", "_take_back"])
def test_an_interrupt_in_the_middle_of_restoring_is_let_through_after_it(monkeypatch, step):
    net = network()
    before = memory(net)
    space = FaultSpace(net, format=fp.Parity(fp.FixedPoint()))
    faults = fp.RandomBits(50).draw(space, fp.faults.TrialGenerator(0, "p", 0))
    owner = space_module if step == "scatter" else FaultSpace
    original, calls = getattr(owner, step), []

    def interrupted(*arguments):
        calls.append(step)
        if armed and len(calls) == 1:
            raise KeyboardInterrupt
        return original(*arguments)

    armed = False
    monkeypatch.setattr(owner, step, interrupted)
    with pytest.raises(KeyboardInterrupt), space.stored(), space.corrupted(faults):  # noqa: PT012
        calls.clear()
        armed = True
    assert same(memory(net), before)


def test_a_real_ctrl_c_while_faults_are_in_memory():
    net = network()
    before = memory(net)
    space = FaultSpace(net)
    generator = fp.faults.TrialGenerator(0, "p", 0)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        while True:
            with space.corrupted(fp.BitErrorRate(1e-2).draw(space, generator)):
                pass
    timer.join()
    assert same(memory(net), before)


def test_outputs_with_special_values_come_back():
    net = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[float("nan"), float("inf"), -0.0, 1e-45]]))
    net.weight.data.view(torch.int32)[0, 0] = 0x7FC12345  # a NaN with a payload
    before = memory(net)
    space = FaultSpace(net)
    with space.corrupted(fp.RandomBits(60).draw(space, fp.faults.TrialGenerator(0, "p", 0))):
        assert not same(memory(net), before)
    assert same(memory(net), before)


def test_a_format_that_cannot_hold_a_value_names_the_tensor_and_changes_nothing():
    net = network()
    with torch.no_grad():
        net[3].weight[0, 0] = 1e6
    before = memory(net)
    half = FaultSpace(net, format=fp.Float16())
    message = r"3\.weight: 1 finite values become NaN or infinite in Float16\(\)"
    with pytest.raises(FormatError, match=message), half.stored():
        pass
    with torch.no_grad():
        net[3].bias[1] = float("nan")
    before = memory(net)
    with (
        pytest.raises(FormatError, match=r"3\.bias: .*not finite"),
        FaultSpace(net, format={"*": fp.Affine()}).stored(),
    ):
        pass
    assert same(memory(net), before)


def test_storing_twice_is_refused():
    space = FaultSpace(network(), format=fp.Float16())
    with space.stored(), pytest.raises(FaultSpaceError, match="already stored"), space.stored():
        pass


def test_tied_weights_are_hit_together():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    space = FaultSpace(net)
    value = net[0].weight[1, 1].item()
    assert space.bits == 9 * 32
    with space.corrupted(space.faults([("1.weight", 4, 31)])):
        assert net[0].weight[1, 1].item() == net[1].weight[1, 1].item() == -value
        assert space.touched_names(space.faults([("0.weight", 4, 31)])) == ["0.weight", "1.weight"]


def test_a_model_that_moved_or_changed_its_type_since():
    net = network()
    space = FaultSpace(net)
    faults = space.faults([("3.bias", 0, 31)])
    net[3].bias.data = net[3].bias.data.clone()  # other memory
    value = net[3].bias[0].item()
    with space.corrupted(faults):
        assert net[3].bias[0].item() == -value
    net.half()
    with pytest.raises(FaultSpaceError, match="changed its dtype"), space.corrupted(faults):
        pass
