from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import flipproof as fp
from flipproof.formats.base import bit_pattern
from flipproof.running import resume
from flipproof.running.data import pick
from flipproof.running.resume import Suffixes
from flipproof.running.values import Copies, copied, same

PLENTY = 2**30
X = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(7) % 3


class Net(nn.Module):
    """Three linear layers; each test says how they are put together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)


class Residual(Net):
    def forward(self, x):
        h = F.relu(self.a(x), inplace=True)
        h = F.relu_(self.b(h) + h)
        h += x  # in place on what an earlier cut has kept
        return self.c(h)


class InPlaceView(Net):
    def forward(self, x):
        h = self.a(x)
        first = h[:, :2]
        h = self.b(h)
        first.add_(1)
        return self.c(torch.cat([first, h[:, 2:]], dim=1))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(4 * (i + 1), 4) for i in range(3))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        found = [x]
        for layer in self.layers:
            found.append(torch.relu(layer(torch.cat(found, dim=1))))
        return self.head(torch.cat(found, dim=1))


class SharedTwice(Net):
    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(torch.relu(self.b(x)))))))


class TiedWeights(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class TiedThroughFunctional(Net):
    def forward(self, x):
        return self.c(F.linear(torch.relu(self.b(x)), self.b.weight.t()))


class OptionalMask(Net):
    """`mask is not None` is true of a traced stand-in, so the trace has to know that it is None."""

    def forward(self, x, mask=None, scale=1.0):
        h = torch.relu(self.a(x))
        if mask is not None:
            h = h.masked_fill(mask == 0, -1.0)
        return self.c(self.b(h) * scale)


class OptionalClamp(Net):
    """Without faults nothing is ever clamped, so that only the right branch gives the right records."""

    def forward(self, x, limit=None):
        h = self.a(x)
        if limit is not None:
            h = h.clamp(-30, 30)
        return self.c(self.b(h))


class BufferTwice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(4))

    def forward(self, x):
        return self.c(self.b(self.a(x) + self.gain) * self.gain.sqrt())


class ParameterTable(Net):
    def forward(self, x):
        weights = dict(self.named_parameters())  # what a tracer does not see being read
        h = F.linear(self.a(x), weights["b.weight"])
        return self.c(h * weights["b.weight"].sum())


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.b)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.lstm, self.head = nn.Linear(2, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x, hidden=None):
        out, _ = self.lstm(self.embed(x), hidden)
        return self.head(out[:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.attend = nn.Linear(2, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.embed(x)
        return self.head((h + self.attend(h, h, h)[0]).mean(dim=1))


class TwoInputs(Net):
    def forward(self, left, right):
        return self.c(torch.relu(self.b(left)) + torch.relu(self.a(right)))


class DataDependent(Net):
    def forward(self, x):
        h = self.a(x)
        if h.sum() > 1e6:
            h = h * 0
        return self.c(self.b(h))


class AnyNumber(Net):
    def forward(self, *several):
        return self.c(self.b(self.a(several[0] + several[1])))


SEQUENCE = X.reshape(7, 2, 2)
TRACED = [
    (Residual, X),
    (InPlaceView, X),
    (Dense, X),
    (SharedTwice, X),
    (TiedWeights, X),
    (TiedThroughFunctional, X),
    (OptionalMask, X),
    (OptionalMask, (X, torch.tensor([1, 0, 1, 1]))),
    (OptionalMask, {"x": X, "scale": 0.5}),
    (OptionalClamp, X),
    (BufferTwice, X),
    (Normed, X),
    (Recurrent, SEQUENCE),
    (Attention, SEQUENCE),
    (TwoInputs, (X, -X)),
    (TwoInputs, {"right": X, "left": -X}),
]
RUN_WHOLE = [(DataDependent, X), (AnyNumber, (X, -X)), (ParameterTable, X)]


def named(case):
    return case.__name__ if isinstance(case, type) else type(case).__name__


@pytest.fixture
def prepared():
    def prepare(model, inputs, budget=PLENTY, output=None):
        with torch.no_grad():
            suffixes = Suffixes.trace(model.eval(), inputs)
            assert suffixes is not None
            suffixes.prepare(model, inputs, [7] * len(inputs), output, budget)
        return suffixes

    return prepare


@pytest.mark.parametrize(("build", "inputs"), TRACED, ids=named)
def test_every_cut_gives_back_the_whole_run(build, inputs, prepared):
    model = build()
    suffixes = prepared(model, [inputs, inputs])
    assert suffixes._cuts
    with torch.no_grad():
        given = inputs if isinstance(inputs, (tuple, dict)) else (inputs,)
        whole = model(**given) if isinstance(given, dict) else model(*given)
        for cut in suffixes._cuts:
            for _ in range(2):  # the second time: did the first run spoil the cache?
                assert torch.equal(bit_pattern(pick(suffixes.resume(cut, 1), None)), bit_pattern(whole))


@pytest.mark.parametrize(("build", "inputs"), TRACED + RUN_WHOLE, ids=named)
@pytest.mark.parametrize("faults", [fp.RandomBits(1), fp.RandomBits(4)], ids=repr)
def test_records_are_the_same_with_and_without(build, inputs, faults):
    setup = {"data": [(inputs, Y), (inputs, Y)], "faults": faults, "trials": 60}
    where = fp.Parameters(buffers=True)
    columns = [
        fp.assess(build(), **setup, where=where, cache_bytes=cache).trials.drop(columns="seconds")
        for cache in (None, 0)
    ]
    assert columns[0].equals(columns[1])
    assert columns[0]["masked"].sum() < columns[0]["samples"].sum()


@pytest.mark.parametrize(("build", "inputs"), RUN_WHOLE, ids=named)
def test_what_cannot_be_traced_faithfully_runs_whole(build, inputs):
    assert Suffixes.trace(build().eval(), [inputs]) is None


def test_plain_arguments_that_differ_between_batches_run_whole():
    batches = [{"x": X, "scale": 0.5}, {"x": X, "scale": 2.0}]
    assert Suffixes.trace(OptionalMask().eval(), batches) is None


class Clamped(nn.Module):
    """No child and no layer of torch: a tracer walks through it and would pass its hook by."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("place", ["", "1", "2"])
def test_hooks_that_tracing_would_lose(place):
    def build():
        torch.manual_seed(1)
        inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        net = nn.Sequential(nn.Linear(4, 4), Clamped(), inner, nn.Linear(4, 3))
        net.get_submodule(place).register_forward_hook(lambda module, args, result: result.clamp(-20, 20))
        return net

    assert Suffixes.trace(build(), [X]) is None
    bare = build()
    bare.get_submodule(place)._forward_hooks.clear()
    reach = {"reach": lambda outputs, targets: outputs.nan_to_num().abs().max()}
    setup = {"data": [(X, Y)], "faults": fp.RandomBits(1), "trials": 80, "metrics": reach}
    hooked, whole, without = (
        fp.assess(net, **setup, cache_bytes=size).trials.drop(columns="seconds")
        for net, size in ((build(), None), (build(), 0), (bare, 0))
    )
    assert hooked.equals(whole)
    assert not hooked.equals(without)


def test_hooks_on_layers_of_torch_keep_working(prepared):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    net[1].register_forward_hook(lambda module, args, result: result.clamp(max=0.25))
    assert prepared(net, [X])._cuts
    setup = {"data": [(X, Y)], "faults": fp.RandomBits(1), "trials": 60}
    both = [fp.assess(net, **setup, cache_bytes=size).trials.drop(columns="seconds") for size in (None, 0)]
    assert both[0].equals(both[1])


def test_a_cut_lies_before_the_first_use_under_every_name(prepared):
    suffixes = prepared(TiedWeights(), [X])
    space = fp.FaultSpace(TiedWeights())
    tied = space.touched_names(space.faults([("a.weight", 0, 0)]))
    assert tied == ["a.weight", "b.weight"]
    last = suffixes.cut_of(["c.weight"])
    assert last > suffixes.cut_of(["b.bias"]) > suffixes.cut_of(tied)
    assert suffixes.cut_of(["c.weight", *tied]) == suffixes.cut_of(tied)
    assert suffixes.cut_of(["unknown"]) == 0


def test_memory_stays_within_the_budget(prepared):
    model = Dense()
    held = {}
    for budget in (0, 100, 800, 2000, PLENTY):
        caches = prepared(model, [X, X], budget=budget)._caches
        tensors = {t.data_ptr(): t for batches in caches.values() for live in batches for t in live}
        held[budget] = sum(t.numel() * t.element_size() for t in tensors.values())
        assert held[budget] <= budget
    assert held[0] == held[100] == 0
    assert 0 < held[800] <= held[2000] < held[PLENTY]


def test_with_workers_and_formats():
    setup = {"data": [(X, Y)], "faults": fp.RandomBits(1), "trials": 20, "format": fp.Float16()}
    alone, pair, whole = (
        fp.assess(Residual(), **setup, **change).trials.drop(columns="seconds")
        for change in ({}, {"workers": 2}, {"cache_bytes": 0})
    )
    assert alone.equals(pair)
    assert alone.equals(whole)


class Filters(nn.Module):
    """Normalised convolutions of 40 and of 20 channels, with and without bias, one used twice, one by groups."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 40, 3, padding=1)
        self.second = nn.Conv2d(40, 20, 3, stride=2, bias=False)
        self.twice = nn.Conv2d(20, 20, 3, padding=1)
        self.groups = nn.Conv2d(20, 20, 3, groups=2)
        self.norms = nn.ModuleList([nn.BatchNorm2d(40), nn.BatchNorm2d(20)])
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        x = torch.relu(self.norms[1](self.second(torch.relu(self.norms[0](self.first(x))))))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return self.head(torch.relu(self.groups(x)).mean(dim=(2, 3)))


@torch.no_grad()
@pytest.mark.parametrize("bit", [0, 22, 29, 30, 31])
def test_a_block_of_channels_is_what_the_whole_layer_gives(bit, monkeypatch):
    net = Filters().eval()
    batches = [torch.randn(n, 1, 9, 9) for n in (3, 1)]
    suffixes = Suffixes.trace(net, batches)
    suffixes.prepare(net, batches, [3, 1], None, 2**22)
    assert len(suffixes._by_channels) == 2
    computed, channels = [], resume._channels
    monkeypatch.setattr(resume, "_channels", lambda *args: computed.append(args[-1]) or channels(*args))
    space = fp.FaultSpace(net)
    for site in space.sites:
        for value in (0, site.values // 2, site.values - 1):
            draw = space.faults([(site.name, value, bit)])
            start = space.start(draw)
            assert start.rows == (value // (site.values // site.shape[0]),) * 2
            cut, looks = suffixes.cut_of(start.names), suffixes.looks_after(start.names)
            computed.clear()
            with space.corrupted(draw):
                for i, batch in enumerate(batches):
                    assert same(suffixes.resume(cut, i, looks, start.rows), net(batch)), (site.name, value)
            by_channels = site.layer == "second" or (site.layer == "first" and cut > 0)
            assert computed == [start.rows[0] // 16 * 16] * 2 * by_channels
    filters = space.faults([("second.weight", 0, bit), ("second.weight", 16 * 360, bit)])  # of two blocks
    tensors = space.faults([("second.weight", 0, bit), ("head.bias", 0, bit)])
    assert space.start(tensors).rows is None
    for draw in (filters, tensors):
        start = space.start(draw)
        cut, looks = suffixes.cut_of(start.names), suffixes.looks_after(start.names)
        computed.clear()
        with space.corrupted(draw):
            assert same(suffixes.resume(cut, 0, looks, start.rows), net(batches[0]))
        assert computed == []


@torch.no_grad()
def test_channels_that_are_not_what_the_whole_layer_gives_are_not_computed_apart(monkeypatch):
    net, inputs = Filters().eval(), torch.randn(3, 1, 9, 9)
    channels = resume._channels
    for where in (0, 16):  # one ulp in one value of one block, without faults or with

        def off(layer, x, weight, first, where=where):
            found = channels(layer, x, weight, first).clone()
            if first == where and (where == 0 or weight is not layer.weight):
                found[0, 0, 0, 0] = torch.nextafter(found[0, 0, 0, 0], torch.tensor(9.0))
            return found

        monkeypatch.setattr(resume, "_channels", off)
        suffixes = Suffixes.trace(net, [inputs])
        suffixes.prepare(net, [inputs], [3], None, 2**22)
        assert suffixes._by_channels == {}
        assert suffixes._cuts


def test_copies_are_laid_out_like_what_they_copy():
    """Sums over memory laid out otherwise may be taken in another order: a slice is not closed up."""
    whole = torch.arange(24.0).reshape(4, 6)
    for given in (whole[:, :4], whole.t(), whole[::2, 1:], whole[:1].expand(3, 6)):
        made = copied([given, given])
        for one in made:
            assert torch.equal(one, given)
            assert one.stride() == given.stride() or 0 in given.stride()
            assert one.data_ptr() != given.data_ptr()
    known: Copies = {}
    first, again = copied(whole[:, :4], known), copied(whole[:, :4], known)
    assert first.stride() == again.stride() == (6, 1)


class Sliced(Net):
    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.cat([x, x], dim=1)[:, 2:6])))


def test_a_cut_behind_a_slice_gives_the_whole_run_under_every_flip():
    net, x = Sliced().eval(), torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        suffixes = Suffixes.trace(net, [x])
        assert suffixes is not None
        suffixes.prepare(net, [x], [6], None, PLENTY)
        cut = suffixes.cut_of(["b.weight"])
        assert cut > 0
        space = fp.FaultSpace(net)
        for value in range(16):
            for bit in range(0, 32, 3):
                with space.corrupted(space.faults([("b.weight", value, bit)])):
                    assert torch.equal(bit_pattern(suffixes.resume(cut, 0)), bit_pattern(net(x))), (value, bit)
