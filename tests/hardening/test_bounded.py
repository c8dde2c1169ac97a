from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flipproof.hardening.bounds.activations import FUNCTIONS, Activation, function_of
from flipproof.hardening.bounds.bounded import Bounded, Saturate, Smooth, ZeroAbove

INF, NAN = float("inf"), float("nan")
KINDS = [Saturate, ZeroAbove, Smooth]


def scalar_saturate(x: float, bound: float) -> float:
    return 0.0 if math.isnan(x) else max(0.0, min(x, bound))


def scalar_zero(x: float, bound: float) -> float:
    return x if 0 <= x <= bound else 0.0


def scalar_smooth(x: float, bound: float, k: float = 20.0) -> float:
    """max(0, x · (1 − σ(k (x − λ)))), as Mousavi et al. 2024 have it, in double precision."""
    if math.isnan(x) or math.isinf(x) or x <= 0:
        return 0.0
    z = k * (x - bound)
    return x * (1 - 1 / (1 + math.exp(-z))) if abs(z) < 700 else (0.0 if z > 0 else x)


REFERENCES: dict[type[Bounded], Callable[[float, float], float]] = {
    Saturate: scalar_saturate,
    ZeroAbove: scalar_zero,
    Smooth: scalar_smooth,
}
POINTS = [-INF, -3.0, -0.0, 0.0, 1e-30, 0.5, 1.999, 2.0, 2.001, 2.5, 100.0, 3.4e38, INF, NAN]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", [0.0, 0.25, 2.0, 1e6])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_equals_the_scalar_function(kind: type[Bounded], bound: float, inplace: bool, grad: bool) -> None:
    x = torch.tensor(POINTS, dtype=torch.float64)
    given = x.clone()
    with torch.set_grad_enabled(grad):
        got = kind(torch.tensor(bound, dtype=torch.float64), inplace=inplace)(given)
    expected = [REFERENCES[kind](value, bound) for value in x.tolist()]
    assert got.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    if inplace:
        assert got.data_ptr() == given.data_ptr(), "whoever kept the input must see the bounded values"
    else:
        assert torch.equal(given.nan_to_num(7.0), x.nan_to_num(7.0)), "the input is not ours to change"


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_per_neuron_hit_their_own_neuron(kind: type[Bounded]) -> None:
    bounds = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(3, 2, 2)
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64) * 10
    got = kind(bounds)(x)
    for n, c, h, w in itertools.product(*map(range, x.shape)):
        expected = REFERENCES[kind](float(x[n, c, h, w]), float(bounds[c, h, w]))
        assert float(got[n, c, h, w]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [*FUNCTIONS, "identity"])
def test_no_fault_in_value_or_threshold_lets_nan_or_infinity_through(kind: type[Bounded], function: str) -> None:
    lows = [None] if function == "relu" else [None, -0.2, NAN, INF, -INF]
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.tensor([0.25], dtype=dtype)) if function == "prelu" else None
        x = torch.tensor([[NAN], [INF], [-INF], [3e38], [-3e38], [0.0], [0.7]], dtype=dtype)
        for threshold, low in itertools.product([1.0, 0.0, -1.0, INF, -INF, NAN, 3.3e38], lows):
            lower = None if low is None else torch.tensor(low, dtype=dtype)
            bounded = kind(torch.tensor(threshold, dtype=dtype), function, low=lower, weight=weight)
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    out = bounded(x.clone())
                assert bool(torch.isfinite(out).all()), (dtype, threshold, low, out)
                assert out.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_faulty_thresholds_do_what_the_table_says(kind: type[Bounded]) -> None:
    x = torch.tensor([0.5, 3.0, 1e30])

    def out(threshold: float) -> list[float]:
        return kind(threshold)(x).tolist()  # type: ignore[no-any-return]

    assert out(-1.0) == pytest.approx([0.0] * 3, abs=1e-6)
    assert out(-INF) == [0.0] * 3
    assert out(INF) == pytest.approx(x.tolist())
    if kind is Smooth:
        assert out(NAN) == out(0.0)
    else:
        assert out(NAN) == [0.0] * 3


@pytest.mark.parametrize(
    "module",
    [
        nn.GELU(),
        nn.GELU(approximate="tanh"),
        nn.SiLU(),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.Hardswish(),
        nn.LeakyReLU(0.3),
        nn.ReLU6(),
        nn.Hardtanh(-2.0, 3.0),
        nn.ELU(0.7),
        nn.CELU(1.3),
        nn.SELU(),
        nn.Mish(),
        nn.Softplus(2.0, 10.0),
        nn.Hardsigmoid(),
        nn.PReLU(),
    ],
    ids=repr,
)
def test_other_activations_are_clamped_on_both_sides(module: nn.Module) -> None:
    x = torch.linspace(-8, 8, 401)
    plain = module(x).detach()
    unbounded = Activation.of(module)
    assert torch.equal(unbounded(x), module(x))
    low, high = plain.quantile(0.2), plain.quantile(0.8)
    more = {"low": low, "arguments": unbounded.arguments, "weight": unbounded.weight}
    saturated = Saturate(high, unbounded.function, **more)(x)
    assert torch.equal(saturated.detach(), plain.clamp(low, high))
    zeroed = ZeroAbove(high, unbounded.function, **more)(x)
    assert torch.equal(zeroed.detach(), torch.where((plain >= low) & (plain <= high), plain, 0.0))


def test_every_module_of_the_family_is_recognised_and_nothing_else() -> None:
    class Own(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) + 1

    class Renamed(nn.ReLU):
        pass

    assert function_of(nn.ReLU6()) == "relu6"
    assert function_of(nn.Hardtanh()) == "hardtanh"
    assert function_of(Renamed()) == "relu"
    assert function_of(Own()) is None
    assert function_of(nn.Softmax(dim=1)) is None


@pytest.mark.parametrize("function", ["relu", "gelu", "identity"])
def test_smooth_gradients_are_those_of_finite_differences(function: str) -> None:
    bounds = (0.5 + torch.rand(3, dtype=torch.float64)).requires_grad_()
    x = torch.randn(6, 3, dtype=torch.float64).requires_grad_()
    assert bool(((x - bounds).abs() > 1e-4).all())

    def run(values: Tensor, threshold: Tensor) -> Tensor:
        module = Smooth(bounds.detach(), function, slope=5.0)
        return torch.func.functional_call(module, {"threshold": threshold}, (values,))

    assert torch.autograd.gradcheck(run, (x, bounds))


def test_smooth_gradient_to_the_threshold_in_closed_form() -> None:
    module = Smooth(torch.tensor(1.5, dtype=torch.float64), slope=4.0)
    module.threshold.requires_grad_(True)
    x = torch.tensor([0.3, 1.4, 1.6, -2.0, 9.0], dtype=torch.float64)
    module(x).sum().backward()
    gates = torch.sigmoid(4.0 * (1.5 - x))
    expected = (x.clamp_min(0) * 4.0 * gates * (1 - gates)).sum()
    assert float(module.threshold.grad) == pytest.approx(float(expected), rel=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_flow_through_a_network(kind: type[Bounded], inplace: bool) -> None:
    first, second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    bounded = kind(torch.tensor(0.5, dtype=torch.float64), inplace=inplace)
    x = torch.randn(5, 3, dtype=torch.float64)
    second(bounded(first(x))).square().sum().backward()
    got = first.weight.grad
    assert got is not None
    slow = [[0.0] * 3 for _ in range(4)]
    for i in range(4):
        for j in range(3):
            values = []
            for shift in (1e-6, -1e-6):
                with torch.no_grad():
                    first.weight[i, j] += shift
                    values.append(float(second(bounded(first(x))).square().sum()))
                    first.weight[i, j] -= shift
            slow[i][j] = (values[0] - values[1]) / 2e-6
    assert torch.allclose(got, torch.tensor(slow, dtype=torch.float64), atol=1e-6)


def test_equation_5_as_printed_is_not_what_is_computed() -> None:
    module = Smooth(1.0)
    assert float(module(torch.tensor(0.5))) == pytest.approx(0.5, rel=1e-3), "below λ a value passes"
    assert float(module(torch.tensor(2.0))) < 1e-7, "above λ it goes to 0"
    assert float(module(torch.tensor(1.0))) == pytest.approx(0.5), "at λ it is halved"
    with pytest.raises(ValueError, match="suppresses what lies below"):
        Smooth(1.0, slope=-20.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", ["relu", "gelu"])
def test_copies_pickles_and_exports(kind: type[Bounded], function: str) -> None:
    low = None if function == "relu" else torch.tensor(-0.1)
    module = kind(torch.tensor([1.0, 2.0, 0.5]), function, low=low, inplace=function == "relu").eval()
    x = torch.randn(4, 3) * 3
    with torch.no_grad():
        expected = module(x.clone())
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(x.clone()), expected)
            assert repr(other) == repr(module)
        exported = torch.export.export(nn.Sequential(module), (x.clone(),)).module()
        assert torch.equal(exported(x.clone()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_is_exported_to_onnx(kind: type[Bounded], tmp_path: object) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(nn.Sequential(kind(1.0)).eval(), (torch.randn(2, 3),), dynamo=True)
    assert program is not None


def test_thresholds_are_parameters_that_ask_for_no_gradient() -> None:
    module = Saturate(torch.ones(2), "gelu", low=torch.zeros(2))
    assert [name for name, _ in module.named_parameters()] == ["threshold", "low"]
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="never below 0"):
        Saturate(1.0, low=0.0)
    with pytest.raises(ValueError, match="unknown activation 'rleu'"):
        Saturate(1.0, "rleu")
    with pytest.raises(ValueError, match="floating point"):
        Saturate(torch.tensor(1))
