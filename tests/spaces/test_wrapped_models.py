"""Models inside others: compiled, traced, exported, parallel. Faults reach what runs, or a sentence says what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import flipproof as fp
from flipproof.errors import ConfigError, FaultSpaceError
from flipproof.spaces.parameters import FaultSpace

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WRAPPED: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "compiled": lambda net, x: torch.compile(net, backend="eager"),
    "parallel": lambda net, x: nn.DataParallel(net),
    "exported": lambda net, x: torch.export.export(net, (x,)).module(),
    "traced": lambda net, x: fx.symbolic_trace(net),
    "exported, inside": lambda net, x: nn.Sequential(torch.export.export(net, (x,)).module(), nn.Identity()),
}


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()


def inputs() -> Tensor:
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", WRAPPED)
def test_records_are_those_of_the_model_that_was_wrapped(kind):
    x = inputs()
    data = [(x, network()(x).argmax(dim=1))]
    setup = {"faults": fp.RandomBits([1, 8]), "trials": 10, "audit": 1.0}
    plain = fp.assess(network(), data, **setup).trials
    wrapped = WRAPPED[kind](network(), x)
    flags = {name: module.training for name, module in wrapped.named_modules()}
    found = fp.assess(wrapped, data, **setup).trials
    columns = [name for name in plain.columns if name != "seconds"]
    assert found[columns].equals(plain[columns])
    assert found["masked"].min() < 12
    assert {name: module.training for name, module in wrapped.named_modules()} == flags
    assert FaultSpace(wrapped).coverage == FaultSpace(network()).coverage


def test_what_no_step_of_a_traced_graph_reads_is_not_counted():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    exported = torch.export.export(Net().eval(), (torch.zeros(2, 4),)).module()
    space = FaultSpace(exported)
    assert [site.name for site in space.sites] == ["used.weight", "used.bias"]
    never = "a graph was traced of the model, and no step of it reads this"
    assert space.left_out == {"spare.weight": never, "spare.bias": never}
    assert space.coverage == 1
    inside = FaultSpace(nn.Sequential(exported))
    assert inside.left_out == {"0.spare.weight": never, "0.spare.bias": never}

    class Around(nn.Module):
        """Goes past the graph."""

        def __init__(self) -> None:
            super().__init__()
            self.graph = exported

        def forward(self, x: Tensor) -> Tensor:
            return self.graph(x) + nn.functional.linear(x, self.graph.spare.weight)

    assert FaultSpace(Around()).left_out == {}


def test_what_a_traced_graph_reads_through_a_decoder_is_read():
    """The graph reads `0.weight`, which is computed from packed words, or from two parameters."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(torch.relu(self.one(x)), self.two.weight, self.two.bias)

    for make in (
        lambda net: fp.pack_(net, fp.Affine(8)),
        lambda net: nn.utils.parametrizations.weight_norm(net.two) and net,
    ):
        plain, traced = make(Net().eval()), make(fx.symbolic_trace(Net().eval()))
        assert FaultSpace(traced).bits == FaultSpace(plain).bits
        assert {site.name for site in FaultSpace(traced).sites} == {site.name for site in FaultSpace(plain).sites}
        assert FaultSpace(traced).coverage == 1


def test_a_program_is_no_module():
    program = torch.export.export(network(), (inputs(),))
    with pytest.raises(FaultSpaceError, match=r"got ExportedProgram; pass its \.module\(\)"):
        FaultSpace(program)
    with pytest.raises(ConfigError, match=r"takes a torch\.nn\.Module first.*; pass its \.module\(\)"):
        fp.assess(program, [], faults=fp.RandomBits(1))


def test_compiled_code_that_copies_its_weights_is_refused():
    import torch._inductor.config as inductor

    compiled = torch.compile(network(), backend="eager")
    assert FaultSpace(compiled).coverage < 1
    with inductor.patch(freezing=True):
        with pytest.raises(FaultSpaceError, match=r"this model is compiled with torch\._inductor\.config\.freezing"):
            FaultSpace(compiled)
        with pytest.raises(FaultSpaceError, match=r"^1 of this model is compiled"):
            FaultSpace(nn.Sequential(nn.Linear(8, 8), compiled))
        FaultSpace(network())


def test_an_exported_model_keeps_its_refusal_to_change_modes():
    exported = torch.export.export(network(), (inputs(),)).module()
    fp.assess(exported, [(inputs(), torch.arange(12) % 3)], faults=fp.RandomBits(1), trials=1)
    with pytest.raises(NotImplementedError, match="eval"):
        exported.eval()
