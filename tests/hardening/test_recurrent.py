"""Opened recurrent layers against PyTorch's own, and clamped gates against a scalar twin."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from flipproof.hardening.bounds.bounded import ClampInput
from flipproof.hardening.rewriting import recurrent
from flipproof.hardening.rewriting.recurrent import Opened, open_recurrent_

KINDS = [nn.LSTM, nn.GRU, nn.RNN]
OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bias": False},
    {"num_layers": 3, "batch_first": True, "bidirectional": True, "dropout": 0.3},
]


def pair(kind, bounds=None, **options):
    """The same layer twice: PyTorch's and opened; with `bounds`, every gate of the second one clamped to ± bounds."""
    torch.manual_seed(1)
    closed = kind(4, 5, **options).eval()
    opened = copy.deepcopy(closed)
    assert open_recurrent_(opened) == [""]
    if bounds is not None:
        clamp(opened, -bounds, bounds)
    return closed, opened


def clamp(module, low, high):
    for name, child in list(module.named_children()):
        setattr(
            module,
            name,
            ClampInput(high, type(child).__name__.lower(), low=None if isinstance(child, nn.ReLU) else low),
        )


def same(a, b, atol=1e-6):
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b, atol=atol)
    return type(a) is type(b) and all(same(x, y, atol) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bounds", [None, 1e9], ids=["plain", "compiled"])
@pytest.mark.parametrize("grad", [False, True])
def test_equals_pytorch_when_unbounded(kind, options, bounds, grad):
    closed, opened = pair(kind, bounds, **options)
    x = torch.randn(6, 6, 4)
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    h = torch.randn(layers, 6, 5)
    hx = (h, torch.randn(layers, 6, 5)) if kind is nn.LSTM else h
    with torch.set_grad_enabled(grad):
        assert same(closed(x), opened(x))
        assert same(closed(x, hx), opened(x, hx))
        one = tuple(part[:, :1] for part in hx) if kind is nn.LSTM else hx[:, :1]
        single = x[:1] if options.get("batch_first") else x[:, :1]
        assert same(closed(single, one), opened(single, one))
        lone = tuple(part[:, 0] for part in hx) if kind is nn.LSTM else hx[:, 0]
        assert same(closed(x[0]), opened(x[0]))
        assert same(closed(x[0], lone), opened(x[0], lone))
    assert same(h, hx[0] if kind is nn.LSTM else hx)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", [None, 1e9], ids=["plain", "compiled"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences_of_any_order(kind, bounds, bidirectional):
    closed, opened = pair(kind, bounds, num_layers=2, bidirectional=bidirectional)
    rows = [torch.randn(length, 4) for length in (3, 7, 1, 7, 4)]
    h = torch.randn(4 if bidirectional else 2, 5, 5)
    with torch.no_grad():
        for packed in (
            pack_sequence(rows, enforce_sorted=False),
            pack_sequence(sorted(rows, key=len, reverse=True)),
            pack_padded_sequence(torch.randn(7, 5, 4), torch.tensor([2, 7, 5, 1, 1]), enforce_sorted=False),
        ):
            for hx in (None, (h, h * 2) if kind is nn.LSTM else h):
                (y, final), (z, last) = closed(packed, hx), opened(packed, hx)
                assert torch.allclose(y.data, z.data, atol=1e-6)
                assert all(torch.equal(p, q) for p, q in zip(y[1:], z[1:], strict=True) if p is not None)
                assert same(final, last)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("bounds", [None, 1e9])
def test_projections(bounds):
    closed, opened = pair(nn.LSTM, bounds, num_layers=2, proj_size=3, bidirectional=True)
    x = torch.randn(6, 2, 4)
    with torch.no_grad():
        assert same(closed(x), opened(x))


@pytest.mark.parametrize("bounds", [None, 1e9])
def test_relu_rnn_and_other_types(bounds):
    for kind, options in ((nn.RNN, {"nonlinearity": "relu"}), (nn.LSTM, {}), (nn.GRU, {})):
        closed, opened = pair(kind, bounds, **options)
        x = torch.randn(6, 2, 4)
        with torch.no_grad():
            assert same(closed(x), opened(x))
            assert same(closed.double()(x.double()), opened.double()(x.double()), atol=1e-12)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
def test_cells(kind, bias):
    closed, opened = pair(kind, bias=bias)
    x, h = torch.randn(3, 4), torch.randn(3, 5)
    hx, one = ((h, h * 2), (h[0], h[1])) if kind is nn.LSTMCell else (h, h[0])
    with torch.no_grad():
        assert same(closed(x), opened(x))
        assert same(closed(x, hx), opened(x, hx))
        assert same(closed(x[0], one), opened(x[0], one))


def test_gradients_agree():
    for kind in KINDS:
        closed, opened = pair(kind, num_layers=2)
        x = torch.randn(5, 3, 4)
        for layer in (closed, opened):
            layer.train()(x)[0].square().sum().backward()
        for (name, p), (other, q) in zip(closed.named_parameters(), opened.named_parameters(), strict=True):
            assert name == other
            assert torch.allclose(p.grad, q.grad, atol=1e-5)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def into(x, low, high):
    return min(max(x, low), high)


def lstm_twin(layer, x, low, high):
    size = layer.hidden_size
    h, c = [0.0] * size, [0.0] * size
    w, r = layer.weight_ih_l0.tolist(), layer.weight_hh_l0.tolist()
    b = (layer.bias_ih_l0 + layer.bias_hh_l0).tolist()
    for step in x.tolist():
        a = [
            sum(p * q for p, q in zip(w[k], step, strict=True))
            + sum(p * q for p, q in zip(r[k], h, strict=True))
            + b[k]
            for k in range(4 * size)
        ]
        a = [into(v, low, high) for v in a]
        for k in range(size):
            i, f, g, o = sigmoid(a[k]), sigmoid(a[size + k]), math.tanh(a[2 * size + k]), sigmoid(a[3 * size + k])
            c[k] = f * c[k] + i * g
            h[k] = o * math.tanh(into(c[k], low, high))
    return h


@pytest.mark.parametrize("grad", [False, True], ids=["compiled", "plain"])
def test_clamped_gates_are_those_of_a_scalar_twin(grad):
    _, opened = pair(nn.LSTM)
    with torch.no_grad():
        for p in opened.parameters():
            p.mul_(4)
    clamp(opened, -0.4, 0.7)
    x = torch.randn(9, 3, 4)
    with torch.set_grad_enabled(grad):
        last = opened(x)[0][-1]
    for row in range(3):
        assert last[row].tolist() == pytest.approx(lstm_twin(opened, x[:, row], -0.4, 0.7), abs=1e-6)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_broken_weights_and_broken_bounds_leave_finite_states_on_both_paths(kind, bad):
    for broken in ("weight_ih_l0", "weight_hh_l0", "bias_hh_l0"):
        _, opened = pair(kind, 3.0)
        with torch.no_grad():
            opened.get_parameter(broken)[1] = bad
            fast = opened(torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0)))[0]
        slow = opened(torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0)))[0]
        assert bool(torch.isfinite(fast).all())
        assert torch.allclose(fast, slow, atol=1e-6)
    _, opened = pair(kind, 3.0)
    for child in opened.children():
        with torch.no_grad():
            child.threshold.fill_(bad)
    x = torch.randn(6, 2, 4)
    with torch.no_grad():
        fast = opened(x)[0]
    assert bool(torch.isfinite(fast).all())
    assert torch.allclose(fast, opened(x)[0], atol=1e-6)


def test_the_compiled_path_is_taken_exactly_where_it_may(monkeypatch):
    taken = []
    real = recurrent.Opened.__subclasses__()[0].kernel
    monkeypatch.setattr(recurrent._LSTM, "kernel", staticmethod(lambda *a: (taken.append(1), real(*a))[1]))
    _, opened = pair(nn.LSTM, 5.0)
    x = torch.randn(3, 2, 4)

    def runs(layer, x):
        taken.clear()
        layer(x)
        return bool(taken)

    with torch.no_grad():
        assert runs(opened, x)
        handle = opened.cell_l0.register_forward_hook(lambda *a: None)
        assert not runs(opened, x)
        handle.remove()
        assert not runs(copy.deepcopy(opened).double(), x.double())
        assert not runs(pair(nn.LSTM)[1], x)
        assert runs(opened, x)
    assert not runs(opened, x)


def test_opening_keeps_everything_else_and_travels():
    closed, opened = pair(nn.GRU, num_layers=2)
    assert list(opened.state_dict()) == list(closed.state_dict())
    assert isinstance(opened, nn.GRU)
    assert isinstance(opened, Opened)
    opened.load_state_dict(closed.state_dict())
    x = torch.randn(4, 2, 4)
    with torch.no_grad():
        for other in (copy.deepcopy(opened), pickle.loads(pickle.dumps(opened))):
            assert same(other(x), opened(x))
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        opened(x, torch.zeros(1, 2, 5))


def test_subclasses_stay_closed():
    class Mine(nn.LSTM):
        pass

    assert open_recurrent_(nn.ModuleList([Mine(2, 3), nn.Linear(2, 2)])) == []


def test_export_keeps_the_bounds():
    _, opened = pair(nn.LSTM, 0.5)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = opened

        def forward(self, x):
            return self.lstm(x)[0]

    x = torch.randn(3, 2, 4) * 9
    with torch.no_grad():
        expected = Net()(x)
        exported = torch.export.export(Net(), (x,)).module()
        assert torch.allclose(exported(x), expected, atol=1e-6)
