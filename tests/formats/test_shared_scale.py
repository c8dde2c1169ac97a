"""Block floating point against its definition in exact numbers."""

from copy import deepcopy
from fractions import Fraction

import numpy as np
import pytest
import torch

import flipproof as fp
from flipproof.errors import FormatError
from flipproof.spaces.contract import Faults
from flipproof.testing import FormatContract


class Contract(FormatContract):
    stores_nan = False
    stores_infinity = False
    short_blocks = True

    def test_every_bit_of_a_model_can_be_hit_and_comes_back(self):
        super().test_every_bit_of_a_model_can_be_hit_and_comes_back(torch.float32)


class TestMSFP12(Contract):
    format = fp.BlockFloat(exponent=8, mantissa=3, block=16)


class TestPairs(Contract):
    format = fp.BlockFloat(exponent=5, mantissa=1, block=2)


class TestWide(Contract):
    format = fp.BlockFloat(exponent=10, mantissa=23, block=5)


def twin(format, values):
    """(exponent, words, values) of one block."""
    bias, top = 2 ** (format.exponent - 1) - 1, 2**format.mantissa - 1
    exact = [abs(Fraction(v)) for v in values]
    power = -1200
    while max(exact) >= Fraction(2) ** (power + 1):
        power += 1
    shared = min(max(power + bias, 0), 2**format.exponent - 1)
    step = Fraction(2) ** (shared - bias - format.mantissa + 1)
    sizes = [min(round(v / step), top) for v in exact]  # Fraction rounds half to even
    negative = [bool(np.signbit(v)) for v in values]
    words = [size | minus << format.mantissa for size, minus in zip(sizes, negative, strict=True)]
    return shared, words, [float(size * step) * (-1) ** minus for size, minus in zip(sizes, negative, strict=True)]


@pytest.mark.parametrize(
    "format", [fp.BlockFloat(8, 3, 16), fp.BlockFloat(3, 5, 7), fp.BlockFloat(10, 23, 4)], ids=repr
)
def test_words_and_values_are_the_definition_s(format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, dtype=torch.float64, generator=generator)
    x = x * torch.exp2(torch.randint(-6, 6, x.shape, generator=generator).double())
    x[:20], x[20:25], x[40] = 0.0, torch.tensor([0.5, 1.5, 2.5, 3.5, -7.75]), -0.0
    x[100:110] *= 1e30  # beyond the exponents of the second one
    x[120:130] *= 1e-30
    stored = format.encode(x)
    read, bits = stored.decode().split(format.block), 1 + format.mantissa
    for block, words, values in zip(x.split(format.block), stored.words.split(format.block), read, strict=True):
        shared, expected, means = twin(format, block.tolist())
        assert int(words[0]) >> bits == shared
        assert [int(word) & (2**bits - 1) for word in words] == expected
        assert values.tolist() == means


def test_the_shared_exponent_is_stored_once_and_hit():
    format, net = fp.BlockFloat(exponent=6, mantissa=4, block=8), torch.nn.Linear(12, 3, bias=False)
    assert format.stored_bits((3, 12)) == 36 * 5 + 5 * 6  # four blocks of eight, one of four
    space = fp.FaultSpace(net, format=format)
    assert space.bits == 210
    with torch.no_grad(), space.stored():
        golden = net.weight.clone().reshape(-1)
        for word in (0, 8, 32):
            with space.corrupted(space.faults([("weight", word, 5)])):
                moved = net.weight.reshape(-1) != golden
                inside = torch.zeros(36, dtype=torch.bool)
                inside[word : word + 8] = golden[word : word + 8] != 0
                assert torch.equal(moved, inside)


@pytest.mark.parametrize("shape", [(5, 9), (2, 3)])
def test_packed_words_are_hit_as_simulated_ones(shape):
    format, net = fp.BlockFloat(exponent=5, mantissa=2, block=16), torch.nn.Embedding(*shape)
    packed = fp.pack_(deepcopy(net), {"*": format})
    simulated, real = fp.FaultSpace(net, format={"*": format}), fp.FaultSpace(packed)
    assert simulated.bits == real.bits == format.stored_bits(shape)
    with simulated.stored():
        for bit in range(simulated.bits):
            with simulated.corrupted(Faults(np.array([bit]))), real.corrupted(Faults(np.array([bit]))):
                assert torch.equal(packed.weight, net.weight), bit


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((0, 3, 16), "exponent is a whole number from 1 to 10"),
        ((11, 3, 16), "exponent is"),
        ((8, 0, 16), "mantissa is a whole number from 1 to 23"),
        ((8, 3, 1), "block is a whole number from 2 to 1024"),
        ((8, 3.0, 16), "mantissa is"),
    ],
)
def test_other_numbers_are_refused(given, said):
    with pytest.raises(FormatError, match=said):
        fp.BlockFloat(*given)
