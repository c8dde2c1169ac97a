import copy
import struct

import numpy as np
import pytest
import torch

import flipproof as fp
from flipproof.errors import ConfigError, FormatError
from flipproof.formats import parse_format
from flipproof.spaces.contract import Faults
from flipproof.testing import FormatContract


class Checks(FormatContract):
    stores_nan = False

    def test_every_bit_of_a_model_can_be_hit_and_comes_back(self):
        super().test_every_bit_of_a_model_can_be_hit_and_comes_back(torch.float32)


class TestFloat32(Checks):
    format = fp.RangeChecked(fp.Float32())


class TestFloat32PerChannel(Checks):
    format = fp.RangeChecked(fp.Float32(), per="channel")


class TestFixedPoint(Checks):
    format = fp.RangeChecked(fp.FixedPoint(3, 8), copies=1)


class TestFixedPointPerChannel(Checks):
    format = fp.RangeChecked(fp.FixedPoint(3, 8), per="channel", copies=5)


class TestSECDED(Checks):
    format = fp.RangeChecked(fp.SECDED(fp.Float16()))


class TestBCHPerChannel(Checks):
    format = fp.RangeChecked(fp.BCH(fp.Affine(5), 3), per="channel")
    stores_infinity = False


class TestAffinePerChannel(Checks):
    format = fp.RangeChecked(fp.Affine(5, axis=0), per="channel")
    stores_infinity = False


def bits_of(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


def value_of(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def a_net():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        net.weight.mul_(torch.tensor([1.0, 3.0, 0.1, 2.0])[:, None])
    return net


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("copies", [1, 3])
def test_any_faults_against_a_reader_in_plain_python(per, copies):
    """Words of values, then of the least value, then of the largest, copy by copy; the majority of each bit counts."""
    net, format = a_net(), fp.RangeChecked(fp.Float32(), per=per, copies=copies)
    golden = net.weight.detach().clone()
    weights = [bits_of(v) for v in golden.reshape(-1).tolist()]
    rows = golden.reshape(4 if per == "channel" else 1, -1)
    bounds = [bits_of(v) for extreme in (rows.amin(1), rows.amax(1)) for _ in range(copies) for v in extreme.tolist()]
    memory = weights + bounds
    space = fp.FaultSpace(net, format=format)
    packed = fp.pack_(copy.deepcopy(net), format)
    real = fp.FaultSpace(packed)
    assert space.bits == real.bits == 32 * len(memory)
    kinds = np.zeros(3, int)
    for trial in range(90):
        random = np.random.default_rng(trial)
        stuck = [None, 0, 1][trial % 3]
        positions = np.sort(random.permutation(space.bits)[: random.integers(1, 60)])
        if trial % 5 == 0:  # bounds alone
            positions = np.sort(32 * len(weights) + random.permutation(32 * len(bounds))[: random.integers(1, 9)])
        hit = list(memory)
        for position in positions.tolist():
            mask = 1 << position % 32
            word = hit[position // 32]
            hit[position // 32] = word ^ mask if stuck is None else word | mask if stuck else word & ~mask
        read, voted = [], hit[len(weights) :]
        low, high = (
            [
                majority(voted[k * len(voted) // 2 :][r : r + len(rows) * copies : len(rows)][:copies])
                for r in range(len(rows))
            ]
            for k in (0, 1)
        )
        for v, word in enumerate(hit[: len(weights)]):
            row = v // 3 if per == "channel" else 0
            value = value_of(word)
            inside = value_of(low[row]) <= value <= value_of(high[row])
            read.append(bits_of(value) if inside else 0)
        outcome = np.zeros(3, int)
        for v, word in enumerate(hit):
            if word == memory[v]:
                continue
            if v >= len(weights):
                place = (v - len(weights)) // len(rows) // copies, (v - len(weights)) % len(rows)
                wrong = (low, high)[place[0]][place[1]] != bounds[place[0] * copies * len(rows) + place[1]]
                outcome[2 * wrong] += 1
            else:
                row, value = (v // 3 if per == "channel" else 0), value_of(word)
                inside = value_of(low[row]) <= value <= value_of(high[row])
                outcome[0 if read[v] == memory[v] else 2 if inside else 1] += 1
        expected = torch.tensor([r - 2**32 * (r >> 31) for r in read], dtype=torch.int32).view(4, 3)
        faults = Faults(positions, stuck)
        for each, module in ((space, net), (real, packed)):
            with each.corrupted(faults) as changed, torch.no_grad():
                found = module.weight.clone()
            assert torch.equal(found.view(torch.int32), expected)
            assert changed == sum((a ^ b).bit_count() for a, b in zip(hit, memory, strict=True))
            assert each.word_outcomes == tuple(outcome)
        kinds += outcome
        assert torch.equal(net.weight, golden)
        assert torch.equal(packed.weight, golden)
    assert (kinds[1:] > 20).all()
    assert (kinds[0] > 20) == (copies > 1)


def majority(words):
    return sum(1 << bit for bit in range(32) if sum(word >> bit & 1 for word in words) > len(words) / 2)


def test_a_bound_that_is_outvoted_counts_as_corrected_whatever_becomes_of_others():
    """All hit bounds counted as read wrongly where a single one was."""
    net = a_net()
    space = fp.FaultSpace(net, format=fp.RangeChecked(fp.Float32(), per="channel"))
    lows = 12  # words of values; copies of the four least values, of the four largest
    once, twice = [("weight", lows + 1, 30)], [("weight", lows + 4 * c + 2, 31) for c in (0, 1)]
    for hits, expected in ((once, (1, 0, 0)), (twice, (0, 0, 2)), (once + twice, (1, 0, 2))):
        with space.corrupted(space.faults(hits)):
            assert space.word_outcomes == expected


def test_scalars_and_single_channels_have_bounds_too():
    """A scalar parameter had no channel to count and was refused with an IndexError."""

    class Gain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.row = torch.nn.Parameter(torch.tensor(0.5)), torch.nn.Parameter(torch.tensor([[1.0, 2.0]]))

    for per in ("tensor", "channel"):
        for inner in (fp.Float32(), fp.Affine(5, axis=0)) if per == "channel" else (fp.Float32(),):
            format = {"*": fp.RangeChecked(inner, per=per)}
            net = Gain()
            space, packed = fp.FaultSpace(net, format=format), fp.pack_(Gain(), format)
            real = fp.FaultSpace(packed)
            assert space.bits == real.bits == (1 + 6 + 2 + 6) * inner.width
            for hits in ([("gain", 1, 3)], [("gain", 4, 3), ("gain", 5, 3)], [("row", 1, 1), ("row", 4, 0)]):
                with space.stored(), space.corrupted(space.faults(hits)), torch.no_grad():
                    ours = net.gain.clone(), net.row.clone(), space.word_outcomes
                with real.corrupted(real.faults(hits)), torch.no_grad():
                    theirs = packed.gain.clone(), packed.row.clone(), real.word_outcomes
                assert [part.shape for part in theirs[:2]] == [(), (1, 2)]
                assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True))
                assert ours[2] == theirs[2]


def test_bounds_of_a_tensor_need_one_scale():
    """They were words of the first channel's scale, and packed models read everything beyond it as 0."""
    net = a_net()
    for inner in (fp.Affine(5, axis=0), fp.SECDED(fp.Affine(5, axis=0))):
        with pytest.raises(FormatError, match=r"weight: .*scale a channel; take per='channel'"):
            fp.pack_(net, fp.RangeChecked(inner))
        with pytest.raises(FormatError, match=r"take per='channel'"):
            fp.RangeChecked(inner).encode(net.weight)
        packed = fp.pack_(copy.deepcopy(net), fp.RangeChecked(inner, per="channel"))
        assert torch.equal(packed.weight, inner.encode(net.weight).decode())


def test_neurons_and_analyses_have_no_words_for_bounds():
    """Bounds were counted as neurons, and as values, that are not there."""
    net, data = torch.nn.Linear(3, 2), [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))]
    format = fp.RangeChecked(fp.Float32())
    with pytest.raises(FormatError, match="stores constants of a tensor"):
        fp.assess(net, data, where=fp.Neurons(), format=format, faults=fp.RandomBits(1), trials=2)
    with pytest.raises(ConfigError, match="constants of the tensor in words of their own"):
        fp.analyze(net, data, fp.DeepVigor(), where=fp.Parameters(), format=format)


@pytest.mark.parametrize(
    "text", ["RangeChecked(Float32())", "RangeChecked(SECDED(Float16()), per='channel', copies=5)"]
)
def test_read_from_text(text):
    assert parse_format(repr(parse_format(text))) == parse_format(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fp.RangeChecked(fp.Float32), "Format"),
        (lambda: fp.RangeChecked(fp.Float32(), per="row"), "'tensor' or 'channel'"),
        (lambda: fp.RangeChecked(fp.Float32(), copies=2), "odd number"),
        (lambda: fp.RangeChecked(fp.Float32(), copies=True), "odd number"),
        (lambda: fp.RangeChecked(fp.SECDED(fp.Float32(), block=64)), "stand alone"),
        (lambda: fp.RangeChecked(fp.RangeChecked(fp.Float32())), "stand alone"),
        (lambda: fp.SECDED(fp.RangeChecked(fp.Float32())), "inside"),
        (lambda: fp.BitClipped(fp.RangeChecked(fp.Float32()), zeros=30), "inside"),
        (lambda: fp.RangeChecked(fp.Float32()).encode(torch.tensor([0.0, float("nan")])), "1 values are NaN"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(FormatError, match=message):
        make()
