"""The one-pass kernel against the torch functions that it stands for, and against plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flipproof.hardening.bounds import bounded, clamping
from flipproof.hardening.bounds.bounded import Saturate, ZeroAbove
from flipproof.running.evaluation import one_thread

INF, NAN = float("inf"), float("nan")
LARGEST = torch.finfo(torch.float32).max
BOUNDS = [0.0, 1.5, -2.0, INF, -INF, NAN, 1e-38, LARGEST]
VALUES = [0.0, -0.0, 1.0, 1.5, 1.6, -1.0, INF, -INF, NAN, LARGEST, -LARGEST, 1e-42]


def both(kind, x, threshold, *, inplace=False):
    """(kernel, torch) results of a bounded ReLU."""
    found = []
    for off in (False, True):
        with torch.no_grad(), one_thread(torch.device("cpu")), pytest.MonkeyPatch.context() as patch:
            if off:
                patch.setattr(bounded, "bounded_relu", lambda *_, **__: None)
            found.append(kind(threshold, inplace=inplace)(x.clone()))
    return found


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("inner", "shape"),
    [
        ((3, 4, 5), ()),
        ((3, 4, 5), (3, 1, 1)),
        ((3, 4, 5), (3, 4, 5)),
        ((3, 4, 5), (1, 1, 1)),
        ((3, 4, 5), (3, 4, 1)),
        ((3, 1, 5), (3, 1, 5)),
        ((3, 4, 1), (3, 4, 1)),
        ((60,), (60,)),
        ((60,), (1,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Saturate, ZeroAbove])
def test_it_gives_what_torch_gives(kind, inner, shape, inplace, monkeypatch):
    used = []
    asked = bounded.bounded_relu
    monkeypatch.setattr(bounded, "bounded_relu", lambda *a, **k: used.append(asked(*a, **k)) or used[-1])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, *inner, generator=generator) * 3
    x.view(-1)[: len(VALUES)] = torch.tensor(VALUES)
    x.view(-1)[-len(VALUES) :] = torch.tensor(VALUES)
    for fault in (None, *BOUNDS):
        threshold = torch.rand(shape, generator=generator) * 3
        if fault is not None:
            threshold.view(-1)[-1] = fault
        mine, theirs = both(kind, x, threshold, inplace=inplace)
        assert torch.equal(mine, theirs)
    assert all(result is not None for result in used)


@given(st.sampled_from(VALUES) | st.floats(width=32), st.sampled_from(BOUNDS) | st.floats(width=32))
def test_every_value_and_bound_is_what_the_table_says(value, bound):
    x = torch.tensor([[value, 1.0]])
    with torch.no_grad(), one_thread(torch.device("cpu")):
        saturated = Saturate(bound)(x)[0, 0].item()
        zeroed = ZeroAbove(bound)(x)[0, 0].item()
    if math.isnan(value) or value <= 0 or math.isnan(bound) or bound < 0:
        assert (saturated, zeroed) == (0.0, 0.0)
    else:
        value, top = torch.tensor(value).item(), min(torch.tensor(bound).item(), LARGEST)  # as float32 has them
        assert saturated == min(value, top)
        assert zeroed == (value if value <= top else 0.0)


def test_what_it_leaves_to_torch():
    x, bound = torch.randn(2, 3, 4, 4), torch.tensor(1.0)

    def done(x, threshold=bound):
        return clamping.bounded_relu(x, threshold, zero=True, overwrite=False)

    with torch.no_grad(), one_thread(torch.device("cpu")):
        assert done(x) is not None
        for other in (x.double(), x.to(memory_format=torch.channels_last), x[:0], x.transpose(1, 3)):
            assert done(other) is None
        for threshold in (torch.rand(3), torch.rand(1, 4, 4), torch.rand(3, 1, 4), bound.double()):
            assert done(x, threshold) is None
        torch.set_num_threads(2)
        assert done(x) is None
    with one_thread(torch.device("cpu")):
        assert done(x) is None  # gradients are asked for
        exported = torch.export.export(torch.nn.Sequential(ZeroAbove(1.0)), (x,)).module()
        assert torch.equal(exported(3 * x), torch.where((3 * x > 0) & (3 * x <= 1), 3 * x, torch.zeros(())))


@pytest.mark.parametrize(
    ("inner", "shape"),
    [((3, 4, 5), ()), ((3, 4, 5), (3, 1, 1)), ((6, 5), (5,)), ((6, 5), (6, 1)), ((60,), (60,)), ((3, 4, 1), (3, 1, 1))],
    ids=str,
)
@pytest.mark.parametrize("function", ["identity", "tanh"])
@pytest.mark.parametrize("kind", [Saturate, ZeroAbove])
def test_two_sides_give_what_torch_gives(kind, function, inner, shape, monkeypatch):
    used = []
    asked = bounded.bounded_between
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, *inner, generator=generator) * 3
    x.view(-1)[: len(VALUES)] = torch.tensor(VALUES)
    x.view(-1)[-len(VALUES) :] = torch.tensor(VALUES)
    with torch.no_grad(), one_thread(torch.device("cpu")):
        for high in (None, *BOUNDS):
            for low in (None, *BOUNDS, -LARGEST):
                ends = torch.rand(shape, generator=generator) * 3, -torch.rand(shape, generator=generator) * 3
                for end, fault in zip(ends, (high, low), strict=True):
                    if fault is not None:
                        end.view(-1)[-1] = fault
                bound = kind(ends[0], function, low=ends[1])
                monkeypatch.setattr(bounded, "bounded_between", lambda *a, **k: used.append(asked(*a, **k)) or used[-1])
                mine = bound(x)
                monkeypatch.setattr(bounded, "bounded_between", lambda *a, **k: None)
                assert torch.equal(mine, bound(x)), (high, low)
                assert bool(torch.isfinite(mine).all())
    assert all(result is not None for result in used)
    assert len(used) == 9 * 10


@given(
    st.sampled_from(VALUES) | st.floats(width=32),
    st.floats(-4, 4, width=32) | st.sampled_from([-INF, -LARGEST]),
    st.floats(0, 4, width=32),
)
def test_two_sides_against_plain_python(value, low, span):
    high = torch.tensor(low + span).item() if math.isfinite(low) else span
    low, value = torch.tensor(low).item(), torch.tensor(value).item()
    x = torch.tensor([[value]])
    with torch.no_grad(), one_thread(torch.device("cpu")):
        clamped = Saturate(high, "identity", low=low)(x).item()
        zeroed = ZeroAbove(high, "identity", low=low)(x).item()
    if math.isnan(value):
        assert (clamped, zeroed) == (0.0, 0.0)
    else:
        assert clamped == max(min(value, high), max(low, -LARGEST))
        assert zeroed == (value if max(low, -LARGEST) <= value <= high else 0.0)


def test_what_two_sides_leave_to_torch():
    x, low, high = torch.randn(2, 3, 4, 4), torch.tensor(-1.0), torch.tensor(1.0)
    with torch.no_grad(), one_thread(torch.device("cpu")):
        for other in (x.double(), x.to(memory_format=torch.channels_last), x[:0]):
            assert clamping.bounded_between(other, low, high, zero=True) is None
        for shape in ((3,), (3, 4, 4), (2, 3, 1, 1, 1), (3, 4, 1)):
            assert clamping.bounded_between(x, -torch.rand(shape), torch.rand(shape), zero=True) is None
        assert clamping.bounded_between(x, low, high.double(), zero=True) is None
        assert clamping.bounded_between(x, low, torch.rand(3, 1, 1), zero=True) is None
    with one_thread(torch.device("cpu")):
        assert clamping.bounded_between(x, low, high, zero=True) is None  # gradients are asked for


def test_memory_of_an_output_is_used_again_only_when_nobody_holds_it():
    bound, shape = torch.tensor(1.0), (4, 16, 32, 32)  # above the size from which memory is kept

    def done(x):
        return clamping.bounded_relu(x, bound, zero=False, overwrite=False)

    with torch.no_grad(), one_thread(torch.device("cpu")):
        first, second, third = (torch.randn(shape) for _ in range(3))
        held = done(first)
        expected, at = held.clone(), held.data_ptr()
        other = done(second)
        assert other.data_ptr() != at
        row, flat = held[2:], held.numpy().reshape(-1)  # a view, and an array over the same memory
        del held
        for _ in range(3):
            assert done(third).data_ptr() != at
        assert torch.equal(row, expected[2:])
        del row
        assert done(third).data_ptr() != at
        assert (flat == expected.view(-1).numpy()).all()
        del flat
        again = done(third)
        assert torch.equal(again, third.clamp(0, 1))
        assert torch.equal(other, second.clamp(0, 1))
        assert {again.data_ptr() % 64, other.data_ptr() % 64} == {0}


def test_no_more_memory_is_kept_than_is_said(monkeypatch):
    monkeypatch.setattr(clamping, "_kept", [])
    monkeypatch.setattr(clamping, "_MOST", 3 * 2**18)
    bound = torch.tensor(1.0)
    with torch.no_grad(), one_thread(torch.device("cpu")):
        xs = [torch.randn(2**16) for _ in range(6)]
        outs = [clamping.bounded_relu(x[None], bound, zero=False, overwrite=False) for x in xs]
        assert sum(kept.nbytes for kept in clamping._kept) == 3 * 2**18
        assert all(torch.equal(out[0], x.clamp(0, 1)) for out, x in zip(outs, xs, strict=True))
        clamping.bounded_relu(torch.randn(1, 2**19), bound, zero=False, overwrite=False)
        assert clamping._kept == []


def test_memory_that_nobody_holds_is_used_again(monkeypatch):
    monkeypatch.setattr(clamping, "_kept", [])
    x, bound = torch.randn(4, 16, 32, 32), torch.tensor(1.0)
    with torch.no_grad(), one_thread(torch.device("cpu")):
        places = {clamping.bounded_relu(x, bound, zero=False, overwrite=False).data_ptr() for _ in range(20)}
    assert len(places) == 1
    assert len(clamping._kept) == 1
