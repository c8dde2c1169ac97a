"""Acceptance on samples that nothing was fitted to, slack that unseen inputs need, room for rounding, NaN, refusals."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flipproof as fp
from flipproof.errors import ConfigError, ModelError
from flipproof.hardening.bounds.bounded import Bounded
from flipproof.hardening.fitting._slack import widened
from flipproof.hardening.fitting.acceptance import Acceptance, paired_interval
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.hardening.fitting.profile import Range
from flipproof.hardening.harden import harden
from flipproof.hardening.methods.base import Hardening
from flipproof.hardening.overhead import wait_for
from flipproof.hardening.report import hardening_report

Data = list[tuple[Tensor, Tensor]]

# --- the interval --------------------------------------------------------------------------------------------------


def test_newcombes_own_examples() -> None:
    """Statistics in Medicine 17 (1998), 2635, table II, method 10: both right, lost, won, both wrong."""
    assert paired_interval(12, 2, 36, 50) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    low, high = paired_interval(0, 0, 150, 150)
    assert low == pytest.approx(-high)
    assert 0.02 < high < 0.026, "nothing lost of 150 is compatible with a loss of one in fifty"


@pytest.mark.parametrize(
    ("lost", "won", "right"), [(0.05, 0.0, 0.9), (0.02, 0.02, 0.9), (0.1, 0.02, 0.5), (0.0, 0.0, 0.9)]
)
def test_the_interval_covers_the_true_drop(lost: float, won: float, right: float) -> None:
    """Summed over every possible table of 40 samples."""
    n, covered = 40, 0.0
    chances = (lost, won, right, 1 - lost - won - right)
    for a, b, c in itertools.product(range(n + 1), repeat=3):
        d = n - a - b - c
        if d < 0 or any(k and not p for k, p in zip((a, b, c, d), chances, strict=True)):
            continue
        log = math.lgamma(n + 1) - sum(math.lgamma(k + 1) for k in (a, b, c, d))
        chance = math.exp(log + sum(k * math.log(p) for k, p in zip((a, b, c, d), chances, strict=True) if k))
        if chance < 1e-7:
            continue
        low, high = paired_interval(a, b, c, n)
        covered += chance * (low <= lost - won <= high)
    assert covered > 0.94


# --- heavy tails and memorised labels: what this is for -------------------------------------------------------------


BANDS = 60


def heavy(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tones of log-normal loudness, each in the band of its class: one in ten is louder than all ten heard before."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(n) % BANDS
    tones = nn.functional.one_hot(classes, BANDS) * (0.5 + torch.rand(n, BANDS, generator=generator))
    loud = torch.exp(0.7 * torch.randn(n, 1, generator=generator))
    return loud * tones + 0.1 * torch.rand(n, BANDS, generator=generator), classes


@pytest.fixture(scope="module")
def memorised() -> tuple[nn.Module, Data, tuple[Tensor, Tensor]]:
    """A filter bank and a classifier trained on the 600 calibration inputs until it has them right; unseen inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(BANDS, BANDS), nn.ReLU(), nn.Linear(BANDS, BANDS))
        with torch.no_grad():
            net[0].weight.copy_(torch.diag(0.5 + torch.rand(BANDS)))
            net[0].bias.fill_(-0.12)
        x, y = heavy(600, 1)
        optimiser = torch.optim.Adam(net[2].parameters(), 0.01)
        for start in range(0, 18_000, 100):
            part = slice(start % 600, start % 600 + 100)
            optimiser.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(net(x[part]), y[part]))
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return net.eval(), [(x[:300], y[:300]), (x[300:], y[300:])], heavy(4000, 2)


def unseen_loss(net: nn.Module, safe: nn.Module, unseen: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        before, after = ((model(unseen[0]).argmax(1) == unseen[1]).double().mean() for model in (net, safe))
    return float(before - after)


ALL: list[Hardening] = [
    fp.Guard(),
    fp.Guard(per="neuron", replace="bound"),
    fp.Ranger(),
    fp.Ranger(replace="zero"),
    fp.Ranger(per="neuron", replace="zero"),
    fp.AVC(),
    fp.FTClipAct(points=2, rounds=1, trials=1, samples=32, bers=(1e-3,)),
    fp.FitAct(epochs=1),
    fp.ProAct(epochs=1, epochs_last=1),
]


@pytest.mark.filterwarnings("ignore:.*costs accuracy:flipproof.FlipproofWarning")
@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_unseen_inputs_lose_no_more_than_the_report_says(method: Hardening, memorised: Any) -> None:
    net, data, unseen = memorised
    safe = harden(net, method, data=data)
    judged = hardening_report(safe).judged
    assert judged is not None
    assert judged.samples == 150
    loss = unseen_loss(net, safe, unseen)
    assert loss <= judged.high, f"{judged}, and unseen inputs lose {loss:.3f}"
    if type(method) in (fp.Guard, fp.Ranger, fp.AVC):
        assert loss < 0.005, "no default costs accuracy"


@pytest.mark.parametrize("method", [fp.Guard(slack=1.0), fp.Ranger(per="neuron", replace="zero", slack=1.0)], ids=repr)
def test_bounds_at_the_largest_values_cost_accuracy_and_say_so(method: Hardening, memorised: Any) -> None:
    """As published. Judged on what they were fitted to, these lose nothing; unseen inputs lose a lot."""
    net, data, unseen = memorised
    with pytest.warns(fp.FlipproofWarning, match=r"costs accuracy: without faults, on 150 held-out samples"):
        safe = harden(net, method, data=data)
    report = hardening_report(safe)
    fit, _ = Calibration.read(net, data, torch.device("cpu")).split(0.25, 0)
    assert fit.accuracy == fit.accuracy_of(safe), "what was reported until now"
    loss = unseen_loss(net, safe, unseen)
    assert loss > 0.05
    assert report.judged is not None
    assert report.judged.low <= loss <= report.judged.high
    assert report.clean_drop == report.judged.drop > 0.01


def test_held_out_samples_are_fitted_to_by_nothing(memorised: Any) -> None:
    """The largest activation of all lies in a held-out sample: with slack 1 no bound may know of it."""
    net, data, _ = memorised
    whole = Calibration.read(net, data, torch.device("cpu"))
    _, held = whole.split(0.25, 0)
    loud = held.batches.inputs[0][0]
    louder = [(torch.where((x == loud).all(1, keepdim=True), 100 * x, x), y) for x, y in data]
    plain, shifted = (harden(net, fp.Ranger(per="neuron", slack=1.0), data=d) for d in (data, louder))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), shifted.parameters(), strict=True))
    again = harden(net, fp.Ranger(per="neuron", slack=1.0, seed=1), data=data)
    assert not all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))


def test_the_report_says_all_of_it(memorised: Any, tmp_path: Any) -> None:
    net, data, _ = memorised
    with torch.no_grad():
        data = [(x, net(x).argmax(1)) for x, _ in data]
    safe = harden(net, fp.Guard(), data=data)
    report = hardening_report(safe)
    assert report.slack is not None
    assert report.slack > 1
    text = str(report)
    assert "on 150 held-out samples" in text
    assert f"bounds lie at {report.slack:g} × the largest values seen" in text
    assert "if it was trained on them" in text
    path = fp.save_hardened(safe, tmp_path / "safe.safetensors")
    assert hardening_report(fp.load_hardened(net, path)).judged == report.judged
    json.dumps(vars(report.judged))


def test_counts_are_those_of_the_pairs() -> None:
    class Fixed(nn.Module):
        def __init__(self, scores: Tensor) -> None:
            super().__init__()
            self.scores = nn.Parameter(scores)

        def forward(self, x: Tensor) -> Tensor:
            return self.scores[x]

    before = torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    after = torch.tensor([[9.0, 0.0], [9.5, 9.0], [9.0, 0.5], [4.0, 0.0], [9.0, 8.0]])
    held = Calibration.read(Fixed(before), [(torch.arange(5), torch.tensor([0, 1, 0, 0, 0]))], torch.device("cpu"))
    found = Acceptance.of(held, Fixed(after))
    assert (found.right, found.lost, found.won, found.changed, found.disturbed) == (4, 1, 1, 2, 3)
    assert found.drop == 0.0
    assert not found.costs


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.rnn(x)[0][-1]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("steps", [5, 12])
def test_sequence_first_samples_are_cut_out_of_the_second_dimension(steps: int) -> None:
    """Also where a batch has as many steps as samples, so that shapes say nothing."""
    torch.manual_seed(0)
    net, x = Recurrent(), torch.randn(steps, 24, 4)
    data = [(x[:, :12], torch.arange(12) % 3), (x[:, 12:], torch.arange(12) % 3)]
    whole = Calibration.read(net, data, torch.device("cpu"))
    assert whole.cut == (1,)
    fit, held = whole.split(0.25, 0)
    assert (fit.samples, held.samples) == (18, 6)
    assert held.batches.inputs[0].shape == (steps, 6, 4)
    assert torch.allclose(held.outputs(net), held.teacher, atol=1e-6)
    firsts = Calibration.read(nn.Sequential(nn.Linear(4, 3)), [(x[0, :12], torch.arange(12) % 3)], torch.device("cpu"))
    assert firsts.cut == (0,)


def test_samples_that_depend_on_their_batch_stay_together() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(dim=0)

    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), Centred())
    torch.manual_seed(0)
    data = [(torch.randn(10, 4), torch.arange(10) % 3) for _ in range(4)]
    whole = Calibration.read(net, data, torch.device("cpu"))
    assert whole.cut is None
    assert whole.split(0.25, 0)[1].batches.sizes == (10,)
    report = hardening_report(harden(net, fp.Ranger(slack=3.0), data=data))
    assert any("batch 1 was not held against batch N" in note for note in report.notes)
    with pytest.raises(fp.errors.DataError, match="whose samples cannot be taken apart, cannot be split"):
        harden(net, fp.Ranger(), data=data[:1])


# --- slack ---------------------------------------------------------------------------------------------------------


def test_slack_moves_bounds_by_their_own_size_and_silent_neurons_by_the_mean() -> None:
    high = torch.tensor([0.0, 2.0, 4.0])
    seen = Range(torch.tensor(0.0), torch.tensor(4.0), torch.zeros(3), high, {(3,)}, 1, torch.zeros(3), high)
    low, up = widened(seen, "neuron", 2.0, rounding=False)
    assert up.tolist() == [2.0, 4.0, 8.0]
    assert low.tolist() == [0.0, -0.5, -1.0], "a quarter of the span, where the lower end is 0"
    same = widened(seen, "neuron", 1.0, rounding=False)
    assert torch.equal(same[1], high)
    room = widened(seen, "neuron", 1.0)[1] - high
    assert room.tolist() == pytest.approx([0.002, 0.002, 0.004], rel=1e-3), "a thousandth, for rounding"
    assert bool(torch.isfinite(widened(Range(high[0], torch.tensor(3e38), None, None, set()), "layer", 16.0)[1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_many_units_in_the_last_place(dtype: torch.dtype) -> None:
    value = torch.tensor(4.0, dtype=dtype)
    up = widened(Range(torch.zeros_like(value), value, None, None, set()), "layer", 1.0)[1]
    assert float(up - value) >= 16 * 4 * torch.finfo(dtype).eps * 0.99


@pytest.mark.parametrize(
    "bad", [{"slack": 0.9}, {"slack": float("inf")}, {"held_out": 0.0}, {"held_out": 1.0}, {"seed": -1}]
)
@pytest.mark.parametrize("method", [fp.Ranger, fp.Guard, fp.AVC, fp.FTClipAct, fp.FitAct, fp.ProAct])
def test_nonsense_is_refused(method: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=method.__name__):
        method(**bad)


# --- rounding ------------------------------------------------------------------------------------------------------


def at_the_bound() -> tuple[nn.Module, Data]:
    """Every input is at the maximum of some channel: rounding alone decides on which side of a tight bound it falls."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(257, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        net[2].weight.mul_(30)
    x = torch.randn(1, 257).repeat(60, 1)
    return net, [(x[:37], torch.arange(37) % 4), (x[37:], torch.arange(23) % 4)]


def test_batch_1_and_batch_n_agree_although_activations_lie_at_the_maximum() -> None:
    net, data = at_the_bound()
    x = data[0][0]
    with torch.no_grad():
        alone = torch.cat([net(row[None]) for row in x])
        plain = float((net(x) - alone).abs().max())
    if plain == 0:
        pytest.skip("this machine rounds alike in every batch size")
    for method in (fp.Guard(), fp.Ranger(replace="zero"), fp.Ranger(per="neuron", replace="zero"), fp.AVC()):
        safe = harden(net, method, data=data)
        with torch.no_grad():
            one = torch.cat([safe(row[None]) for row in x])
            assert float((safe(x) - one).abs().max()) <= 10 * plain
            assert torch.allclose(safe(x), net(x), atol=10 * plain), "nothing is cut off right values"


@pytest.mark.filterwarnings("ignore:.*costs accuracy:flipproof.FlipproofWarning")
def test_bounds_without_room_are_warned_about_by_layer() -> None:
    net, data = at_the_bound()
    with pytest.warns(fp.FlipproofWarning, match=r"right values lie at the bounds of 1:0 and rounding carries them"):
        harden(net, fp.Guard(slack=1.0, outputs=False), data=data)


# --- one bound a call site -----------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """As in torchvision's resnet50: one nn.ReLU, called three times, at two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.one(x))
        out = self.relu(self.two(out))
        return self.relu(self.three(out) + x)  # type: ignore[no-any-return]


def bottlenecks() -> tuple[nn.Module, Data]:
    torch.manual_seed(0)
    net = nn.Sequential(Bottleneck(), Bottleneck(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    x = torch.randn(40, 8, 6, 6).abs()
    return net, [(x[:20], torch.arange(20) % 3), (x[20:], torch.arange(20) % 3)]


@pytest.mark.parametrize(
    ("method", "shapes"),
    [
        (fp.Guard(slack=1.0), [(4, 1, 1), (4, 1, 1), (8, 1, 1)]),
        (fp.Ranger(per="neuron", slack=1.0), [(4, 6, 6), (4, 6, 6), (8, 6, 6)]),
        (fp.FitAct(epochs=1, slack=1.0, budget=0.9), [(4, 6, 6), (4, 6, 6), (8, 6, 6)]),
        (fp.ProAct(epochs=1, epochs_last=1, slack=1.0, budget=0.9), [(), (), ()]),
        (fp.Ranger(slack=1.0), [(), (), ()]),
        (fp.AVC(slack=1.0), [(), (), ()]),
    ],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.filterwarnings("ignore:.*costs accuracy:flipproof.FlipproofWarning")
@pytest.mark.filterwarnings("ignore:.*rounding carries them:flipproof.FlipproofWarning")
def test_a_shared_relu_gets_one_bound_a_call_at_its_own_width(
    method: Hardening, shapes: list[tuple[int, ...]], fitted_on: Any
) -> None:
    net, data = bottlenecks()
    safe = harden(net, method, data=data)
    sites = hardening_report(safe).sites
    assert [site.calls for site in sites] == [1] * 6
    found = [tuple(safe.get_submodule(site.module).threshold.shape) for site in sites]
    assert found[:3] == shapes
    if type(method) in (fp.Guard, fp.Ranger):  # bounds are those of the call, and of no other call of the same module
        x = torch.cat([inputs for inputs, _ in fitted_on(net, data, method)])
        block = net[0]
        with torch.no_grad():
            first = torch.relu(block.one(x))
            second = torch.relu(block.two(first))
            third = torch.relu(block.three(second) + x)
        for site, value in zip(sites, (first, second, third), strict=False):
            bound = safe.get_submodule(site.module).threshold
            places = [d for d in range(1, 4) if bound.dim() and bound.shape[d - 1] == 1] if bound.dim() else [1, 2, 3]
            assert torch.allclose(bound.flatten(), value.amax(dim=[0, *places]).flatten(), rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet50", "fcn_resnet50"])
def test_torchvision_networks_with_shared_relu_are_guarded(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    if name == "resnet50":
        net, output = models.resnet50(weights=None, num_classes=4).eval(), None
    else:
        net = models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=4).eval()
        output = lambda found: found["out"].mean((2, 3))  # noqa: E731
    data = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    report = hardening_report(harden(net, fp.Guard(slack=4.0), data=data, output=output))
    assert len(report.sites) == {"resnet50": 49, "fcn_resnet50": 50}[name]
    assert report.unreachable == ()
    assert all(site.calls == 1 for site in report.sites)


# --- NaN -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
@pytest.mark.filterwarnings("ignore:.*costs accuracy:flipproof.FlipproofWarning")
def test_nan_passes_no_bound_of_a_shared_relu(method: Hardening) -> None:
    net, data = bottlenecks()
    safe = harden(net, method, data=data)
    seen: list[Tensor] = []
    for site in hardening_report(safe).sites:
        bound = safe.get_submodule(site.module)
        assert isinstance(bound, Bounded)
        bound.register_forward_hook(lambda module, args, result: seen.append(result.clone()))
    broken = (float("nan"), float("inf"), -float("inf"))
    for name, value in itertools.product(("0.one.weight", "0.two.bias", "1.three.weight"), broken):
        with torch.no_grad():
            parameter = safe.get_parameter(name)
            kept = parameter.clone()
            parameter[0] = value
            safe(data[0][0])
            parameter.copy_(kept)
    assert len(seen) == 54
    assert all(bool(torch.isfinite(result).all()) for result in seen)


# --- refused in one sentence ---------------------------------------------------------------------------------------


class Own(Tensor):
    """Stands for a weight that a quantisation library packed."""


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def of_own_type() -> nn.Module:
    net = small()
    net[0].weight = nn.Parameter(net[0].weight.detach().as_subclass(Own), requires_grad=False)
    return net


def statically_quantised() -> nn.Module:
    ao = torch.ao.quantization
    net = nn.Sequential(ao.QuantStub(), *small(), ao.DeQuantStub()).eval()
    net.qconfig = ao.get_default_qconfig(torch.backends.quantized.engine)
    ao.prepare(net, inplace=True)
    net(torch.randn(8, 4))
    return ao.convert(net)  # type: ignore[no-any-return]


def exported() -> nn.Module:
    return torch.export.export(small(), (torch.randn(8, 4),)).module()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.script(small()), "is TorchScript"),
        (lambda: torch.jit.freeze(torch.jit.script(small())), "is TorchScript"),
        (exported, "is an exported program"),
        (statically_quantised, "is quantised: integers pass there"),
        (of_own_type, r"0\.weight is a .*Own, whose stored form is its own"),
        (lambda: nn.Sequential(nn.LazyLinear(3), nn.ReLU()), r"0\.weight has no shape yet"),
    ],
)
@pytest.mark.parametrize("method", [fp.Guard(), fp.FitAct.quick()], ids=lambda m: type(m).__name__)
def test_models_that_hide_their_values_are_refused(method: Hardening, make: Any, message: str) -> None:
    data = [(torch.randn(8, 4), torch.arange(8) % 3)] * 2
    with pytest.raises(ModelError, match=message):
        harden(make(), method, data=data)


def test_several_outputs_are_refused_with_a_way_out() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: Tensor) -> Any:
            return {"a": self.net(x), "b": self.net(x)}

    data = [(torch.randn(8, 4), torch.arange(8) % 3)] * 2
    with pytest.raises(fp.errors.DataError, match=r"a dict with the keys \['a', 'b'\]; pass output="):
        harden(Two(), fp.Guard(), data=data)
    assert hardening_report(harden(Two(), fp.Guard(slack=3.0), data=data, output="b")).sites


# --- time ----------------------------------------------------------------------------------------------------------


def test_accelerators_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run on after the call has returned; each device that holds a tensor of model or inputs is waited for."""
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(str(device)))
    wait_for({torch.device("cuda", 1), torch.device("cpu"), torch.device("cuda", 0)})
    assert sorted(waited) == ["cuda:0", "cuda:1"]
