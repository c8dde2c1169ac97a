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
