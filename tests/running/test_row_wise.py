from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import flipproof as fp
from flipproof.errors import ConfigError
from flipproof.running.row_wise import row_wise

ROWS = 4


def steps(function, x):
    """Whether all steps of a function are row-wise."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(8, 8)
            self.trained, self.layer = nn.BatchNorm2d(4).train(), nn.LayerNorm(8)
            self.place, self.each = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(ROWS, 1))
            self.shape = nn.LayerNorm((ROWS, 8))

        def forward(self, x):
            return function(self, x)

    net = Net().eval()
    net.trained.train()
    traced = fx.symbolic_trace(net)
    return set(traced.graph.nodes) <= row_wise(traced, [x], ROWS)


IMAGE, ROW = torch.randn(ROWS, 3, 8, 8), torch.randn(ROWS, 8)

ALONE = {
    "conv": (lambda n, x: F.relu(n.norm(n.conv(x))).mean((2, 3)), IMAGE),
    "resnet": (lambda n, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)), IMAGE),
    "pool": (lambda n, x: torch.flatten(F.adaptive_avg_pool2d(F.max_pool2d(n.conv(x), 2), 1), 1), IMAGE),
    "view": (lambda n, x: x.view(x.size(0), -1) * 2 + 1, IMAGE),
    "sum": (lambda n, x: torch.cat([x + n.place, n.linear(x)], 1), ROW),
    "softmax": (lambda n, x: torch.softmax(n.layer(x), dim=-1), ROW),
    "attention": (lambda n, x: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).sum(-1), IMAGE),
    "permute": (lambda n, x: x.permute(0, 2, 3, 1).contiguous(), IMAGE),
}
MIXED = {
    "softmax over samples": (lambda n, x: torch.softmax(x, dim=0), ROW),
    "mean": (lambda n, x: x - x.mean(), ROW),
    "mean over samples": (lambda n, x: x - x.mean(0, keepdim=True), ROW),
    "where": (lambda n, x: torch.where(x.amax() > 1e20, 0.0, x), ROW),
    "batch statistics": (lambda n, x: n.trained(n.conv(x)), IMAGE),
    "flip": (lambda n, x: x.flip(0), ROW),
    "index": (lambda n, x: x[[1, 0, 2, 3]], ROW),
    "sort": (lambda n, x: x.sort(0)[0], ROW),
    "transpose": (lambda n, x: x[:, :ROWS].t(), ROW),
    "transposed": (lambda n, x: x[:, :ROWS].transpose(0, 1), ROW),
    "broadcast": (lambda n, x: x[:, :ROWS] + x.sum(1), ROW),
    "product": (lambda n, x: (x @ x.t()) @ x, ROW),
    "norm": (lambda n, x: n.shape(x), ROW),
    "an entry for each place": (lambda n, x: x * n.each, ROW),
    "unknown": (lambda n, x: torch.cumsum(x, 1), ROW),
}


@pytest.mark.parametrize("name", ALONE)
def test_steps_of_each_sample_alone(name):
    assert steps(*ALONE[name])


@pytest.mark.parametrize("name", MIXED)
def test_steps_that_may_look_at_other_samples(name):
    assert not steps(*MIXED[name])


def test_a_model_is_not_moved_to_where_it_would_be_lost():
    net = nn.Linear(4, 3)
    before = net.weight.detach().clone()
    with pytest.raises(ConfigError, match="a meta device holds no values"):
        fp.assess(net, [(torch.randn(6, 4), torch.arange(6) % 3)], faults=fp.RandomBits(1), device="meta")
    assert torch.equal(net.weight, before)
