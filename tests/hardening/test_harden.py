"""The front door: what goes in, what is refused, what is promised about the copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flipproof as fp
from flipproof.datasets import digits
from flipproof.errors import ConfigError, DataError, ModelError
from flipproof.hardening.bounds.bounded import Saturate, ZeroAbove
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.hardening.fitting.profile import profile
from flipproof.hardening.fitting.work import Work
from flipproof.hardening.harden import harden
from flipproof.hardening.methods.base import Hardening
from flipproof.hardening.methods.fitact import FitAct
from flipproof.hardening.methods.ft_clipact import FTClipAct
from flipproof.hardening.methods.guard import Guard
from flipproof.hardening.methods.proact import ProAct
from flipproof.hardening.methods.ranger import Ranger
from flipproof.hardening.report import HardeningReport, hardening_report
from flipproof.hardening.rewriting.sites import rewrite
from flipproof.models import digits_cnn
from flipproof.models.training import train_classifier

Data = list[tuple[Tensor, Tensor]]
METHODS: list[Hardening] = [
    Ranger(),
    Ranger(per="neuron", replace="zero"),
    FTClipAct(points=2, rounds=1, trials=1, bers=(1e-3,)),
    FitAct(epochs=2, held_out=0.5),
    ProAct(epochs=1, epochs_last=2, held_out=0.5),
    Guard(outputs=False),
    Guard(per="neuron", replace="bound", outputs=False),
]


def slow_maxima(model: nn.Module, data: Data) -> list[list[float]]:
    """Largest value per neuron of each nn.ReLU of a Sequential, one sample and one number at a time."""
    found: list[list[float]] = []
    for inputs, _ in data:
        for sample in inputs:
            x, index = sample[None], 0
            for layer in model:  # type: ignore[attr-defined]
                x = layer(x)
                if isinstance(layer, nn.ReLU):
                    values = x[0].flatten().tolist()
                    if index == len(found):
                        found.append(values)
                    found[index] = [max(a, b) for a, b in zip(found[index], values, strict=True)]
                    index += 1
    return found


@pytest.mark.parametrize("replace", ["bound", "zero"])
@pytest.mark.parametrize("per", ["layer", "neuron"])
def test_ranger_takes_the_largest_values(per: Any, replace: Any, mlp: nn.Module, blobs: Data, fitted_on: Any) -> None:
    model = nn.Sequential(*mlp, nn.ReLU(), nn.Linear(3, 3))
    hardened = harden(model, Ranger(per=per, replace=replace, slack=1.0), data=blobs)
    blobs = fitted_on(model, blobs, Ranger())
    for site, maxima in zip(hardening_report(hardened).sites, slow_maxima(model, blobs), strict=True):
        bounded = hardened.get_submodule(site.module)
        assert type(bounded) is (Saturate if replace == "bound" else ZeroAbove)
        expected = maxima if per == "neuron" else [max(maxima)]
        assert bounded.threshold.flatten().tolist() == pytest.approx(expected, rel=1e-6)
        assert bounded.threshold.dim() == (0 if per == "layer" else 1)


def test_ranger_bounds_both_sides_of_other_activations(fitted_on: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3), nn.Sigmoid())
    x = torch.randn(30, 4)
    data = [(x[:20], torch.randint(3, (20,))), (x[20:], torch.randint(3, (10,)))]
    hardened = harden(model, Ranger(slack=1.0), data=data)
    x = torch.cat([inputs for inputs, _ in fitted_on(model, data, Ranger())])
    values = model[1](model[0](x)).detach()
    assert float(hardened[1].threshold) == pytest.approx(float(values.max()))
    assert float(hardened[1].low) == pytest.approx(float(values.min()))


def test_dead_neurons_are_no_error(mlp: nn.Module, blobs: Data) -> None:
    with torch.no_grad():
        mlp[0].bias[2] = -1e4
    hardened = harden(mlp, Ranger(per="neuron", slack=1.0), data=blobs)
    assert float(hardened[1].threshold[2]) == 0.0
    assert int((hardened[1].threshold > 0).sum()) >= 6
    roomy = harden(mlp, Ranger(per="neuron", slack=1.5), data=blobs)
    mean = float(hardened[1].threshold.mean())
    assert float(roomy[1].threshold[2]) == pytest.approx(0.5 * mean), "a multiple of 0 would be no room"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no samples"),
        (
            [(torch.randn(4, 4), torch.zeros(4, dtype=torch.int64))] * 0 + [(torch.empty(0, 4), torch.empty(0))],
            "no samples",
        ),
        ((torch.randn(4, 4), torch.zeros(4)), "one .inputs, targets. pair"),
        ([(torch.full((4, 4), float("nan")), torch.zeros(4))], "calibration batch 0 holds 16 values that are NaN"),
        (
            [(torch.randn(4, 4), torch.zeros(4)), (torch.full((1, 4), float("inf")), torch.zeros(1))],
            "calibration batch 1 holds 4 values",
        ),
        ([(torch.randn(4, 7), torch.zeros(4))], "rejects batch 0"),
        ([(torch.randn(4, 4), torch.full((4,), 9))], "label 9"),
    ],
)
def test_bad_calibration_data(data: Any, message: str, mlp: nn.Module) -> None:
    with pytest.raises(DataError, match=message):
        harden(mlp, Ranger(), data=data)


def test_models_that_give_nan_are_refused_by_name(mlp: nn.Module, blobs: Data) -> None:
    with torch.no_grad():
        mlp[0].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"first layer to do so is 0 \(Linear\)"):
        harden(mlp, Ranger(), data=blobs)


def test_infinite_activations_that_the_output_hides_are_refused() -> None:
    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.out = nn.ReLU(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(1 / (1 + self.relu(x * 3e38 * 3e38)))  # type: ignore[no-any-return]

    with pytest.raises(ModelError, match=r"relu:0 \(relu\) computes NaN or infinite"):
        harden(Hides(), Ranger(), data=[(1 + torch.rand(4, 4), torch.zeros(4))])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.filterwarnings("ignore:.*costs accuracy:flipproof.FlipproofWarning")
def test_one_batch_is_taken_apart_by_samples_and_one_sample_is_refused(
    method: Hardening, mlp: nn.Module, blobs: Data
) -> None:
    report = hardening_report(harden(mlp, method, data=blobs[:1]))
    assert len(report.sites) == 1
    assert report.judged is not None
    assert report.judged.samples == round(16 * method.held_out)
    with pytest.raises(DataError, match="1 calibration samples in 1 batches cannot be split"):
        harden(mlp, method, data=[(blobs[0][0][:1], blobs[0][1][:1])])


def test_wrong_arguments(mlp: nn.Module, blobs: Data) -> None:
    with pytest.raises(ConfigError, match=r"takes a torch\.nn\.Module first"):
        harden(Ranger(), mlp, data=blobs)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="takes a hardening"):
        harden(mlp, "ranger", data=blobs)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"takes an instance: Ranger\(\), not the class Ranger"):
        harden(mlp, blobs, Ranger)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="was not hardened by flipproof"):
        hardening_report(mlp)
    for make in (
        lambda: Ranger(per="channel"),  # type: ignore[arg-type]
        lambda: FTClipAct(points=1),
        lambda: FTClipAct(bers=(1e-5, 1e-6)),
        lambda: FitAct(epochs=0),
        lambda: FitAct(held_out=1.0),
        lambda: ProAct(temperature=0.0),
        lambda: ProAct(lr=-1.0),
        lambda: ProAct(k=-20.0),
    ):
        with pytest.raises(ConfigError):
            make()


def test_a_method_that_forgets_a_site_is_caught(mlp: nn.Module, blobs: Data) -> None:
    @dataclass(frozen=True)
    class Forgets(Hardening):
        def fit(self, work: Work) -> pd.DataFrame:
            return pd.DataFrame()

    with pytest.raises(ModelError, match="1:0 was left without a bound"):
        harden(mlp, Forgets(), data=blobs)


def test_report_and_warning_name_what_is_not_bounded() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.relu, self.unused = nn.Linear(4, 3), nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.fc(x))
            return F.gelu(x) if bool(x.sum() > -1) else self.unused(x)

    model = Partly()
    with pytest.warns(fp.FlipproofWarning) as caught:
        hardened = harden(model, Ranger(), data=[(torch.randn(8, 4), torch.randint(3, (8,)))])
    text = str(caught[0].message)
    assert "2 activations are not bounded" in text
    assert "Partly (gelu)" in text
    assert "unused:0: is not executed" in text
    report = hardening_report(hardened)
    assert isinstance(report, HardeningReport)
    assert report.table()["bounded"].tolist() == [True, False, False]
    assert "not bounded: Partly (gelu)" in str(report)
    assert type(hardened.unused) is nn.ReLU


def test_where_maps_change_their_size_bounds_are_one_a_channel() -> None:
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.conv(x)).mean(dim=(2, 3)))  # type: ignore[no-any-return]

    data = [(torch.randn(2, 1, size, size), torch.tensor([0, 1])) for size in (5, 7)]
    assert len(hardening_report(harden(Pooling(), Ranger(), data=data)).sites) == 1
    hardened = harden(Pooling(), Ranger(per="neuron"), data=data)
    report = hardening_report(hardened)
    assert hardened.get_submodule(report.sites[0].module).threshold.shape == (3, 1, 1)
    assert any("relu:0 is computed for maps of different sizes" in note for note in report.notes)


def test_thresholds_are_in_the_fault_space_and_can_be_hit(mlp: nn.Module, blobs: Data) -> None:
    """The defect of the authors' own code: layer-wise thresholds were never hit."""
    hardened = harden(mlp, Ranger(), data=blobs)
    space = fp.FaultSpace(hardened, format=fp.FixedPoint())
    assert "1.threshold" in [site.name for site in space.sites]
    assert space.bits == fp.FaultSpace(mlp, format=fp.FixedPoint()).bits + 32
    hits = fp.assess(
        hardened,
        data=blobs,
        faults=fp.BitPosition([31]),
        where=fp.Parameters(include="*.threshold"),
        format=fp.FixedPoint(),
    )
    assert hits.trials["flips"].tolist() == [1]
    with space.corrupted(space.faults([("1.threshold", 0, 31)])):
        out = hardened(blobs[0][0]).detach().clone()
    with torch.no_grad(), fp.FaultSpace(hardened, format=fp.FixedPoint()).stored():
        expected = hardened[2].bias.expand_as(out).clone()
    assert torch.equal(out, expected), "a negative bound cuts off everything, and stays finite"


def test_methods_never_see_more_than_the_calibration_data(mlp: nn.Module, blobs: Data) -> None:
    """Bounds come from `data` alone: what other samples would need is not in them."""
    extreme = [(100 * inputs, targets) for inputs, targets in blobs]
    hardened = harden(mlp, Ranger(), data=blobs)
    assert float(hardened[1].threshold) < float(mlp[1](mlp[0](extreme[0][0])).detach().max()) / 10


@pytest.fixture(scope="module")
def digits_net() -> nn.Module:
    torch.manual_seed(0)
    return train_classifier(digits_cnn(), digits("train"), epochs=6)


def test_ranger_bounds_make_a_trained_network_survive_more(digits_net: nn.Module) -> None:
    """F.relu calls, which most tools leave unprotected, are what this network is made of."""
    calibration, test = digits("train")[:3], digits("test")
    hardened = harden(digits_net, Ranger(replace="zero"), data=calibration)
    assert len(hardening_report(hardened).sites) == 3
    setup: dict[str, Any] = {"data": test, "faults": fp.BitErrorRate([1e-5]), "trials": 30, "format": fp.Float32()}
    plain, safe = fp.assess(digits_net, **setup), fp.assess(hardened, **setup)
    assert safe.golden["accuracy"] > plain.golden["accuracy"] - 0.01
    assert safe.summary["accuracy"][0] > plain.summary["accuracy"][0] + 0.1


@pytest.mark.parametrize("method", [Ranger(), Ranger(replace="zero"), FitAct(epochs=1)], ids=repr)
def test_campaigns_give_the_same_records_from_cached_activations(method: Hardening, digits_net: nn.Module) -> None:
    """A campaign starts trials from a trace of the hardened model; bounds must act there as they do when called."""
    hardened = harden(digits_net, method, data=digits("train")[:2])
    setup: dict[str, Any] = {
        "data": digits("test", batch_size=60)[:2],
        "faults": fp.BitErrorRate([1e-4]),
        "trials": 15,
        "metrics": ("accuracy",),
    }
    cached, whole = fp.assess(hardened, **setup), fp.assess(hardened, cache_bytes=0, **setup)
    columns = ["accuracy", "masked", "non_critical_sdc", "critical_sdc", "due", "digest"]
    pd.testing.assert_frame_equal(cached.trials[columns], whole.trials[columns])
    assert cached.trials["critical_sdc"].sum() > 0


@pytest.mark.parametrize("inplace", [False, True])
def test_profiles_of_inputs_are_taken_before_the_activation_overwrites_them(inplace: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=inplace), nn.Linear(6, 3)).eval()
    x = torch.randn(20, 4)
    data = [(x[:15], torch.zeros(15)), (x[15:], torch.zeros(5))]
    calibration = Calibration.read(model, data, torch.device("cpu"))
    before = model[0](x).detach()
    for of, expected in (("input", before), ("output", before.clamp_min(0))):
        (seen,) = profile(rewrite(model, x), calibration, of=of).values()  # type: ignore[arg-type]
        low, high = seen.of("neuron")
        assert torch.allclose(low, expected.amin(dim=0))
        assert torch.allclose(high, expected.amax(dim=0))
        assert float(seen.low) == pytest.approx(float(expected.min()))
        assert seen.calls == 2


def test_data_and_method_in_either_order_and_by_keyword(mlp: nn.Module, blobs: Any) -> None:
    method = Ranger()
    ways = [
        harden(mlp, blobs, method),
        harden(mlp, method, data=blobs),
        harden(mlp, blobs, method=method),
        harden(mlp, data=blobs, method=method),
    ]
    for way in ways[1:]:
        assert all(torch.equal(value, way.state_dict()[name]) for name, value in ways[0].state_dict().items())


def test_a_missing_or_doubled_method_or_data_is_named(mlp: nn.Module, blobs: Any) -> None:
    with pytest.raises(ConfigError, match="of AVC, FTClipAct, Fence, FitAct, Guard, ProAct, Ranger; got list"):
        harden(mlp, blobs)
    with pytest.raises(ConfigError, match="one and not more"):
        harden(mlp, blobs, Ranger(), method=Ranger())
    with pytest.raises(ConfigError, match=r"one set of calibration data.* got 0"):
        harden(mlp, Ranger())
    with pytest.raises(ConfigError, match=r"one set of calibration data.* got 2"):
        harden(mlp, blobs, Ranger(), data=blobs)
