"""A trial that stops at a layer where everything is golden again leaves the record of a trial that runs whole."""

import dataclasses

import torch
from torch import nn

import flipproof as fp
from flipproof.running.resume import Suffixes


class Net(nn.Module):
    """Residual, with an in-place activation, a layer used twice and a weight used as a plain tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)))
        y = self.relu(self.twice(x))
        y = self.relu(self.twice(y) + x) * self.scale
        return self.head(y.flatten(1))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 1, 4, 4, generator=generator), torch.zeros(n, dtype=torch.long)) for n in (3, 2)]


def records(**options):
    result = fp.assess(Net(), data=batches(), faults=fp.RandomBits([1, 2]), trials=150, progress=False, **options)
    return [dataclasses.replace(record, seconds=0.0) for record in result.records]


def test_records_are_those_of_whole_runs():
    whole = records(cache_bytes=0)
    assert records() == whole
    assert {outcome for record in whole for outcome, count in record.outcomes.items() if count} >= {
        "masked",
        "non_critical_sdc",
    }


def prepared(net, inputs):
    net.eval()
    suffixes = Suffixes.trace(net, [inputs])
    suffixes.prepare(net, [inputs], [len(inputs)], None, 2**20)
    return suffixes


@torch.no_grad()
def test_a_masked_fault_stops_at_the_first_golden_layer():
    net, (inputs, _) = Net(), batches()[0]
    suffixes = prepared(net, inputs)
    golden = net(inputs)
    looks = suffixes.looks_after(["first.weight"])
    assert looks
    net.head.weight.zero_()  # whatever runs to the end now gives another output
    assert torch.equal(suffixes.resume(suffixes.cut_of(["first.weight"]), 0, looks), golden)
    net.first.weight[0] += 1
    assert not torch.equal(suffixes.resume(suffixes.cut_of(["first.weight"]), 0, looks), golden)


@torch.no_grad()
def test_the_sign_of_a_zero_is_not_golden():
    class Zeros(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))
            self.size = nn.Parameter(torch.ones(1))

        def forward(self, x):
            x = x * self.gain
            return torch.copysign(self.size, x)

    net, zero = Zeros(), torch.zeros(1, 1)
    suffixes = prepared(net, zero)
    looks = suffixes.looks_after(["gain"])
    cut = suffixes.cut_of(["gain"])
    net.gain.fill_(-1)
    assert looks
    assert suffixes.resume(cut, 0, looks).item() == net(zero).item() == -1


def test_looks_lie_behind_every_use_of_a_layer():
    net, (inputs, _) = Net(), batches()[0]
    with torch.no_grad():
        suffixes = prepared(net, inputs)
    assert min(suffixes.looks_after(["twice.weight"])) > max(
        i for i, node in enumerate(suffixes._nodes) if node.target == "twice"
    )
    assert suffixes.looks_after(["head.weight"]) == ()
    assert suffixes.looks_after(["never.seen"]) == ()
