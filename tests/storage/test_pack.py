import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

import flipproof as fp
from flipproof.errors import FaultSpaceError, FormatError
from flipproof.formats.base import word_dtype
from flipproof.formats.layout import Layout
from flipproof.formats.packing import pack, unpack
from flipproof.spaces.contract import Faults

FORMATS = [
    fp.TripleMSB(fp.Affine(bits=3)),
    fp.Affine(bits=8),
    fp.Affine(bits=3, axis=0),
    fp.SECDED(fp.Affine(bits=8)),
    fp.SECDED(fp.Float32()),
    fp.SECDED(fp.Affine(bits=8), block=32),
    fp.SECDED(fp.BFloat16(), block=64),
    fp.Float32(),
    fp.BFloat16(),
    fp.FixedPoint(),
    fp.BitClipped(fp.Float32(), zeros=(30,)),
    fp.Parity(fp.Float16()),
    fp.SECDED(fp.Rounded(fp.Float32(), 26)),
    fp.BCH(fp.Rounded(fp.Float16(), 11), t=5),
    fp.BCH(fp.Affine(bits=5, axis=0), t=3, block=165),
    fp.Rounded(fp.Float32(), 20),
    fp.RangeChecked(fp.Float32()),
    fp.RangeChecked(fp.SECDED(fp.Affine(bits=6, axis=0)), per="channel"),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5 * 36, 7)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


def network():
    torch.manual_seed(0)
    return Net().eval()


def images():
    torch.manual_seed(1)
    return torch.randn(6, 1, 8, 8)


@given(st.integers(1, 64), st.lists(st.integers(0, 2**64 - 1), max_size=30))
@settings(max_examples=150, deadline=None)  # the first call may compile
def test_packing_is_the_bit_stream_of_a_plain_python_twin(width, values):
    values = [value & (2**width - 1) for value in values]
    signed = [v - 2**64 if width > 32 and v >= 2**63 else v for v in values]
    words = torch.tensor(signed, dtype=torch.int64).to(word_dtype(width))
    packed = pack(words, width)
    stream = sum(value << (i * width) for i, value in enumerate(values))
    size = math.ceil(len(values) * width / 8)
    assert packed.tolist() == list(stream.to_bytes(size, "little"))
    assert torch.equal(unpack(packed, width, (len(values),)), words)


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 4), st.lists(st.integers(1, 20), max_size=7)
)
@settings(max_examples=80, deadline=None)
def test_words_of_different_widths_are_packed_without_a_gap(block, blocks, tail):
    layout = Layout(tuple(block), blocks, tuple(tail))
    widths = block * blocks + tail
    values = [(0x9E3779B97F4A7C15 * (v + 1)) % 2**width for v, width in enumerate(widths)]
    words = torch.tensor(values, dtype=torch.int64).to(word_dtype(layout.widest))
    starts = [sum(widths[:v]) for v in range(len(widths))]
    stream = sum(value << start for value, start in zip(values, starts, strict=True))
    packed = pack(words, layout)
    assert layout.bits == sum(widths)
    assert packed.tolist() == list(stream.to_bytes(math.ceil(layout.bits / 8), "little"))
    assert torch.equal(unpack(packed, layout, (len(widths),)), words)
    places = [(v, bit) for v, width in enumerate(widths) for bit in range(width)]
    located = layout.locate(np.arange(layout.bits, dtype=np.int64))
    assert list(zip(*(part.tolist() for part in located), strict=True)) == places
    every = np.arange(len(widths), dtype=np.int64)
    assert layout.first(every).tolist() == starts
    assert layout.width(every).tolist() == widths


@pytest.mark.parametrize("tracing", [False, True])
@pytest.mark.parametrize(
    "width", [1, 3, 5, 8, 13, 32, 39, 57, 63, 64, Layout((5, 5, 4, 4), 7, (5, 5, 4, 4, 4, 4, 4, 4))]
)
def test_the_ways_of_unpacking_by_tensor_operations_agree(width, tracing, monkeypatch):
    from flipproof.formats import packing

    words = torch.randint(-(2**62), 2**62, (4, 9)).to(torch.int64)
    if isinstance(width, Layout):
        every = torch.from_numpy(width.width(np.arange(36))).reshape(4, 9)
        words = (words & (2**every - 1)).to(torch.uint8)
    else:
        words = (words & (2**width - 1) if width < 64 else words).to(word_dtype(width))
    packed = pack(words, width)
    expected = unpack(packed, width, (4, 9))
    monkeypatch.setattr(packing, "in_reach", lambda tensor: False)
    monkeypatch.setattr(packing, "_AT_ONCE", 10)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: tracing)
    assert torch.equal(unpack(packed, width, (4, 9)), expected)
    with pytest.raises(ValueError, match="bytes, got"):
        unpack(packed[:-1], width, (4, 9))


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_stored_models_compute_what_the_simulation_computes(format):
    net, x = network(), images()
    space = fp.FaultSpace(net, format=format)
    with space.stored(), torch.no_grad():
        expected = net(x)
    stored = fp.pack_(copy.deepcopy(net), format)
    with torch.no_grad():
        assert torch.equal(stored(x), expected)
    words = {name for name, _ in stored.named_buffers() if name.endswith("original0")}
    own = {site.name: site.name[len(site.layer) + 1 :] for site in space.sites}
    sites = [s for s in space.sites if f"{s.layer}.parametrizations.{own[s.name]}.original0" in words]
    assert len(sites) == len(words)
    assert {site.format for site in sites} == {format}
    kept = sum(site.values for site in sites)
    packed = sum(b.numel() for n, b in stored.named_buffers() if n in words)
    assert packed == sum(math.ceil(site.bits / 8) for site in sites)
    constants = sum(b.nbytes for n, b in stored.named_buffers() if ".original" in n and not n.endswith("original0"))
    assert fp.packed_bytes(stored) == fp.packed_bytes(net) - 4 * kept + packed + constants


@pytest.mark.parametrize("format", FORMATS, ids=repr)
@pytest.mark.parametrize("faults", [fp.BitErrorRate(1e-2), fp.StuckAt(0.05, 1)], ids=repr)
def test_faults_in_packed_bytes_give_the_same_records_and_are_taken_back(format, faults):
    net, x = network(), images()
    data = [(x, torch.arange(6) % 7)]
    weights = fp.Parameters(include=["conv.weight", "fc.weight"])
    simulated = fp.assess(net, data=data, faults=faults, format={"*": format}, where=weights, trials=12)
    stored = fp.pack_(copy.deepcopy(net), {"*": format}, where=weights)
    before = {name: buffer.clone() for name, buffer in stored.named_buffers()}
    real = fp.assess(stored, data=data, faults=faults, where=weights, trials=12)
    columns = [column for column in simulated.trials if column != "seconds"]
    assert real.trials[columns].equals(simulated.trials[columns])
    assert real.golden == simulated.golden
    assert all(torch.equal(buffer, before[name]) for name, buffer in stored.named_buffers())


def test_single_bits_of_every_word_are_the_same_outputs():
    net, x = network(), images()
    format = fp.TripleMSB(fp.Affine(bits=3))
    stored = fp.pack_(copy.deepcopy(net), format)
    simulated = fp.FaultSpace(net, format=format)
    real = fp.FaultSpace(stored)
    assert [(s.name, s.offset, s.bits) for s in real.sites] == [(s.name, s.offset, s.bits) for s in simulated.sites]
    for position in range(0, simulated.bits, 61):
        places = simulated.places(Faults(torch.tensor([position]).numpy()))
        with simulated.corrupted(simulated.faults(places)), torch.no_grad():
            expected = net(x)
        with real.corrupted(real.faults(places)), torch.no_grad():
            assert torch.equal(stored(x), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind):
    torch.manual_seed(0)
    layer, x = kind(4, 5, num_layers=2, bidirectional=True), torch.randn(7, 3, 4)
    format = fp.Affine(bits=4)
    with fp.FaultSpace(layer, format=format).stored(), torch.no_grad():
        expected = layer(x)[0]
    stored = fp.pack_(layer, format)
    with torch.no_grad():
        for other in (stored, copy.deepcopy(stored)):
            assert torch.equal(other(x)[0], expected)
            assert torch.equal(other(x)[0], expected)
    space = fp.FaultSpace(stored, where=fp.Parameters(kinds=("weight",)))
    with space.corrupted(space.faults([("weight_hh_l0", 3, 3)])), torch.no_grad():
        assert not torch.equal(stored(x)[0], expected)
    with torch.no_grad():
        assert torch.equal(stored(x)[0], expected)


def test_it_travels(tmp_path):
    net, x = network(), images()
    stored = fp.pack_(net, fp.TripleMSB(fp.Affine(bits=3, axis=0)))
    with torch.no_grad():
        expected = stored(x)
        save_file(stored.state_dict(), tmp_path / "net.safetensors")
        other = fp.pack_(network(), fp.TripleMSB(fp.Affine(bits=3, axis=0)))
        for parameter in other.parameters():
            parameter.zero_()
        other.load_state_dict(load_file(tmp_path / "net.safetensors"))
        assert torch.equal(other(x), expected)
        assert torch.equal(copy.deepcopy(stored)(x), expected)
        with parametrize.cached():
            assert torch.equal(stored(x), expected)
        exported = torch.export.export(stored, (x,)).module()
        assert torch.allclose(exported(x), expected, atol=1e-6)
        half = copy.deepcopy(stored).half().float()
        assert torch.equal(half.conv.weight, stored.conv.weight)  # no cast reaches words and their constants


def test_onnx(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    stored = fp.pack_(network(), fp.Affine(bits=4))
    assert torch.onnx.export(stored, (images(),), dynamo=True) is not None


def test_what_cannot_be_stored_is_refused_and_nothing_changes():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(6, 3), nn.Linear(3, 6)
            self.out.weight = self.embed.weight

    tied = Tied()
    with pytest.raises(FormatError, match=r"embed\.weight and out\.weight are one tied parameter"):
        fp.pack_(tied, fp.Float32())
    assert isinstance(tied.out.weight, nn.Parameter)
    net = network()
    with torch.no_grad():
        net.fc.weight[0, 0] = float("nan")
    with pytest.raises(FormatError, match=r"fc\.weight"):
        fp.pack_(net, fp.Affine(bits=4))
    assert len(list(net.parameters())) == 6
    stored = fp.pack_(network(), fp.Affine(bits=4))
    with pytest.raises(FormatError, match="already"):
        fp.pack_(stored, fp.Affine(bits=4))
    with pytest.raises(FaultSpaceError, match="cannot store it differently"):
        fp.FaultSpace(stored, format=fp.Float32())
    with pytest.raises(FormatError, match="no parameter"):
        fp.pack_(nn.BatchNorm1d(3), fp.Affine(bits=4))


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_constants_survive_as_whole_numbers(one, other):
    from flipproof.formats.packing import Packed, _as_integers

    constant = torch.tensor([one, other], dtype=torch.float64)
    constant = torch.where(constant.abs() < 2.0**-960, torch.zeros_like(constant), constant)
    assert torch.equal(Packed.constant(_as_integers(constant)), constant)
    assert torch.equal(Packed.constant(_as_integers(constant[0])), constant[0])


@pytest.mark.parametrize("stuck", [None, 0, 1])
def test_packed_words_outside_the_reach_of_compiled_code_are_hit_alike(stuck, monkeypatch):
    torch.manual_seed(0)
    net = fp.pack_(nn.Linear(40, 30), fp.TripleMSB(fp.Affine(bits=3)))
    packed = net.parametrizations.weight.original0
    before = packed.clone()
    space = fp.FaultSpace(net, where=fp.Parameters(include="weight"))
    hits = [("weight", value, bit) for value in range(0, 1200, 3) for bit in (0, 2, 4)]
    found = []
    for reach in (True, False):  # on a CUDA device: words that a kernel for the CPU cannot see
        if not reach:
            monkeypatch.setattr(fp.FaultSpace, "_paths", lambda self: (None, None, list(self.cells)))
        with space.corrupted(space.faults(hits, stuck=stuck)) as changed:
            found.append((changed, packed.clone()))
        assert torch.equal(packed, before)
    assert found[0][0] == found[1][0] > 100
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_faults_hit_packed_words_alike():
    torch.manual_seed(0)
    net = nn.Linear(40, 30)
    x = torch.randn(50, 40)
    data = [(x, net(x).argmax(dim=1))]
    fp.pack_(net, fp.TripleMSB(fp.Affine(bits=3)))
    setup = {"faults": fp.BitErrorRate(1e-2), "trials": 10}
    here = fp.assess(net, data=data, **setup)
    there = fp.assess(net.cuda(), data=data, **setup)
    assert (here.trials["accuracy"] - there.trials["accuracy"]).abs().max() < 0.03
