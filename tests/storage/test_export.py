"""Models that leave PyTorch: as decoded floats, or as words with a decoder inside, which repairs faults there too."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.formats._split import Split
from flipproof.spaces.contract import Faults

FORMATS = [
    fp.SECDED(fp.Rounded(fp.Float32(), 26)),
    fp.BCH(fp.Rounded(fp.Float16(), 11), t=5),  # errors by table
    fp.BCH(fp.Affine(5, axis=0), t=2, block=100),  # by Berlekamp–Massey, and a longer last block
    fp.Rounded(fp.BFloat16(), 12),
    fp.RangeChecked(fp.SECDED(fp.FixedPoint(3, 9))),
    fp.TripleMSB(fp.Affine(bits=3)),
    fp.MX("MXFP4"),  # repairs nothing: most words are not hit
]
OTHERS = [
    fp.formats.Float64(),
    fp.Float8E4M3(),
    fp.Float8E5M2(),
    fp.BitClipped(fp.Float16(), zeros=(14,)),
    fp.Parity(fp.Float32()),
    fp.Float(6, 9, "none"),
    fp.Float(8, 12),
    fp.BlockFloat(8, 3, 16),
    *map(fp.MX, ("MXFP8E5M2", "MXFP6E3M2", "MXFP4", "MXINT8")),
]


def packed(format):
    torch.manual_seed(0)
    return fp.pack_(nn.Embedding(19, 20).eval(), format)


def hit(model, rate=1e-2):
    """Faults in every kind of word, kept."""
    space = fp.FaultSpace(model)
    faults = Faults(np.flatnonzero(np.random.default_rng(0).random(space.bits) < rate))
    with space.corrupted(faults):
        return model.parametrizations.weight.original0.clone()


def same(a, b):
    nan = torch.isnan(b)
    return torch.equal(torch.isnan(a), nan) and torch.equal(a[~nan].view(torch.int32), b[~nan].view(torch.int32))


def exported(model):
    return torch.export.export(model, (torch.arange(19),), dynamic_shapes=({0: torch.export.Dim("batch")},))


def to_onnx(program):
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        # without its optimiser, which folds small words into the floats that they stand for
        return torch.onnx.export(program, dynamo=True, verbose=False, optimize=False).model_proto


def run(model, x):
    session = pytest.importorskip("onnxruntime").InferenceSession(
        model.SerializeToString(),
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["ConstantFolding"],  # words are decoded at every run, not when the session is made
    )
    (first,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {first.name: x.numpy()})[0])


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_words_travel_with_their_decoder_which_repairs_what_is_hit_there(format):
    model, batches = packed(format), (torch.arange(19), torch.tensor([3, 1, 18]))
    clean = [model(x) for x in batches]
    words = hit(model)
    program = exported(model)
    graph = to_onnx(program)
    module = program.module()
    for x, expected in zip(batches, clean, strict=True):
        assert same(module(x), expected)
        assert same(run(graph, x), expected)
    with torch.no_grad():
        model.parametrizations.weight.original0.copy_(words)
        dict(module.named_buffers())["parametrizations.weight.original0"].copy_(words)
    (stored,) = [tensor for tensor in graph.graph.initializer if tensor.name.endswith("original0")]
    assert list(stored.dims) == [words.numel()]
    assert stored.raw_data != words.numpy().tobytes()
    stored.raw_data = words.numpy().tobytes()
    repaired = 0
    for x, before in zip(batches, clean, strict=True):
        expected = model(x)  # what the kernels read
        assert same(module(x), expected)
        assert same(run(graph, x), expected)
        repaired += int((expected == before).sum())
    assert repaired > 0.8 * sum(x.numel() for x in clean)


@pytest.mark.filterwarnings("ignore:BitClipped:flipproof.errors.FlipproofWarning")
@pytest.mark.parametrize("format", OTHERS, ids=repr)
def test_every_other_format_is_traced_bit_by_bit(format):
    model, x = packed(format), torch.arange(19)
    module = exported(model).module()
    for rate in (0.0, 0.05, 0.5):
        words = hit(model, rate)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.parametrizations.weight.original0.copy_(words)
            dict(module.named_buffers())["parametrizations.weight.original0"].copy_(words)
        assert same(module(x), other(x))


@pytest.mark.parametrize(
    ("format", "split"),
    [(fp.Float32(), Split(8, 23)), (fp.Float16(), Split(5, 10)), (fp.BFloat16(), Split(8, 7))],
    ids=repr,
)
def test_floats_by_arithmetic_are_the_bit_patterns(format, split):
    if format.width == 16:
        words = torch.arange(-(2**15), 2**15).to(torch.int16)
    else:
        words = torch.cat([torch.randint(-(2**31), 2**31, (100000,)), torch.arange(-70000, 70000)]).to(torch.int32)
    assert same(split.decode(words, torch.float32), format.decode_words(words, (), torch.float32))


def test_decoded_weights_travel_as_floats():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    fp.pack_(net, {"*.weight": fp.SECDED(fp.Float32())}, where=fp.Parameters(exclude="1"))
    plain = fp.unpack_(copy.deepcopy(net))
    x, other = torch.randn(6, 1, 8, 8), torch.randn(2, 1, 8, 8)
    program = torch.export.export(plain, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    graph = to_onnx(program)
    assert not [tensor.name for tensor in graph.graph.initializer if "original" in tensor.name]
    for batch in (x, other):
        with torch.no_grad():
            expected = net(batch)
            assert torch.equal(program.module()(batch), expected)
        assert torch.allclose(run(graph, batch), expected, atol=1e-6)  # onnxruntime sums in another order
