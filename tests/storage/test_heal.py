"""Packed memory that heals: what is written back, what stays, and models that become plain again."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.errors import FormatError
from flipproof.formats.packing import pack, unpack
from flipproof.spaces.contract import Faults

REPAIRING = [
    fp.SECDED(fp.Rounded(fp.Float32(), 26)),
    fp.SECDED(fp.Affine(bits=8), block=64),
    fp.BCH(fp.Rounded(fp.Float16(), 11), t=5),
    fp.BCH(fp.Affine(5, axis=0), t=3, block=165),
    fp.BCH(fp.Affine(6, axis=0), t=7),
    fp.TripleMSB(fp.Affine(bits=3)),
    fp.TripleMSB(fp.Float16(), copies=4, protect=2),
    fp.RangeChecked(fp.SECDED(fp.Float16()), per="channel"),
    fp.RangeChecked(fp.BCH(fp.Affine(5, axis=0), t=2), per="channel"),
    fp.BitClipped(fp.Float32(), zeros=(30,)),
]
OTHERS = [
    fp.Parity(fp.Float16()),
    fp.RangeChecked(fp.Float32()),
    fp.Rounded(fp.Float32(), 20),
    fp.Affine(bits=4, axis=0),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5 * 36, 40)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


def packed(format):
    torch.manual_seed(0)
    net = Net().eval()
    net.conv.bias.requires_grad_(False)
    return fp.pack_(net, {"*.weight": format}, where=fp.Parameters(exclude="norm"))


def some_faults(model, rate, seed):
    space = fp.FaultSpace(model, where=fp.Parameters(include=["conv.weight", "fc.weight"]))
    generator = np.random.default_rng(seed)
    return space, Faults(np.flatnonzero(generator.random(space.bits) < rate))


def buffers(model):
    return {name: b.clone() for name, b in model.named_buffers()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("format", REPAIRING + OTHERS, ids=repr)
def test_clean_memory_is_left_as_it_is(format):
    net = packed(format)
    before = buffers(net)
    assert fp.scrub_(net) == 0
    assert same(buffers(net), before)
    damage = fp.damaged_words(net)
    assert damage["repairable"].sum() == damage["beyond_repair"].sum() == 0


@pytest.mark.parametrize("format", REPAIRING, ids=repr)
def test_single_faults_that_the_format_corrects_are_undone_in_memory(format):
    net = packed(format)
    before = buffers(net)
    clipped = isinstance(format, fp.BitClipped)
    voted = isinstance(format, fp.TripleMSB)
    m = format.inner.width
    for value in (0, 77, 200, 7199):
        bits = (30,) if clipped else (m - 1, m, m + 1) if voted else (0, 1, format.inner.width - 1)
        for bit in bits:
            space, _ = some_faults(net, 0, 0)
            with space.corrupted(space.faults([("fc.weight", value, bit)])):
                assert not same(buffers(net), before)
                assert fp.damaged_words(net)["repairable"].sum() == 1
                assert fp.scrub_(net) == 1
                assert same(buffers(net), before)
            assert same(buffers(net), before)


@pytest.mark.parametrize("format", REPAIRING + OTHERS, ids=repr)
@pytest.mark.parametrize("rate", [1e-3, 2e-2, 0.2])
def test_no_value_that_is_read_changes_and_healed_memory_is_clean(format, rate):
    net = packed(format)
    space, faults = some_faults(net, rate, 1)
    with space.corrupted(faults):
        hit = buffers(net)
        read = [net.conv.weight.clone(), net.fc.weight.clone()]
        damage = fp.damaged_words(net)
        assert same(buffers(net), hit)
        assert fp.scrub_(net) == damage["repairable"].sum()
        for before, after in zip(read, (net.conv.weight, net.fc.weight), strict=True):
            assert torch.equal(before.view(torch.int32), after.view(torch.int32))
        assert fp.scrub_(net) == 0
        again = fp.damaged_words(net)
        assert again["repairable"].sum() == 0
        assert again["beyond_repair"].equals(damage["beyond_repair"])
        if format in OTHERS and not format.stored_constants:
            assert same(buffers(net), hit)
        if isinstance(format, fp.Parity):
            assert damage["beyond_repair"].sum() > 0


@pytest.mark.parametrize(
    "format",
    [fp.SECDED(fp.Float16()), fp.BCH(fp.Rounded(fp.Float16(), 11), t=5), fp.SECDED(fp.Affine(8), block=64)],
    ids=repr,
)
def test_every_word_is_what_a_plain_count_of_its_faults_says(format):
    """With at most t faults a code word it is as written; with t + 1, where a parity tells, it stays as hit."""
    net, t = packed(format), getattr(format, "t", 1)
    decoder = net.fc.parametrizations.weight
    layout = format.layout(7200)
    written = unpack(decoder.original0, layout, (7200,)).long()
    generator = np.random.default_rng(3)
    blocks = 7200 // format.together
    number = generator.integers(0, t + 2, blocks)
    hits = []
    for block, errors in enumerate(number.tolist()):
        first = block * format.together
        places = [
            (first + j, bit)
            for j in range(format.together)
            for bit in range(int(layout.width(np.array([first + j]))[0]))
        ]
        hits += [("fc.weight", *places[i]) for i in generator.choice(len(places), errors, replace=False)]
    space, _ = some_faults(net, 0, 0)
    with space.corrupted(space.faults(hits)):
        hit = unpack(decoder.original0, layout, (7200,)).long()
        damage = fp.damaged_words(net).set_index("name").loc["fc.weight"]
        written_back = fp.scrub_(net)
        after = unpack(decoder.original0, layout, (7200,)).long()
    few = torch.from_numpy(np.repeat(number <= t, format.together))
    assert torch.equal(after[few], written[few])
    assert torch.equal(after[~few], hit[~few])
    assert written_back == damage["repairable"] == int((hit != written)[few].sum())
    assert damage["beyond_repair"] == int((~few).sum())


def test_copies_of_bounds_are_healed_too():
    format = fp.RangeChecked(fp.Float32())
    net = packed(format)
    before = buffers(net)
    space, _ = some_faults(net, 0, 0)
    with space.corrupted(space.faults([("fc.weight", 7200, 30), ("fc.weight", 7204, 3), ("conv.weight", 46, 1)])):
        assert fp.scrub_(net) == 3
        assert same(buffers(net), before)


def test_parts_of_a_model_and_models_without_words():
    net = packed(fp.SECDED(fp.Float16()))
    space, _ = some_faults(net, 0, 0)
    with space.corrupted(space.faults([("fc.weight", 1, 1), ("conv.weight", 1, 1)])):
        assert fp.scrub_(net, where=fp.Parameters(include="conv.weight")) == 1
        assert fp.scrub_(net) == 1
    for call in (fp.scrub_, fp.damaged_words, fp.unpack_):
        with pytest.raises(FormatError, match="packed"):
            call(nn.Linear(2, 2))


@pytest.mark.parametrize("format", REPAIRING + OTHERS, ids=repr)
def test_an_unpacked_model_holds_what_the_words_are_read_as(format):
    plain = Net()
    net = packed(format)
    space, faults = some_faults(net, 1e-2, 5)
    x = torch.randn(3, 1, 8, 8)
    with space.corrupted(faults), torch.no_grad():
        expected = net(x)
        there = copy.deepcopy(net)
        assert fp.unpack_(there) is there
    with torch.no_grad():
        assert torch.equal(there(x).isnan(), expected.isnan())
        assert torch.equal(there(x).nan_to_num(), expected.nan_to_num())
        assert torch.equal(net(x), packed(format)(x))  # the model that it was copied from is packed as before
    assert type(there.fc) is nn.Linear
    assert list(there.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in there.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert {name for name, p in there.named_parameters() if not p.requires_grad} == {"conv.bias"}
    assert not any("_stored_order" in vars(module) for module in there.modules())
    assert [s.name for s in fp.FaultSpace(there).sites] == [name for name, _ in plain.named_parameters()]
    there(x).sum().backward()
    assert there.fc.weight.grad is not None
    fp.pack_(there, {"fc.weight": fp.Float32()})
    assert [name for name, _ in fp.unpack_(there).named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_come_back_whole(kind):
    torch.manual_seed(0)
    layer, x = kind(4, 5, num_layers=2, bidirectional=True), torch.randn(7, 3, 4)
    names = list(layer.state_dict())
    fp.pack_(layer, fp.SECDED(fp.Affine(bits=4)))
    with torch.no_grad():
        expected = layer(x)[0]
    again = fp.unpack_(copy.deepcopy(layer))
    assert type(again) is kind
    assert list(again.state_dict()) == names
    assert not again._forward_hooks
    assert not again._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(again(x)[0], expected)
        again.weight_hh_l0.zero_()  # the layer reads the parameters themselves
        assert not torch.equal(again(x)[0], expected)
    again(x)[0].sum().backward()
    assert again.weight_ih_l0.grad is not None


def test_words_are_loaded_and_decoded_once(tmp_path):
    format = fp.BCH(fp.Rounded(fp.Float16(), 11), t=5)
    net = packed(format)
    torch.save(net.state_dict(), tmp_path / "words.pt")
    other = packed(format)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(torch.load(tmp_path / "words.pt"))
    fp.unpack_(other)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(other(x), net(x))


def test_a_bound_that_has_no_word_is_refused():
    with pytest.raises(FormatError, match="per='channel'"):
        packed(fp.RangeChecked(fp.Affine(5, axis=0)))


def test_words_of_every_width_are_packed_again_as_they_were():
    words = torch.randint(0, 2**32, (64,))
    stream = pack(words & (2**31 - 1), 31)
    assert torch.equal(pack(unpack(stream, 31, (64,)), 31), stream)
