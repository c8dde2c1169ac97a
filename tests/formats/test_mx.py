"""MX against a scalar twin of the OCP specification, ml_dtypes and torchao."""

import warnings
from copy import deepcopy
from fractions import Fraction
from math import isnan, nan

import numpy as np
import pytest
import torch

import flipproof as fp
from flipproof.errors import FormatError
from flipproof.formats import parse_format
from flipproof.formats.base import word_dtype
from flipproof.spaces.contract import Faults
from flipproof.testing import FormatContract

NAMES = ["MXFP8E4M3", "MXFP8E5M2", "MXFP6E3M2", "MXFP6E2M3", "MXFP4", "MXINT8"]


class Contract(FormatContract):
    stores_nan = False
    stores_infinity = False
    short_blocks = True

    def test_every_bit_of_a_model_can_be_hit_and_comes_back(self):
        super().test_every_bit_of_a_model_can_be_hit_and_comes_back(torch.float32)


class TestMXFP8E5M2(Contract):
    format = fp.MX("MXFP8E5M2")


class TestMXFP6E2M3(Contract):
    format = fp.MX("MXFP6E2M3")


class TestMXFP4(Contract):
    format = fp.MX("MXFP4")


class TestMXINT8(Contract):
    format = fp.MX("MXINT8")


# (exponent bits, fraction bits, words of the largest exponent that are no numbers) as in section 5.3
ELEMENTS = {
    "MXFP8E4M3": (4, 3, 1),
    "MXFP8E5M2": (5, 2, 4),
    "MXFP6E3M2": (3, 2, 0),
    "MXFP6E2M3": (2, 3, 0),
    "MXFP4": (2, 1, 0),
}


def magnitudes(name):
    """All finite magnitudes of the elements, in the order of their words."""
    if name == "MXINT8":
        return [Fraction(i, 64) for i in range(128)]
    e, m, taken = ELEMENTS[name]
    bias = 2 ** (e - 1) - 1
    found = [Fraction(f, 2**m) * Fraction(2) ** (1 - bias) for f in range(2**m)]
    found += [(1 + Fraction(f, 2**m)) * Fraction(2) ** (k - bias) for k in range(1, 2**e) for f in range(2**m)]
    return found[: len(found) - taken]


def twin(name, values):
    """(scale, words, what they read as) of one block, in exact arithmetic, word by word of section 6.3."""
    known = magnitudes(name)
    exact = [Fraction(v) for v in values]
    largest = max(abs(v) for v in exact)
    highest = max(k for k in range(-10, 20) if Fraction(2) ** k <= known[-1])
    shared = -127
    if largest:
        power = -1100
        while Fraction(2) ** (power + 1) <= largest:
            power += 1
        shared = min(max(power - highest, -127), 127)
    words, read = [], []
    for value, v in zip(values, exact, strict=True):
        size = abs(v) / Fraction(2) ** shared
        distance = [abs(k - size) for k in known]
        near = [i for i, d in enumerate(distance) if d == min(distance)]
        word = near[0] if len(near) == 1 else next(i for i in near if i % 2 == 0)
        negative = bool(np.signbit(value))
        read.append(float((-1 if negative else 1) * known[word] * Fraction(2) ** shared))
        if name == "MXINT8":
            words.append(-word % 256 if negative else word)
        else:
            words.append(word | negative << sum(ELEMENTS[name][:2]))
    return shared + 127, words, read


def blocks_of(stored):
    """(scale, elements) of each block."""
    words, bits = (stored.words.to(torch.int64) & 0xFFFF).reshape(-1), stored.format.element_bits
    for block in words.split(32):
        assert all(word < 2**bits for word in block[1:].tolist())
        yield int(block[0]) >> bits, [int(word) & (2**bits - 1) for word in block]


@pytest.mark.parametrize("name", NAMES)
def test_every_word_is_the_specification_s(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 20, generator=generator) * torch.exp2(torch.randint(-3, 4, (5, 20), generator=generator))
    x = x.double() * torch.tensor([1e-30, 1.0, 1e-45, 3e3, 1e30], dtype=torch.float64)[:, None]
    x[1, :9] = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.25, 1.75, 0.375, -0.8125, 2.5])  # ties among them
    stored = fp.MX(name).encode(x)
    read = stored.decode().reshape(-1).split(32)
    for block, values, found in zip(x.reshape(-1).split(32), read, blocks_of(stored), strict=True):
        scale, words, expected = twin(name, block.tolist())
        assert found == (scale, words)
        assert values.tolist() == expected
    assert len(read[-1]) == 100 % 32


@pytest.mark.parametrize("name", NAMES)
def test_every_word_of_memory_reads_as_the_specification_says(name):
    format = fp.MX(name)
    bits = format.element_bits
    known = [float(v) for v in magnitudes(name)]
    every = torch.arange(2**bits)
    for scale in (0, 1, 126, 127, 200, 254, 255):
        block = torch.cat([every[:32] | torch.tensor([scale << bits] + [0] * 31)[: min(32, 2**bits)], every[32:]])
        for i in range(32, 2**bits, 32):  # elements of other blocks come under the same scale
            block[i] |= scale << bits
        read = format.decode_words(block.to(word_dtype(format.width)), (), torch.float64).tolist()
        for word, value in enumerate(read):
            if name == "MXINT8":
                element = (word - 256 if word >= 128 else word) / 64
            else:
                sign, magnitude = divmod(word, 2 ** (bits - 1))
                special = [float("inf"), nan, nan, nan] if name == "MXFP8E5M2" else [nan]
                element = (-1) ** sign * (known + special)[magnitude]
            expected = nan if scale == 255 else element * 2.0 ** (scale - 127)
            assert value == expected or (isnan(value) and isnan(expected))


def test_ml_dtypes_read_the_same():
    kinds = pytest.importorskip("ml_dtypes")
    named = {
        "MXFP8E4M3": "float8_e4m3fn",
        "MXFP6E3M2": "float6_e3m2fn",
        "MXFP6E2M3": "float6_e2m3fn",
        "MXFP4": "float4_e2m1fn",
    }
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for name, element in {**named, "MXFP8E5M2": "float8_e5m2"}.items():
        stored = fp.MX(name).encode(x)
        read = []
        for scale, words in blocks_of(stored):
            factor = np.array([scale], np.uint8).view(kinds.float8_e8m0fnu).astype(np.float32)
            read += (np.array(words, np.uint8).view(getattr(kinds, element)).astype(np.float32) * factor).tolist()
        assert stored.decode().reshape(-1).tolist() == read


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["MXFP8E4M3", "MXFP8E5M2", "MXFP6E3M2", "MXFP6E2M3", "MXFP4"])
def test_torchao_writes_the_same(name):
    pytest.importorskip("torchao")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.prototype.mx_formats import mx_tensor
        from torchao.prototype.mx_formats.kernels import unpack_uint4
    kinds = {
        "MXFP8E4M3": torch.float8_e4m3fn,
        "MXFP8E5M2": torch.float8_e5m2,
        "MXFP6E3M2": "fp6_e3m2",
        "MXFP6E2M3": "fp6_e2m3",
        "MXFP4": torch.float4_e2m1fn_x2,
    }
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=generator) * torch.exp2(torch.randint(-20, 20, (64, 1), generator=generator))
    x[3, :32], x[4, 5] = 0, -0.0
    scales, elements = mx_tensor.to_mx(x, kinds[name], 32)
    elements = unpack_uint4(elements) if name == "MXFP4" else elements.view(torch.uint8)
    found = list(blocks_of(fp.MX(name).encode(x)))
    assert [scale for scale, _ in found] == scales.view(torch.uint8).reshape(-1).tolist()
    assert [word for _, words in found for word in words] == elements.reshape(-1).tolist()


def test_memory_is_exactly_elements_and_scales():
    for name, bits in zip(NAMES, (8, 8, 6, 6, 4, 8), strict=True):
        format = fp.MX(name)
        assert format.stored_bits((64, 32)) == 64 * (32 * bits + 8)
        assert format.stored_bits((5,)) == 5 * bits + 8
        assert format.stored_bits((33,)) == 33 * bits + 16
        assert format.stored_bits((0, 3)) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, 7), (3, 5)])
def test_packed_words_are_hit_as_simulated_ones(name, shape):
    format, net = fp.MX(name), torch.nn.Embedding(*shape)
    packed = fp.pack_(deepcopy(net), {"*": format})
    simulated, real = fp.FaultSpace(net, format={"*": format}), fp.FaultSpace(packed)
    assert simulated.bits == real.bits == format.stored_bits(shape)
    assert fp.packed_bytes(packed) == -(-format.stored_bits(shape) // 8)
    with simulated.stored():
        assert torch.equal(packed.weight, net.weight)
        for bit in range(simulated.bits):  # each by itself
            with simulated.corrupted(Faults(np.array([bit]))), real.corrupted(Faults(np.array([bit]))):
                assert torch.equal(packed.weight.nan_to_num(7.0), net.weight.nan_to_num(7.0)), bit
    assert torch.equal(fp.unpack_(packed).weight, format.encode(net.weight).decode())


def test_a_fault_in_the_scale_moves_its_block_and_no_other():
    net = torch.nn.Linear(64, 2, bias=False)
    space = fp.FaultSpace(net, format=fp.MX("MXFP4"))
    with torch.no_grad(), space.stored():
        golden = net.weight.clone().reshape(4, 32)
        for block in range(4):
            with space.corrupted(space.faults([("weight", 32 * block, 4)])):  # the lowest bit of the scale
                moved = net.weight.reshape(4, 32) / golden
                expected = {0.5, 2.0}
                assert set(moved[block][golden[block] != 0].tolist()) <= expected
                others = torch.arange(4) != block
                assert torch.equal(net.weight.reshape(4, 32)[others], golden[others])
        # 0xFF is NaN, for all of the block
        scale = int(fp.MX("MXFP4").encode(net.weight).words[0, 0]) >> 4
        ones = [("weight", 0, 4 + bit) for bit in range(8) if not scale >> bit & 1]
        with space.corrupted(space.faults(ones)):
            assert torch.equal(torch.isnan(net.weight.reshape(4, 32)).sum(dim=1), torch.tensor([32, 0, 0, 0]))
        assert torch.equal(net.weight.reshape(4, 32), golden)


def test_a_few_values_are_read_without_the_others(monkeypatch):
    stored = fp.MX("MXFP4").encode(torch.randn(1000, 32))
    seen, decode = [], fp.MX.decode_words
    monkeypatch.setattr(
        fp.MX, "decode_words", lambda self, words, *rest: seen.append(words.numel()) or decode(self, words, *rest)
    )
    stored.decode_at(torch.tensor([5, 77]), stored.words.reshape(-1)[[5, 77]])
    assert seen == [64]


def test_a_campaign_and_what_the_space_holds():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    x = torch.randn(60, 16)
    setup = {"data": [(x, net(x).argmax(dim=1))], "faults": fp.BitErrorRate([1e-2]), "trials": 10, "audit": 1.0}
    found = fp.assess(net, format=fp.MX("MXFP6E2M3"), **setup)
    assert found.bits == (512 + 128) * 6 + 20 * 8 + 36 * 32  # biases in their own type
    assert found.trials["critical_sdc"].sum() > 0
    packed = fp.pack_(deepcopy(net), fp.MX("MXFP6E2M3"))
    columns = [name for name in found.trials if name != "seconds"]
    assert fp.assess(packed, **setup).trials[columns].equals(found.trials[columns])


def test_every_single_bit_is_tried_as_whole_runs_have_it():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3)).eval()
    x, format = torch.randn(20, 6), {"*": fp.MX("MXFP4")}
    found = fp.inject_all(net, [(x, net(x).argmax(dim=1))], format=format, audit=0.05, progress=False)
    space, critical, due = fp.FaultSpace(net, format=format), 0, 0
    with torch.no_grad(), space.stored():
        golden = net(x).argmax(dim=1)
        for bit in range(space.bits):
            with space.corrupted(Faults(np.array([bit]))):
                scores = net(x)
            nan = torch.isnan(scores).any(dim=1)
            due += int(nan.sum())
            critical += int(((scores.argmax(dim=1) != golden) & ~nan).sum())
    assert (found.bits["critical_sdc"].sum(), found.bits["due"].sum()) == (critical, due)
    assert critical > 0


def test_a_profile_counts_the_words_that_have_a_bit():
    net = torch.nn.Linear(50, 4, bias=False)
    stored = fp.MX("MXFP4").encode(net.weight)
    scales = torch.tensor([scale for scale, _ in blocks_of(stored)])
    profile = fp.bit_profile(net, fp.MX("MXFP4"))
    assert profile[4:].tolist() == [float(((scales >> bit) & 1).double().mean()) for bit in range(8)]
    assert profile[0] == float((stored.words & 1).double().mean())


def test_what_it_cannot_do_is_said():
    with pytest.raises(FormatError, match="MX takes one of MXFP8E4M3"):
        fp.MX("MXFP5")
    for bad in (nan, float("inf")):
        with pytest.raises(FormatError, match="NaN or infinity"):
            fp.MX("MXFP8E5M2").encode(torch.tensor([1.0, bad]))
    for wrapper in (
        fp.SECDED,
        fp.Parity,
        fp.TripleMSB,
        fp.RangeChecked,
        lambda f: fp.Rounded(f, 3),
        lambda f: fp.BitClipped(f, (1,)),
    ):
        with pytest.raises(FormatError, match="stand alone"):
            wrapper(fp.MX("MXFP4"))
    with pytest.raises(FormatError, match="a word by itself"):
        fp.assess(
            torch.nn.Linear(4, 2),
            [(torch.randn(3, 4), torch.zeros(3))],
            faults=fp.RandomBits(1),
            trials=1,
            where=fp.Neurons(),
            format=fp.MX("MXFP4"),
        )
    assert parse_format("MX('MXINT8')") == fp.MX("MXINT8")
