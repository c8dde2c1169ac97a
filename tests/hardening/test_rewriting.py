"""Every activation call is found, wherever it hides, and what is not found is named."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import flipproof as fp
from flipproof.errors import DataError, ModelError
from flipproof.hardening.bounds.activations import Activation
from flipproof.hardening.bounds.bounded import Saturate, ZeroAbove
from flipproof.hardening.harden import harden
from flipproof.hardening.methods.ranger import Ranger
from flipproof.hardening.report import hardening_report
from flipproof.hardening.rewriting.sites import rewrite
from flipproof.models import digits_cnn, resnet18


class SharedReLU(nn.Module):
    """One nn.ReLU for two calls, as torchvision's ResNet blocks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.second(self.relu(self.first(x)))))  # type: ignore[no-any-return]


class Functional(nn.Module):
    """Each way of calling ReLU that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[0](x))
        x = torch.relu(self.layers[1](x))
        x = self.layers[2](x).relu()
        x = F.relu(self.layers[3](x), inplace=True)
        x = self.layers[4](x)
        x.relu_()
        return x


class Untraceable(nn.Module):
    """Control flow on values: module activations can be replaced, the function cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.relu = nn.Linear(4, 5), nn.Linear(5, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.inner(x))
        if float(x.sum()) < -1:
            return x
        return self.outer(F.relu(x - 0.1))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0, *, skip: Tensor | None = None) -> Tensor:
        out = F.relu(self.fc(x)) * scale
        return out if skip is None else out + skip


class CallsBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x, 0.5), skip=x)  # type: ignore[no-any-return]


class SameBlockTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))  # type: ignore[no-any-return]


class Dropping(nn.Module):
    """What it does depends on the training flag."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.fc(x)), 0.5, self.training)


class HiddenReference(nn.Module):
    """The ReLU is called, but no parent has it as a child."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.shown = nn.Linear(4, 4), nn.Tanh()
        self.hidden = [nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        return self.shown(self.hidden[0](self.fc(x)))  # type: ignore[no-any-return]


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def sites(model: nn.Module, x: Any = X) -> list[str]:
    return [site.name for site in rewrite(model, x).sites]


def same(first: nn.Module, second: nn.Module, x: Tensor = X) -> bool:
    with torch.no_grad():
        return torch.equal(first(x.clone()), second(x.clone()))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (SharedReLU, ["relu:0", "relu:1"]),
        (Functional, ["relu:0", "relu:1", "relu:2", "relu:3", "relu:4"]),
        (CallsBlocks, ["a.relu:0", "b.relu:0"]),
        (Dropping, ["relu:0"]),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Sequential(nn.Linear(4, 4), nn.Tanh())),
            ["1:0", "2.1:0"],
        ),
    ],
)
def test_every_call_site_has_a_bound_of_its_own(make: Callable[[], nn.Module], expected: list[str]) -> None:
    model = make().eval()
    keys = list(model.state_dict())
    found = rewrite(model, X)
    assert [site.name for site in found.sites] == expected
    assert found.unreachable == []
    assert all(site.calls == 1 for site in found.sites)
    modules = {site.module for site in found.sites}
    assert len(modules) == len(expected)
    assert all(isinstance(found.model.get_submodule(name), Activation) for name in modules)
    assert same(model, found.model)
    assert list(model.state_dict()) == keys, "the input model is untouched"
    assert type(found.model) is not Activation
    assert isinstance(found.model, type(model))


@pytest.mark.parametrize("make", [SharedReLU, Functional, CallsBlocks, Dropping])
def test_each_bound_acts_where_its_name_says(make: Callable[[], nn.Module]) -> None:
    """Zeroing one site must equal zeroing that call, found by an independent count of calls at run time."""
    model = make().eval()
    for index, site in enumerate(rewrite(model, X).sites):
        found = rewrite(model, X)
        plain = found.model.get_submodule(site.module)
        assert isinstance(plain, Activation)
        found.swap(site, ZeroAbove(0.0, inplace=plain.inplace))
        assert torch.equal(found.model(X.clone()), with_call_zeroed(model, index)), site


def with_call_zeroed(model: nn.Module, index: int) -> Tensor:
    """The model's output if its index-th ReLU, in order of execution, gave zeros."""
    seen = 0

    class Zeroing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal seen
            result = func(*args, **(kwargs or {}))
            if getattr(func, "__name__", "") in ("relu", "relu_"):
                if seen == index:
                    result.zero_()
                seen += 1
            return result

    with torch.no_grad(), Zeroing():
        return model(X.clone())  # type: ignore[no-any-return]


def test_untraceable_models_keep_module_replacement_and_name_the_rest() -> None:
    found = rewrite(Untraceable().eval(), X)
    assert [site.name for site in found.sites] == ["relu:0"]
    assert [entry.name for entry in found.unreachable] == ["Untraceable (relu)"]
    assert "cannot be traced" in found.unreachable[0].reason


def test_a_shared_module_in_an_untraceable_forward_gets_one_bound_and_a_note() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.relu = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(int(x.shape[0] > 0) + 1):
                x = self.relu(self.fc(x))
            return x if bool(x.sum() > -1) else -x

    model = Model().eval()
    found = rewrite(model, X)
    assert [(site.name, site.calls) for site in found.sites] == [("relu:0", 2)]
    hardened = harden(model, Ranger(), data=[(X, torch.randint(4, (6,)))])
    assert any("relu:0 runs 2 times" in note for note in hardening_report(hardened).notes)


def test_a_shared_block_gets_one_bound_a_call_site_and_a_note() -> None:
    found = rewrite(SameBlockTwice().eval(), X)
    assert [(site.name, site.calls) for site in found.sites] == [("block.relu:0", 2)]


def test_a_module_called_from_two_forwards_gets_two_bounds() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.relu = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.fc(x))  # type: ignore[no-any-return]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner.relu(self.inner(x) - 0.1)  # type: ignore[no-any-return]

    model = Outer().eval()
    found = rewrite(model, X)
    assert [(site.name, site.calls) for site in found.sites] == [("inner.relu:0", 1), ("inner.relu:1", 1)]
    assert same(model, found.model)


def test_one_relu_under_several_names_gets_a_bound_for_each() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu).eval()
    found = rewrite(model, X)
    assert [site.module for site in found.sites] == ["1", "3"]


def test_a_module_held_outside_the_tree_is_listed() -> None:
    model = HiddenReference().eval()
    with pytest.warns(fp.FlipproofWarning, match=r"1 activations are not bounded(.|\n)*HiddenReference \(relu\)"):
        hardened = harden(model, Ranger(), data=[(X, torch.randint(4, (6,)))])
    assert [site.name for site in hardening_report(hardened).sites] == ["shown:0"]
    with pytest.raises(ModelError, match="HiddenReference"):
        harden(model, Ranger(), data=[(X, torch.randint(4, (6,)))], strict=True)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell])
def test_recurrent_kernels_are_listed(kind: type[nn.Module]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.out = kind(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.recurrent(x)[0]
            return self.out(torch.tanh(hidden))  # type: ignore[no-any-return]

    found = rewrite(Model().eval(), X)
    assert [site.name for site in found.sites] == ["tanh:0"]
    assert [entry.name for entry in found.unreachable] == [f"recurrent ({kind.__name__})"]
    assert "one kernel" in found.unreachable[0].reason
    assert found.unreachable[0].reason.endswith("fp.AVC() opens it")
    with pytest.raises(ModelError, match=r"can be bounded: 1 \(\w+\): \w+ computes its gates .* fp\.AVC\(\) opens it$"):
        rewrite(nn.Sequential(nn.Identity(), kind(4, 5)).eval(), X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_gates_that_torch_ao_hides_are_listed() -> None:
    ao: Any = torch.ao.quantization
    model = ao.quantize_dynamic(nn.Sequential(nn.LSTM(4, 5)), {nn.LSTM}, dtype=torch.qint8)
    with pytest.raises(ModelError, match=r"0 \(LSTM\): LSTM computes its gates .* harden the floating-point model"):
        rewrite(model.eval(), torch.randn(6, 2, 4))


def test_nothing_found_is_an_error() -> None:
    with pytest.raises(ModelError, match="no activation of this model can be bounded"):
        rewrite(nn.Linear(4, 3), X)
    with pytest.raises(ModelError, match="itself an activation"):
        rewrite(nn.ReLU(), X)
    with pytest.raises(DataError, match="rejects the calibration data"):
        rewrite(SharedReLU(), torch.randn(2, 7))


def test_hardening_twice_is_refused() -> None:
    once = harden(SharedReLU(), Ranger(), data=[(X, torch.randint(3, (6,)))])
    with pytest.raises(ModelError, match="hardened already"):
        harden(once, Ranger(), data=[(X, torch.randint(3, (6,)))])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [SharedReLU, Functional, CallsBlocks, Dropping, Untraceable])
def test_copies_pickles_and_state_dicts(make: Callable[[], nn.Module], training: bool, tmp_path: Any) -> None:
    model = make().double().train(training)
    x = X.double()
    data = [(x, torch.randint(3, (6,)))]
    if make is Untraceable:
        with pytest.warns(fp.FlipproofWarning):
            hardened = harden(model, Ranger(per="neuron"), data=data)
    else:
        hardened = harden(model, Ranger(per="neuron"), data=data)
    assert [m.training for m in hardened.modules()].count(not training) == 0
    assert {p.dtype for p in hardened.parameters()} == {torch.float64}
    assert model.state_dict().keys() < hardened.state_dict().keys()
    hardened.load_state_dict(model.state_dict(), strict=False)
    torch.save(hardened, tmp_path / "model.pt")
    others = [
        copy.deepcopy(hardened),
        copy.copy(hardened),
        pickle.loads(pickle.dumps(hardened)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for other in others:
        assert other.state_dict().keys() == hardened.state_dict().keys()
        assert [m.training for m in other.modules()] == [m.training for m in hardened.modules()]
        assert hardening_report(other) == hardening_report(hardened)
        assert isinstance(other, make)
        assert type(other).__name__ == make.__name__
        assert same(other.eval(), hardened.eval(), 3 * x)
        hardened.train(training)
    fresh = harden(model, Ranger(per="neuron"), data=data) if make is not Untraceable else copy.deepcopy(hardened)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(hardened.state_dict())
    assert same(fresh.eval(), hardened.eval(), 3 * x)


def test_a_copy_owns_its_thresholds() -> None:
    hardened = harden(SharedReLU(), Ranger(), data=[(X, torch.randint(3, (6,)))]).eval()
    other = copy.deepcopy(hardened)
    before = hardened(X)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "threshold" in name:
                parameter.zero_()
    assert torch.equal(hardened(X), before)
    assert not torch.equal(other(X), before)


def test_training_behaviour_survives_rewriting() -> None:
    hardened = harden(Dropping(), Ranger(), data=[(X, torch.randint(4, (6,)))])
    assert hardened.training
    torch.manual_seed(3)
    dropped = hardened(X)
    torch.manual_seed(3)
    expected = F.dropout(F.relu(hardened.fc(X)), 0.5, True)
    assert torch.equal(dropped, expected)
    hardened.eval()
    assert torch.equal(hardened(X), F.relu(hardened.fc(X)))


def test_hooks_keep_firing() -> None:
    model = CallsBlocks().eval()
    fired: list[str] = []
    model.a.register_forward_hook(lambda *_: fired.append("composite"))
    model.a.fc.register_forward_pre_hook(lambda *_: fired.append("leaf"))
    model.register_forward_hook(lambda *_: fired.append("root"))
    hardened = harden(model, Ranger(), data=[(X, torch.randint(4, (6,)))])
    fired.clear()
    hardened(X)
    assert sorted(fired) == ["composite", "leaf", "root"]

    shared = SharedReLU().eval()
    shared.relu.register_forward_hook(lambda *_: fired.append("activation"))
    hardened = harden(shared, Ranger(), data=[(X, torch.randint(3, (6,)))])
    fired.clear()
    hardened(X)
    assert fired == ["activation", "activation"]


def test_another_kind_of_call_is_refused_rather_than_unbounded() -> None:
    found = rewrite(CallsBlocks().eval(), X).model
    found.a(X, 0.5)
    with pytest.raises(ModelError, match=r"hardened for calls with .* got scale=2\.0"):
        found.a(X, 2.0)
    with pytest.raises(ModelError, match="skip=Tensor"):
        found.a(X, 0.5, skip=X)
    with pytest.raises(ModelError, match="skip=None"):
        found.b(X)


class MakesATensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x)) + torch.ones(4)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.runs = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return F.relu(self.fc(x))


class SwitchesGradientsOff(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x * 2
        return F.relu(self.fc(x))


class Alternates(nn.Module):
    """Calls its block once with and once without an activation after it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.tanh = nn.Linear(4, 4), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.tanh(F.relu(self.fc(x)) if x.shape[0] == 6 else self.fc(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (MakesATensor, "makes a tensor"),
        (Counts, "changes its own attributes"),
        (SwitchesGradientsOff, "switches gradients"),
    ],
)
def test_what_a_trace_would_get_wrong_is_refused(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(make(), nn.ReLU()).eval()
    found = rewrite(model, X)
    assert [site.name for site in found.sites] == ["1:0"]
    assert [entry.name for entry in found.unreachable] == ["0 (relu)"]
    assert reason in found.unreachable[0].reason
    assert type(found.model[0]) is make
    assert same(model, found.model)
    if make is Counts:
        assert isinstance(found.model[0].runs, int)


class LooksAtItsCaller(nn.Module):
    """Computes something else while it is traced: the kind of forward that only a comparison of outputs catches."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x)) * (2.0 if isinstance(x, fx.Proxy) else 1.0)


def test_a_rewritten_forward_that_computes_something_else_is_taken_back() -> None:
    model = nn.Sequential(LooksAtItsCaller(), Block(), nn.ReLU()).eval()
    found = rewrite(model, X)
    assert [site.name for site in found.sites] == ["1.relu:0", "2:0"], "the others stay rewritten"
    assert [(entry.name, entry.reason) for entry in found.unreachable] == [
        ("0 (relu)", "computes something else once it is rewritten")
    ]
    assert type(found.model[0]) is LooksAtItsCaller
    assert same(model, found.model)
    assert found.model.state_dict().keys() == model.state_dict().keys(), "nothing is left of the attempt"


def test_data_dependent_shapes_never_leave_a_function_unbounded_in_silence() -> None:
    found = rewrite(Alternates().eval(), X)
    assert [site.name for site in found.sites] == ["tanh:0"]
    assert [entry.name for entry in found.unreachable] == ["Alternates (relu)"]
    assert "cannot be traced" in found.unreachable[0].reason


def test_results_of_in_place_functions_may_be_ignored() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), nn.SiLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            F.relu_(x)
            y = x * 1
            self.act(y)
            return x + y

    model = Model().eval()
    for method in (Ranger(), Ranger(replace="zero")):
        hardened = harden(model, method, data=[(X, torch.randint(4, (6,)))])
        assert same(model, hardened)
        with torch.no_grad():
            hardened.fc.weight.fill_(1e30)
            assert float(hardened(X).abs().max()) < 100


def test_graph_modules_are_rewritten_in_their_graph() -> None:
    traced = fx.symbolic_trace(Functional().eval())
    found = rewrite(traced, X)
    assert len(found.sites) == 5
    assert same(traced, found.model)
    again = pickle.loads(pickle.dumps(found.model))
    assert same(again, found.model)


def test_exported_programs_can_be_hardened() -> None:
    module = torch.export.export(SharedReLU().eval(), (X,)).module()
    found = rewrite(module, X)
    assert len(found.sites) == 2


def test_transformer_layers_are_reached_through_their_attribute() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(24, 3)
    ).eval()
    x = torch.randn(5, 3, 8)
    hardened = harden(model, Ranger(slack=4.0), data=[(x, torch.randint(3, (5,)))])
    assert [site.name for site in hardening_report(hardened).sites] == [
        "0.layers.0.activation:0",
        "0.layers.1.activation:0",
    ]
    with torch.no_grad():
        assert torch.allclose(hardened(x), model(x), atol=1e-5)
        hardened.get_submodule("0.layers.1.activation").threshold.zero_()
        without = copy.deepcopy(model)
        without[0].layers[1].linear2.weight.zero_()
        assert torch.allclose(hardened(x), without(x), atol=1e-5), "PyTorch's fused path would skip the bound"


def test_torchscript_children_are_listed() -> None:
    with pytest.warns(FutureWarning):
        script = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    found = rewrite(nn.Sequential(script, nn.Tanh()).eval(), X)
    assert [site.name for site in found.sites] == ["1:0"]
    assert any("TorchScript" in entry.reason for entry in found.unreachable)


def test_compiled_models_are_refused() -> None:
    with pytest.raises(ModelError, match="compile the result"):
        rewrite(torch.compile(SharedReLU()), X)


@pytest.mark.parametrize(("make", "shape", "count"), [(digits_cnn, (2, 1, 8, 8), 3), (resnet18, (2, 3, 32, 32), 17)])
def test_our_own_networks(make: Callable[[], nn.Module], shape: tuple[int, ...], count: int) -> None:
    model = make().eval()
    x = torch.randn(shape)
    found = rewrite(model, x)
    assert len(found.sites) == count
    assert found.unreachable == []
    assert same(model, found.model, x)


@pytest.mark.parametrize(
    ("name", "size", "count"), [("resnet18", 64, 17), ("mobilenet_v3_small", 64, 42), ("googlenet", 64, 57)]
)
def test_torchvision_networks(name: str, size: int, count: int) -> None:
    models = pytest.importorskip("torchvision.models")
    model = getattr(models, name)(weights=None, **({"init_weights": False} if name == "googlenet" else {})).eval()
    x = torch.randn(2, 3, size, size)
    hardened = harden(model, Ranger(), data=[(x, torch.randint(10, (2,)))])
    report = hardening_report(hardened)
    assert len(report.sites) == count
    assert report.unreachable == ()
    assert all(site.calls == 1 for site in report.sites)
    assert same(model, hardened, x)
    if name == "resnet18":
        assert sum(isinstance(module, Saturate) for module in hardened.modules()) == 17
        with torch.no_grad():
            exported = torch.export.export(hardened, (x,)).module()
            assert torch.allclose(exported(x), hardened(x), atol=1e-5)
            assert same(pickle.loads(pickle.dumps(hardened)), hardened, x)
            assert fx.symbolic_trace(hardened)(x).shape == (2, 1000), "campaigns cache activations through a trace"
