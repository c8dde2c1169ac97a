"""Thresholds searched along a line, against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flipproof as fp
from flipproof.datasets import digits
from flipproof.errors import ConfigError
from flipproof.hardening.bounds.bounded import Smooth
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.hardening.fitting.line import GRID, TOLERANCE, lowest
from flipproof.hardening.report import hardening_report
from flipproof.models import digits_cnn
from flipproof.models.training import train_classifier

pytestmark = pytest.mark.filterwarnings("ignore:.*costs accuracy:flipproof.FlipproofWarning")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return train_classifier(digits_cnn(), digits("train", batch_size=64), epochs=12)


@pytest.fixture(scope="module")
def calibration():
    return digits("train")[:2]


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: (x - 0.437) ** 2,
        lambda x: abs(x - 0.61) ** 0.5,
        lambda x: math.exp(-9 * x) + 0.3 * x**2,
        lambda x: x,  # the lowest end
        lambda x: -x,  # where it began
        lambda x: (x - 0.35) ** 2 if x < 0.5 else 0.1 + (x - 0.8) ** 2,  # two dips
        lambda x: math.nan if x < 0.5 else (x - 0.7) ** 2,
        lambda x: math.inf if x < 0.7 else x,
    ],
)
def test_the_lowest_of_a_fine_grid_is_found(loss) -> None:
    asked: dict[float, float] = {}

    def noted(x: float) -> float:
        asked[x] = loss(x)
        return asked[x]

    lowest(noted)
    fine = np.linspace(GRID[0], GRID[-1], 2001)
    values = np.array([loss(float(x)) for x in fine])
    best = min(value for value in asked.values() if not math.isnan(value))
    allowed = max(loss(float(x)) for x in fine[np.abs(fine - fine[np.nanargmin(values)]) <= TOLERANCE])
    assert best <= (allowed if math.isfinite(allowed) else np.nanmin(values) + 2 * TOLERANCE)
    assert len(asked) <= 25


def test_nothing_finite_ends_at_the_grid() -> None:
    asked: list[float] = []

    def never(x: float) -> float:
        asked.append(x)
        return math.nan

    lowest(never)
    assert asked == list(GRID)


def smooth(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return torch.clamp_min(x, 0) * (1 - torch.sigmoid(20 * (torch.clamp_min(x, 0) - threshold)))


def written_out(net: nn.Module, x: torch.Tensor, bounds: list[torch.Tensor]) -> torch.Tensor:
    h = smooth(net.conv1(x), bounds[0])
    h = F.max_pool2d(smooth(net.conv2(h), bounds[1]), 2)
    return net.fc2(smooth(net.fc1(h.flatten(1)), bounds[2]))


@pytest.mark.parametrize(
    ("method", "per"),
    [(fp.ProAct, "hybrid"), (fp.ProAct, "channel"), (fp.FitAct, "layer"), (fp.FitAct, "neuron")],
)
def test_each_layer_has_the_factor_that_brute_force_finds(net, calibration, method, per) -> None:
    """From the last layer to the first, on the network written out, at forty factors each."""
    gamma = 1e-3
    how = method(search="line", per=per, slack=1.0, weight_decay=gamma, budget=0.99)
    safe = fp.harden(net, how, data=calibration, progress=False)
    whole = Calibration.read(net, calibration, torch.device("cpu"))
    seen, _ = whole.split(how.held_out, how.seed)
    fit, _ = seen.split(how.held_out, how.seed)
    everything, x, targets = torch.cat(seen.batches.inputs), torch.cat(fit.batches.inputs), fit.batches.targets
    with torch.no_grad():
        first = net.conv1(everything).relu()
        second = net.conv2(first).relu()
        third = net.fc1(F.max_pool2d(second, 2).flatten(1)).relu()
        bounds = []
        for i, values in enumerate((first, second, third)):
            grain = {"hybrid": "neuron" if i == 2 else "layer"}.get(per, per)
            if grain == "layer":
                bounds.append(values.max())
            elif grain == "channel" and values.dim() > 2:
                bounds.append(values.amax((0, 2, 3)).reshape(-1, 1, 1))
            else:
                bounds.append(values.amax(0))
        teacher = net(x)

        def loss(candidate: list[torch.Tensor], layer: int) -> float:
            out = written_out(net, x, candidate)
            value = F.cross_entropy(out, targets)
            if method is fp.ProAct:
                value = value + (out.softmax(1) * (out.log_softmax(1) - teacher.log_softmax(1))).sum() / len(x)
            return float(value + gamma * candidate[layer].square().sum())

        history = hardening_report(safe).history
        names = list(dict.fromkeys(history["stage"]))
        assert names == ["relu:2", "relu:1", "relu:0"]
        for layer, name in zip((2, 1, 0), names, strict=True):
            start = bounds[layer]
            curve = {}
            for scale in np.linspace(0.2, 1.0, 41):
                bounds[layer] = float(scale) * start
                curve[float(scale)] = loss(bounds, layer)
            rows = history[history["stage"] == name]
            (taken,) = rows.loc[rows["accepted"], "scale"]
            bounds[layer] = taken * start
            assert loss(bounds, layer) == pytest.approx(float(rows["loss"].min()), rel=1e-4)
            best = min(curve, key=lambda scale: curve[scale])
            near = [value for scale, value in curve.items() if abs(scale - best) <= 1.5 * TOLERANCE]
            assert loss(bounds, layer) <= max(near)
            bound = [module for module in safe.modules() if isinstance(module, Smooth)][layer]
            assert torch.allclose(bound.threshold, bounds[layer])


def test_what_breaks_the_budget_is_not_taken(net, calibration) -> None:
    """γ so large that the lowest loss is at the smallest factors, which cost accuracy."""
    greedy, bound = (
        hardening_report(
            fp.harden(net, fp.ProAct(search="line", weight_decay=1.0, budget=b), data=calibration, progress=False)
        ).history
        for b in (0.99, 0.02)
    )
    floor = bound["held_out_accuracy"].max() - 0.02
    for _, rows in bound.groupby("stage"):
        assert rows["accepted"].sum() <= 1
        assert (rows.loc[rows["accepted"], "held_out_accuracy"] >= floor).all()
        better = rows[rows["loss"] < rows.loc[rows["accepted"], "loss"].min()]
        assert (better["held_out_accuracy"] < floor + 0.02).all()  # each was asked, and refused
    assert greedy.loc[greedy["accepted"], "scale"].mean() < bound.loc[bound["accepted"], "scale"].mean()


def test_it_is_cheaper_than_training(net, calibration) -> None:
    reports = [
        hardening_report(fp.harden(net, method, data=calibration, progress=False))
        for method in (fp.ProAct.searched(), fp.ProAct())
    ]
    assert reports[0].forwards < 0.5 * reports[1].forwards


def test_interrupted_and_resumed(net, calibration, tmp_path) -> None:
    method = fp.FitAct.searched("channel")
    whole = fp.harden(net, method, data=calibration, progress=False)
    journal = tmp_path / "stages.jsonl"
    fp.harden(net, method, data=calibration, journal=journal, progress=False)
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 1 + 3
    for kept in (4, 3, 1):
        journal.write_text("".join(lines[:kept]), encoding="utf-8")
        again = fp.harden(net, method, data=calibration, journal=journal, progress=False)
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())
        report = hardening_report(again)
        assert report.forwards == pytest.approx(hardening_report(whole).forwards)
        assert report.history.equals(hardening_report(whole).history)


def test_granularity(net, calibration) -> None:
    counts = [
        hardening_report(fp.harden(net, fp.ProAct(search="line", per=per), data=calibration, progress=False)).thresholds
        for per in ("layer", "hybrid", "channel", "neuron")
    ]
    maps = 16 * 8 * 8, 32 * 8 * 8
    assert counts == [3, 2 + 64, 16 + 32 + 64, sum(maps) + 64]


@pytest.mark.parametrize("bad", [{"search": "grid"}, {"per": "row"}])
@pytest.mark.parametrize("method", [fp.ProAct, fp.FitAct])
def test_nonsense_is_refused(method, bad) -> None:
    with pytest.raises(ConfigError, match="search is 'training' or 'line'"):
        method(**bad)
