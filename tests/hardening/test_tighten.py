from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.errors import ConfigError, DataError
from flipproof.hardening import Saturate, Tighten, ZeroAbove, hardening_report


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, 6, 6, generator=generator)
    return [(x[:20], torch.arange(20) % 3), (x[20:], torch.arange(20) % 3)]


@pytest.fixture
def conv():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))


def largest(model: nn.Module, images, layer: int, dims) -> torch.Tensor:
    with torch.no_grad():
        return model[: layer + 1](torch.cat([x for x, _ in images])).amax(dims)


@pytest.mark.parametrize(("replace", "kind"), [("zero", ZeroAbove), ("bound", Saturate)])
def test_bounds_are_channel_maxima_times_one_factor_a_layer(conv, images, replace, kind):
    hardened = fp.harden(conv, Tighten(replace=replace, budget=0.2), data=images)
    for site, (layer, dims) in zip(hardening_report(hardened).sites, ((1, (0, 2, 3)), (4, 0)), strict=True):
        bound = hardened.get_submodule(site.module)
        assert type(bound) is kind
        ratio = (bound.threshold.flatten() / largest(conv, images, layer, dims)).numpy()
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
        assert 0 < ratio[0] <= 1
        assert float(ratio[0] * 64) == pytest.approx(round(float(ratio[0] * 64)))  # 6 halvings
    assert hardened[1].threshold.shape == (4, 1, 1)
    assert hardened[4].threshold.shape == (5,)


def test_the_factor_is_the_smallest_that_holds_the_budget(conv, images):
    """Against trying every factor of the grid by hand; accuracy falls with it here, so bisection finds the border."""
    method = Tighten(per="layer", budget=0.3, steps=4, held_out=0.5)
    hardened = fp.harden(conv, method, data=images)
    history = hardening_report(hardened).history
    for _, stage in history.groupby("stage", sort=False):
        accepted, refused = stage[stage["accepted"]]["factor"], stage[~stage["accepted"]]["factor"]
        if len(accepted) and len(refused):
            assert accepted.min() - refused.max() == pytest.approx(2.0**-4)
    report = hardening_report(hardened)
    assert report.clean_drop <= 0.3 + 1e-9
    assert history["stage"].tolist()[:4] == ["4:0"] * 4  # the last layer comes first


def test_no_budget_loses_no_accuracy(conv, images):
    assert hardening_report(fp.harden(conv, Tighten(budget=0.0), data=images)).clean_drop <= 0


def test_the_cost_is_passes_over_the_held_out_part(conv, images):
    report = hardening_report(fp.harden(conv, Tighten(steps=5, held_out=0.25), data=images))
    assert report.forwards == pytest.approx(2 + 2 * 5 * 0.25)


def test_sequences_get_one_bound_a_layer_and_other_sizes_are_refused():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.two(torch.relu(self.one(x))).mean(dim=1)

    x = torch.randn(8, 5, 3)
    hardened = fp.harden(
        Tokens(), Tighten(budget=0.5), data=[(x, torch.arange(8) % 3), (x[:, :3], torch.arange(8) % 3)]
    )
    assert hardening_report(hardened).thresholds == 1
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )
    data = [(torch.randn(4, 1, n, n), torch.arange(4) % 2) for n in (6, 8)]
    with pytest.raises(DataError, match="bounds per channel need inputs of one size"):
        fp.harden(net, Tighten(), data=data)


@pytest.mark.parametrize(
    "bad", [{"per": "row"}, {"replace": "mean"}, {"budget": 1.0}, {"steps": 0}, {"held_out": 0.0}, {"seed": -1}]
)
def test_nonsense_is_refused(bad):
    with pytest.raises(ConfigError, match="Tighten"):
        Tighten(**bad)
