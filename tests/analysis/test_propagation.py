"""Activations with faults beside those without, against arithmetic by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.errors import ConfigError
from flipproof.faults import TrialGenerator
from flipproof.spaces.parameters import FaultSpace


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


@pytest.fixture
def data():
    return [
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)),
        (torch.randn(6, 3), torch.ones(6, dtype=torch.int64)),
    ]


def layer_values(net, data):
    """Every layer's values in float64 numpy, batch by batch as float32 computes them."""
    found = {name: [] for name in "012"}
    with torch.no_grad():
        for x, _ in data:
            for name, layer in zip("012", net, strict=True):
                x = layer(x)
                found[name].append(x.numpy().astype(np.float64).ravel())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def test_equation_9_by_hand(net, data):
    model = fp.BitErrorRate([0.01, 0.05])
    found = fp.propagation(net, data, faults=model, trials=4, seed=3)
    assert len(found.distances) == 2 * 4 * 3
    golden, space, total = layer_values(net, data), FaultSpace(net), []
    for row in found.distances.itertuples():
        point = fp.BitErrorRate(row.ber)
        with space.corrupted(point.draw(space, TrialGenerator(3, repr(point), row.trial))):
            faulty = layer_values(net, data)[row.layer]
        finite = np.isfinite(faulty)
        difference = (faulty - golden[row.layer])[finite]
        assert row.l2 == pytest.approx((difference**2).mean(), rel=1e-9)
        assert row.not_finite == pytest.approx(1 - finite.mean())
        total.append(row.l2)
    assert found.l2() == pytest.approx(np.mean(total))
    assert found.layers["l2"].mean() == pytest.approx(np.mean(total))


def test_distributions_are_histograms(net, data):
    found = fp.propagation(net, data, faults=fp.RandomBits(0), bins=7)
    values = layer_values(net, data)
    for name, table in found.distributions.groupby("layer"):
        inner = table.iloc[1:-1]
        edges = [*inner["low"], inner["high"].iloc[-1]]
        expected = np.histogram(values[name], edges)[0] / values[name].size
        np.testing.assert_allclose(inner["golden"], expected)
        np.testing.assert_allclose(table["golden"], table["faulty"])  # nothing was flipped
        assert table["golden"].iloc[[0, -1]].sum() == 0


def test_what_lies_beyond_the_golden_range_is_counted_outside(net, data):
    sign = FaultSpace(net).faults([("2.bias", 0, 30)])

    class OneBit(type(fp.RandomBits(1))):
        def draw(self, space, generator):
            return sign

    with torch.no_grad():
        net[2].bias[0] = 1.5  # bit 30 set: 1.5 · 2^128 is NaN or infinite
    found = fp.propagation(net, data, faults=OneBit(1), trials=1, include="2")
    assert found.distances["not_finite"].tolist() == [0.5]
    assert found.distances["largest"].tolist() == [float("inf")]
    assert found.distances["layer"].unique().tolist() == ["2"]


def test_bounds_shorten_the_distance(net, data):
    safe = fp.harden(net, fp.Ranger(), data=data)
    faults = fp.BitErrorRate(0.02)
    plain, bounded = (fp.propagation(m, data, faults=faults, trials=20, include="1*").l2() for m in (net, safe))
    assert bounded < plain


def test_the_model_is_given_back(net, data):
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fp.propagation(net, data, faults=fp.BitErrorRate(0.1), format=fp.Float16(), trials=2)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


def test_refusals(net, data):
    with pytest.raises(
        ConfigError, match=r"no layer fits include=\['conv\*'\]; the model's layers are \['0', '1', '2'\]"
    ):
        fp.propagation(net, data, faults=fp.RandomBits(1), include="conv*")
    with pytest.raises(ConfigError, match="trials=0"):
        fp.propagation(net, data, faults=fp.RandomBits(1), trials=0)


def test_layers_come_in_the_order_of_execution(data):
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(5, 2), nn.Linear(3, 5)

        def forward(self, x):
            return self.second(self.first(x))

    found = fp.propagation(Backwards(), data, faults=fp.RandomBits(1), trials=1)
    assert found.distributions["layer"].drop_duplicates().tolist() == ["first", "second"]
