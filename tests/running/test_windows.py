"""An upset's window, computed by itself, leads to the very bits of a forward that computes everything."""

import dataclasses

import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.running import resume, windows
from flipproof.running.resume import Suffixes
from flipproof.running.values import same


class Net(nn.Module):
    """A stem, a block with a plain shortcut, one with a strided one, and layers that no window goes through."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.down, self.side = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(8, 16, 1, 2)
        self.grouped = nn.Conv2d(16, 16, 5, padding=2, groups=4)
        self.pool, self.last = nn.MaxPool2d(2), nn.Conv2d(16, 8, 3)
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.b(torch.relu(self.a(x))) + x)
        x = torch.relu(self.grouped(torch.relu(self.down(x))) + self.side(x))
        return self.head(torch.relu(self.last(self.pool(x))).mean(dim=(2, 3)))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 24, 24, generator=generator) for n in (6, 4)]


def prepared(net, inputs):
    suffixes = Suffixes.trace(net, inputs)
    layers = ("stem", "a", "b", "down", "side", "grouped", "last")
    worth = {suffixes.behind(layer): 1.0 for layer in layers}
    suffixes.prepare(net, inputs, [len(x) for x in inputs], None, 2**28, worth)
    return suffixes, worth


def upset(output, generator, corner):
    """One value of each sample has a bit flipped, anywhere or in a corner."""
    faulty = output.clone()
    size = output.shape[-1]
    for row in range(len(faulty)):
        channel, i, j, bit = (int(torch.randint(n, (), generator=generator)) for n in (faulty.shape[1], size, size, 32))
        i, j = (i % 2 * (size - 1), j % 2 * (size - 1)) if corner else (i, j)
        mask = torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
        value = faulty[row, channel, i, j].view(torch.int32)
        value ^= mask
    return faulty


@torch.no_grad()
def test_windows_lead_to_the_bits_of_whole_images(monkeypatch):
    net, inputs, generator = Net().eval(), batches(), torch.Generator().manual_seed(2)
    suffixes, worth = prepared(net, inputs)
    ends = {str(way.first): str(way.last) for way in suffixes._windows.values()}
    assert set(ends) >= {"stem", "a", "b", "down"}
    assert "last" not in ends
    used, put = [], resume.put
    monkeypatch.setattr(resume, "put", lambda *args: used.append(1) or put(*args))
    for cut in worth:
        for batch in range(2):
            for corner in (False, False, True):
                faulty = upset(suffixes.cache(cut, batch)[suffixes.place(cut)], generator, corner)
                used.clear()
                quick = suffixes.resume_changed(cut, batch, lambda _, faulty=faulty: faulty, plain=True)
                assert used == [1] * (cut in suffixes._windows)
                assert same(quick, suffixes.resume_changed(cut, batch, lambda _, faulty=faulty: faulty))


@torch.no_grad()
def test_more_than_one_pixel_is_no_window():
    golden = torch.randn(3, 2, 5, 5)
    faulty = golden.clone()
    faulty[1, 0, 2, 3], faulty[1, 1, 2, 3] = 9.0, -9.0
    found = windows.changed_window(faulty, golden)
    assert (int(found.top[1]), int(found.left[1])) == (2, 3)
    assert same(windows.put(found, golden), faulty)
    faulty[1, 0, 0, 0] = 1.0
    assert windows.changed_window(faulty, golden) is None


@torch.no_grad()
def test_windows_that_are_not_what_the_image_holds_are_not_used(monkeypatch):
    convolved = windows._convolved

    def off(*args):
        found = convolved(*args)
        if found.side == 5:  # one ulp, in one value of one size
            found.values[0, 0, 0, 0] = torch.nextafter(found.values[0, 0, 0, 0], torch.tensor(9.0))
        return found

    net, inputs = Net().eval(), batches()
    honest, _ = prepared(net, inputs)
    monkeypatch.setattr(windows, "_convolved", off)
    suffixes, _ = prepared(net, inputs)
    assert suffixes._cuts == honest._cuts
    for cut, way in suffixes._windows.items():
        assert way.end <= honest._windows[cut].end
    assert sum(w.end for w in suffixes._windows.values()) < sum(w.end for w in honest._windows.values())


def records(monkeypatch, **options):
    used, put = [], resume.put
    monkeypatch.setattr(resume, "put", lambda *args: used.append(1) or put(*args))
    data = [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches()]
    asked = {"where": fp.Neurons(), "faults": fp.RandomBits(1), "trials": 30, "progress": False}
    found = fp.assess(Net(), data=data, **asked, **options)
    return [dataclasses.replace(record, seconds=0.0) for record in found.records], len(used)


@pytest.mark.parametrize("format", [fp.Float32(), fp.Float16()], ids=repr)
def test_records_are_those_of_whole_runs(monkeypatch, format):
    quick, used = records(monkeypatch, format=format)
    whole, none = records(monkeypatch, format=format, cache_bytes=0)
    assert quick == whole
    assert (used > 20) == (format == fp.Float32())  # other formats store what layers give: nothing is plain there
    assert none == 0


def test_a_layer_that_somebody_watches_is_computed_whole():
    net, inputs = Net().eval(), batches()
    seen = []
    net.a.register_forward_hook(lambda module, args, result: seen.append(tuple(result.shape)))
    with torch.no_grad():
        suffixes, _ = prepared(net, inputs)
        assert all("a" not in map(str, way.nodes) for way in suffixes._windows.values())
