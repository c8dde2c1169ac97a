import math
import struct
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flipproof as fp
from flipproof.errors import FlipproofWarning, FormatError
from flipproof.formats import parse_format
from flipproof.testing import FormatContract

pytestmark = pytest.mark.filterwarnings("ignore:BitClipped:flipproof.errors.FlipproofWarning")


class ClippedContract(FormatContract):
    words_round_trip = False

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_special_values_are_stored_or_refused(self, bad):
        if isinstance(self.format.inner, fp.Affine):
            with pytest.raises(FormatError):
                self.format.encode(torch.tensor([bad, 1.0]))
        else:
            with pytest.warns(FlipproofWarning, match="1 of 2 values"):
                decoded = self.format.encode(torch.tensor([bad, 1.0])).decode()
            assert not bool(torch.isnan(decoded).any())

    def test_every_bit_of_a_model_can_be_hit_and_comes_back(self):  # clipped bits change nothing: tested below
        space = fp.FaultSpace(torch.nn.Linear(3, 2), format={"*": self.format})
        assert space.bits == 8 * self.format.width


class TestFloat32Without30(ClippedContract):
    format = fp.BitClipped(fp.Float32(), zeros=(30,))

    def values(self, shape=(4, 6), dtype=torch.float32, seed=0):
        return super().values(shape, dtype, seed).clamp(-1.9, 1.9)

    @pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.5, 1e-3])
    def test_constant_tensors_stay_constant(self, value):
        super().test_constant_tensors_stay_constant(value)


class TestAffineWithoutItsTopBit(ClippedContract):
    format = fp.BitClipped(fp.Affine(bits=4), zeros=(3,), ones=(0,))
    stores_nan = stores_infinity = False

    def test_decoded_values_are_stored_without_further_loss(self):
        pytest.skip("bits that are not constant: clipping is lossy, and meant to be")


@given(st.integers(0, 2**32 - 1), st.sets(st.integers(0, 31)), st.sets(st.integers(0, 31)))
def test_words_read_as_a_scalar_twin_reads_them(word, zeros, ones):
    ones -= zeros
    if not zeros | ones:
        return
    clipped = fp.BitClipped(fp.Float32(), zeros=tuple(zeros), ones=tuple(ones))
    for bit in zeros:
        word_read = word & ~(1 << bit)
        word = word_read
    for bit in ones:
        word |= 1 << bit
    (expected,) = struct.unpack("<f", struct.pack("<I", word))
    signed = word - (1 << 32) if word >> 31 else word
    (value,) = clipped.decode_words(torch.tensor([signed], dtype=torch.int32), (), torch.float32).tolist()
    assert value == expected or (math.isnan(value) and math.isnan(expected))


@pytest.mark.parametrize("bit", range(32))
def test_a_fault_in_a_clipped_bit_changes_nothing_and_any_other_its_bit(bit):
    net = torch.nn.Linear(3, 2)
    space = fp.FaultSpace(net, format=fp.BitClipped(fp.Float32(), zeros=(30,)))
    before = net.weight.detach().clone().view(torch.int32)
    with space.corrupted(space.faults([("weight", 4, bit)])) as changed:
        difference = (net.weight.detach().view(torch.int32) ^ before).view(-1).tolist()
    assert changed == 1  # the stored bit flips, whatever is read from it
    expected = 0 if bit == 30 else -(2**31) if bit == 31 else 1 << bit
    assert difference == [0, 0, 0, 0, expected, 0]


def test_weights_below_two_stay_as_they_are_and_larger_ones_are_warned_of():
    x = torch.tensor([1.9999, -0.3, 0.0, 1e-30])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = fp.BitClipped(fp.Float32(), zeros=(30,)).encode(x).decode()
    assert torch.equal(decoded.view(torch.int32), x.view(torch.int32))
    with pytest.warns(FlipproofWarning, match="not constant: 1 of 2 values"):
        fp.BitClipped(fp.Float32(), zeros=(30,)).encode(torch.tensor([2.0, 1.0]))


def test_it_is_read_from_text_and_stores_what_its_inner_format_stores():
    assert parse_format("BitClipped(Float32(), zeros=(30,))") == fp.BitClipped(fp.Float32(), zeros=(30,))
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    clipped = fp.BitClipped(fp.Affine(bits=8), zeros=(0,))
    space = fp.FaultSpace(net, format=clipped)
    assert [site.name for site in space.sites if site.format == clipped] == ["0.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"zeros": (32,)}, "bits 0 to 31"),
        ({"zeros": (-1,)}, "bits 0 to 31"),
        ({"ones": (True,)}, "bits 0 to 31"),
        ({}, "at least one bit"),
        ({"zeros": (3,), "ones": (3,)}, "each once"),
        ({"zeros": (3, 3)}, "each once"),
    ],
)
def test_refuses_bits_that_are_not_there(arguments, message):
    with pytest.raises(FormatError, match=message):
        fp.BitClipped(fp.Float32(), **arguments)


def test_refuses_to_clip_what_is_no_format():
    with pytest.raises(FormatError, match="Format"):
        fp.BitClipped(fp.Float32, zeros=(30,))
