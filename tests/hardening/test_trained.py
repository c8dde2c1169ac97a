"""FitAct and ProAct: what trains, on what, in which order, and what is kept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flipproof as fp
from flipproof.datasets import digits
from flipproof.engine.progress import progress_bar
from flipproof.errors import ModelError
from flipproof.hardening.bounds.bounded import Smooth
from flipproof.hardening.fitting._prefix import Prefixes
from flipproof.hardening.fitting.calibration import Calibration, cross_entropy, distillation
from flipproof.hardening.fitting.profile import profile
from flipproof.hardening.fitting.training import Schedule, Stage, train_thresholds
from flipproof.hardening.fitting.work import Work
from flipproof.hardening.harden import harden
from flipproof.hardening.methods.fitact import FitAct
from flipproof.hardening.methods.proact import ProAct
from flipproof.hardening.methods.ranger import Ranger
from flipproof.hardening.report import hardening_report
from flipproof.hardening.rewriting.sites import rewrite
from flipproof.models import digits_cnn
from flipproof.models.training import train_classifier
from flipproof.running.decision import Decision

Data = list[tuple[Tensor, Tensor]]
TEST = digits("test")
pytestmark = pytest.mark.filterwarnings("ignore:(FitAct|ProAct) costs accuracy:flipproof.FlipproofWarning")
"""These methods have a budget of accuracy, and held-out parts are small here."""


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return train_classifier(digits_cnn(), digits("train", batch_size=64), epochs=12)


@pytest.fixture(scope="module")
def calibration() -> Data:
    return digits("train")[:4]


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        right = sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in TEST)
    return right / sum(len(y) for _, y in TEST)


def test_kl_is_that_of_equation_7_by_hand() -> None:
    student, teacher, temperature = torch.randn(5, 4).double(), torch.randn(5, 4).double(), 2.5
    total = 0.0
    for row in range(5):
        p = [float(v) for v in torch.exp(student[row] / temperature)]
        q = [float(v) for v in torch.exp(teacher[row] / temperature)]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        total += sum(a * float(torch.log(torch.tensor(a / b).double())) for a, b in zip(p, q, strict=True))
    assert float(distillation(student, teacher, temperature)) == pytest.approx(total / 5, rel=1e-5)
    assert float(distillation(teacher, teacher, temperature)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("outputs", "decision", "expected"),
    [
        (torch.tensor([[1.0, 3.0]]), Decision("logits", 2, None), torch.tensor([[0.1192, 0.8808]])),
        (torch.tensor([[0.3, 0.7]]), Decision("probabilities", 2, None), torch.tensor([[0.3, 0.7]])),
        (torch.tensor([[1.0, 0.0]]), Decision("probabilities", 2, None), torch.tensor([[1.0, 0.0]])),
        (torch.tensor([2.0]), Decision("logits", 2, 0.0), torch.tensor([[0.1192, 0.8808]])),
        (torch.tensor([[0.25]]), Decision("probabilities", 2, 0.5), torch.tensor([[0.75, 0.25]])),
    ],
)
def test_every_output_convention_becomes_logits(outputs: Tensor, decision: Decision, expected: Tensor) -> None:
    assert torch.allclose(decision.logits(outputs).softmax(dim=1), expected, atol=1e-4)


def work_on(net: nn.Module, data: Data) -> tuple[Work, tuple[Calibration, Calibration]]:
    calibration = Calibration.read(net, data, torch.device("cpu"))
    rewritten = rewrite(net, data[0][0])
    work = Work(rewritten, profile(rewritten, calibration), calibration, False)
    return work, calibration.split(0.25, 0)


def test_one_step_of_training_is_adam_on_the_loss_of_equation_8(net: nn.Module, calibration: Data) -> None:
    """One batch, one epoch: compared with the same step by hand on a network written out."""
    work, (fit, held) = work_on(net, calibration)
    bounds = [work.bound(site, Smooth, seen.high) for site, seen in work.ranges.items()]
    start = [float(bound.threshold) for bound in bounds]
    gamma, lr = 1e-3, 0.05

    def loss(given: Tensor, targets: Tensor, teacher: Tensor) -> Tensor:
        return distillation(given, teacher, 2.0) + cross_entropy(given, targets, teacher)

    with progress_bar(1, 0, show=False) as step:
        rows = train_thresholds(
            work,
            Stage("by hand", [bounds[1]], Schedule(1, lr, 10, 10_000, gamma, 0.999)),
            (fit, held),
            loss,
            prefixes=Prefixes(work.model, (fit, held)),
            generator=torch.Generator().manual_seed(0),
            step=step,
        )
    bound = torch.tensor(start[1], requires_grad=True)

    def smooth(x: Tensor, threshold: Tensor) -> Tensor:
        return torch.clamp_min(x * (1 - torch.sigmoid(20 * (x - threshold))), 0)

    x = torch.cat(list(fit.batches.inputs))
    h = smooth(net.conv1(x), torch.tensor(start[0]))
    h = F.max_pool2d(smooth(net.conv2(h), bound), 2)
    out = net.fc2(smooth(net.fc1(h.flatten(1)), torch.tensor(start[2])))
    teacher = net(x)
    kl = (out / 2).softmax(1) * ((out / 2).log_softmax(1) - (teacher / 2).log_softmax(1))
    total = kl.sum() / len(x) + F.cross_entropy(out, fit.batches.targets) + gamma * bound**2
    optimiser = torch.optim.Adam([bound], lr=lr)
    torch.autograd.backward(total)
    optimiser.step()
    assert rows[0]["loss"] == pytest.approx(float(total.detach()) - gamma * start[1] ** 2, rel=1e-4)
    assert rows[0]["mean_threshold"] == pytest.approx(float(bound.detach()), abs=1e-4)
    assert [float(b.threshold) for b in (bounds[0], bounds[2])] == [start[0], start[2]], "only the chosen one moves"


def test_proact_is_hybrid_and_goes_from_the_last_layer_to_the_first(net: nn.Module, calibration: Data) -> None:
    method = ProAct(epochs=2, epochs_last=3, lr=0.1)
    hardened = harden(net, method, data=calibration)
    report = hardening_report(hardened)
    shapes = [tuple(hardened.get_submodule(site.module).threshold.shape) for site in report.sites]
    assert shapes == [(), (), (64,)], "one a neuron in the last ReLU executed, one a layer elsewhere"
    assert [site.name for site in report.sites] == ["relu:0", "relu:1", "relu:2"]
    assert report.history["stage"].tolist() == ["relu:2"] * 3 + ["relu:1"] * 2 + ["relu:0"] * 2
    assert report.thresholds == 66
    assert report.history["epoch"].tolist() == [1, 2, 3, 1, 2, 1, 2]


@pytest.mark.parametrize("method", [ProAct(epochs=6, epochs_last=6, lr=0.2), FitAct(epochs=8, lr=0.2)])
def test_thresholds_shrink_within_the_accuracy_budget(method: Any, net: nn.Module, calibration: Data) -> None:
    hardened = harden(net, method, data=calibration)
    report = hardening_report(hardened)
    kept = report.history[report.history["accepted"]]
    assert len(kept) > 0
    whole = Calibration.read(net, calibration, torch.device("cpu"))
    select = whole.split(method.held_out, 0)[0].split(method.held_out, 0)[1]
    assert kept["held_out_accuracy"].min() >= select.accuracy - 0.01 - 1e-9, "chosen on the part that decides"
    assert report.judged is not None
    assert report.judged.samples == whole.split(method.held_out, 0)[1].samples, "judged on what nothing was chosen by"
    assert report.judged.low <= 0.01
    # what is kept is what the last accepted epoch of each stage recorded
    for stage, rows in kept.groupby("stage", sort=False):
        sites = [site for site in report.sites if stage in (site.name, "all")]
        values = torch.cat([hardened.get_submodule(site.module).threshold.detach().flatten() for site in sites])
        assert float(values.double().mean()) == pytest.approx(rows["mean_threshold"].iloc[-1], rel=1e-5)
    per = "layer" if isinstance(method, ProAct) else "neuron"
    ranger = harden(net, Ranger(per=per, slack=report.slack), data=calibration)
    sizes = [
        sum(float(model.get_submodule(site.module).threshold.detach().square().sum()) for site in report.sites[:-1])
        for model in (hardened, ranger)
    ]
    assert sizes[0] < sizes[1]
    assert accuracy(hardened) > accuracy(net) - 0.03, "on test data, which nothing of this has seen"


def test_a_budget_that_no_epoch_holds_leaves_the_largest_values(net: nn.Module, calibration: Data) -> None:
    hardened = harden(net, FitAct(epochs=3, lr=50.0, budget=0.0, slack=1.5), data=calibration)
    report = hardening_report(hardened)
    assert not report.history["accepted"].any()
    assert "no epoch of FitAct held the budget" in " ".join(report.notes)
    ranger = harden(net, Ranger(per="neuron", slack=1.5), data=calibration)
    for site in report.sites:
        got, largest = hardened.get_submodule(site.module), ranger.get_submodule(site.module)
        assert torch.equal(got.threshold, largest.threshold)


def test_acceptance_is_on_the_held_out_part_alone(net: nn.Module, calibration: Data) -> None:
    """Parts are disjoint, cover everything, and the history's accuracy is that of the held-out part."""
    whole = Calibration.read(net, calibration, torch.device("cpu"))
    fit, held = whole.split(0.25, 3)
    assert held.samples == round(0.25 * whole.samples)
    rows = [tuple(x.flatten().tolist()) for part in (fit, held) for batch in part.batches.inputs for x in batch]
    assert sorted(rows) == sorted(tuple(x.flatten().tolist()) for x, _ in calibration for x in x)
    assert torch.equal(whole.split(0.25, 3)[1].batches.targets, held.batches.targets)
    assert not torch.equal(whole.split(0.25, 4)[1].batches.targets, held.batches.targets)
    report = hardening_report(harden(net, FitAct(epochs=1, held_out=0.25, seed=3), data=calibration))
    grains = report.history["held_out_accuracy"] * held.samples
    assert grains.iloc[0] == pytest.approx(round(grains.iloc[0]), abs=1e-6)


def test_learning_rate_is_halved_every_ten_epochs(mlp: nn.Module, blobs: Data) -> None:
    history = hardening_report(harden(mlp, FitAct(epochs=21, lr=0.08), data=blobs)).history
    assert history["lr"].tolist() == pytest.approx([0.08] * 10 + [0.04] * 10 + [0.02])


def test_seeds_matter_and_repeat(net: nn.Module, calibration: Data) -> None:
    trained = [
        hardening_report(harden(net, ProAct(epochs=1, epochs_last=1, seed=seed), data=calibration)).history
        for seed in (0, 0, 1)
    ]
    assert trained[0].equals(trained[1])
    assert not trained[0].equals(trained[2])


def test_training_leaves_dropout_and_statistics_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 3))
    x = torch.randn(60, 4)
    data = [(x[:30], torch.randint(3, (30,))), (x[30:], torch.randint(3, (30,)))]
    model.train()
    model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hardened = harden(model, ProAct(epochs=1, epochs_last=2, budget=0.5), data=data)
    assert hardened.training
    assert all(torch.equal(hardened.state_dict()[name], value) for name, value in before.items())


def test_inputs_that_cannot_be_cut_are_split_by_batches() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc = nn.GRU(3, 4), nn.Linear(4, 2)

        def forward(self, x: Any) -> Tensor:
            return self.fc(torch.relu(self.rnn(x)[1][-1]))  # type: ignore[no-any-return]

    sequences = [[torch.randn(n, 3) for n in lengths] for lengths in ([5, 3, 2], [4, 4, 1], [6, 2, 2])]
    data = [(nn.utils.rnn.pack_sequence(batch), torch.tensor([0, 1, 1])) for batch in sequences]
    with pytest.warns(fp.FlipproofWarning, match="GRU computes its gates in one kernel"):
        hardened = harden(Net(), FitAct(epochs=2, budget=0.9), data=data)
    assert hardening_report(hardened).history["held_out_accuracy"].mul(3).round(6).isin([0, 1, 2, 3]).all()


def test_a_loss_that_explodes_is_reported_and_nothing_stays_unfrozen(mlp: nn.Module, blobs: Data) -> None:
    work, parts = work_on(mlp, blobs)
    bounds = [work.bound(site, Smooth, seen.high) for site, seen in work.ranges.items()]
    asked = {name: p.requires_grad for name, p in work.model.named_parameters()}
    with pytest.raises(ModelError, match="by hand: the loss became nan"), progress_bar(1, 0, show=False) as step:
        train_thresholds(
            work,
            Stage("by hand", bounds, Schedule(1, 0.1, 10, 8, 0.0, 0.5)),
            parts,
            lambda given, targets, teacher: given.sum() * float("nan"),
            prefixes=Prefixes(work.model, parts),
            generator=torch.Generator(),
            step=step,
        )
    assert {name: p.requires_grad for name, p in work.model.named_parameters()} == asked


def test_quick_presets_are_the_same_methods_with_fewer_epochs() -> None:
    assert isinstance(ProAct.quick(), ProAct)
    assert ProAct.quick().epochs < ProAct().epochs == 20
    assert (ProAct().k, ProAct().epochs_last, ProAct().lr, ProAct().batch_size) == (20, 50, 0.01, 128)
    assert FitAct.quick().epochs < FitAct().epochs == 150


def test_cost_is_counted_in_forward_equivalents(net: nn.Module, calibration: Data) -> None:
    report = hardening_report(harden(net, FitAct(epochs=4, slack=4.0), data=calibration))
    x = calibration[0][0][:1]
    spent = [
        math.prod(layer.weight.shape) * math.prod(out)
        for layer, out in zip(layers_of(net), maps_of(net, x), strict=True)
    ]
    # frozen weights, bounds behind every layer: gradients flow back through all layers but the first
    step = 1 + sum(spent[1:]) / sum(spent)
    assert step < 2
    n, held, select, fit = 720, 180, 135, 405
    once = 1 + 2 * 0.75 + held / n + 2 * 32 / n  # golden, ranges twice, judged, batch 1 against N
    assert report.forwards == pytest.approx(once + select / n + 4 * (step * fit + select) / n, rel=1e-6)


def test_the_last_layers_bounds_train_without_a_pass_through_the_others(net: nn.Module, calibration: Data) -> None:
    """ProAct trains from the last layer to the first; what lies before the layer is computed once, and for audits."""
    reports = [
        hardening_report(harden(net, ProAct(epochs=1, epochs_last=n, slack=4.0), data=calibration)) for n in (1, 11)
    ]
    x = calibration[0][0][:1]
    spent = [
        math.prod(layer.weight.shape) * math.prod(out)
        for layer, out in zip(layers_of(net), maps_of(net, x), strict=True)
    ]
    behind = spent[-1] / sum(spent)
    whole = (1 + behind) * 405 + 135  # a single epoch keeps nothing
    once = (1 - behind) * 405 + 135  # to keep what lies before the layer, and to compare the answers
    audited = 5 * 128 + 21  # of 44 batches each tenth, and the first of 21 samples
    epochs = 11 * (2 * behind * 405 + behind * 135) + (1 - behind) * audited
    more = reports[1].forwards - reports[0].forwards
    assert more == pytest.approx((once + epochs - whole) / 720, rel=1e-6)


def layers_of(net: nn.Module) -> list[Any]:
    return [net.conv1, net.conv2, net.fc1, net.fc2]


def maps_of(net: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """Places at which each layer's weights are applied, for one sample."""
    found: list[tuple[int, ...]] = []
    handles = [
        layer.register_forward_hook(lambda module, args, out: found.append(tuple(out.shape[2:])))
        for layer in layers_of(net)
    ]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return found
