import struct
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flipproof as fp
from flipproof.errors import FormatError
from flipproof.formats import Float64, parse_format
from flipproof.testing import FormatContract


class Rounds(FormatContract):
    def test_every_bit_of_a_model_can_be_hit_and_comes_back(self):
        super().test_every_bit_of_a_model_can_be_hit_and_comes_back(torch.float32)


class TestFloat32(Rounds):
    format = fp.Rounded(fp.Float32(), 26)


class TestFloat16(Rounds):
    format = fp.Rounded(fp.Float16(), 11)


class TestBFloat16(Rounds):
    format = fp.Rounded(fp.BFloat16(), 12)


class TestFloat8E4M3(Rounds):
    format = fp.Rounded(fp.Float8E4M3(), 6)
    stores_nan = False  # its one NaN is all ones: without the lowest bit it is a number


class TestFloat8E5M2(Rounds):
    format = fp.Rounded(fp.Float8E5M2(), 7)


class TestFloat64(Rounds):
    format = fp.Rounded(Float64(), 40)


class TestNothingDropped(Rounds):
    format = fp.Rounded(fp.Float16(), 16)


class TestFixedPoint(Rounds):
    format = fp.Rounded(fp.FixedPoint(15, 16), 26)
    stores_nan = False


class TestAffine(Rounds):
    format = fp.Rounded(fp.Affine(8), 5)
    stores_nan = stores_infinity = False


class TestAffinePerChannel(Rounds):
    format = fp.Rounded(fp.Affine(8, axis=0), 6)
    stores_nan = stores_infinity = False


FLOATS = {
    fp.Float16(): (torch.float16, 5),
    fp.BFloat16(): (torch.bfloat16, 8),
    fp.Float8E4M3(): (torch.float8_e4m3fn, 4),
    fp.Float8E5M2(): (torch.float8_e5m2, 5),
}
"""Type and exponent bits."""


def every_pattern(dtype):
    width = dtype.itemsize * 8
    return torch.arange(2**width).to(torch.int16 if width == 16 else torch.uint8).view(dtype)


def plain(words):
    return words.numpy().astype(np.int64) & ((1 << 8 * words.element_size()) - 1)


def nearest_even(pattern, dropped, finite):
    """Sign and magnitude: the magnitude rounded as a whole number, ties to even, but never beyond the largest."""
    width = dropped + 1 + finite.bit_length()  # of the shortened word: sign and magnitude
    if not dropped:
        return pattern
    sign, size = pattern >> (width - 1) << (width - 1 - dropped), pattern & ((1 << (width - 1)) - 1)
    upper, rest, half = size >> dropped, size & ((1 << dropped) - 1), 1 << dropped >> 1
    up = (rest > half) | ((rest == half) & (upper & 1 == 1))
    return sign | np.where(up & (upper < finite), upper + 1, upper)


@pytest.mark.parametrize(
    ("inner", "bits"),
    [(inner, bits) for inner, (dtype, e) in FLOATS.items() for bits in range(e + 1, 8 * dtype.itemsize + 1)],
    ids=repr,
)
def test_every_pattern_is_rounded_as_a_whole_number(inner, bits):
    """As long as only fraction bits are dropped the next word is the next value, over subnormals and binades."""
    dtype, exponent = FLOATS[inner]
    format, values = fp.Rounded(inner, bits), every_pattern(dtype)
    number = values.to(torch.float64)
    patterns, dropped = np.arange(len(values)), 8 * dtype.itemsize - bits
    is_finite = torch.isfinite(number).numpy()
    kept = patterns[is_finite & (patterns < len(values) // 2)]
    # the largest word, without a sign, that reads as a finite value
    shortened = np.arange(2 ** (bits - 1)) << dropped
    finite = int(np.flatnonzero(is_finite[shortened])[-1])
    assert finite.bit_length() == bits - 1
    assert kept.max() >> dropped == finite
    found = plain(format.encode(values[torch.from_numpy(is_finite)]).words)
    assert (found == nearest_even(patterns[is_finite], dropped, finite)).all()
    infinite = torch.isinf(number)
    stored = format.encode(values[infinite])
    assert torch.equal(stored.decode().to(torch.float64), number[infinite])
    nan = values[torch.isnan(number)]
    if (inner == fp.Float8E4M3() and dropped) or bits == exponent + 1:  # no word is left that reads as NaN
        with pytest.raises(FormatError, match=f"no word for NaN; {len(nan)} of {len(nan)}"):
            format.encode(nan)
    else:
        assert bool(torch.isnan(format.encode(nan).decode().to(torch.float64)).all())


@pytest.mark.parametrize(
    "format",
    [
        *(fp.Rounded(fp.Float8E5M2(), bits) for bits in range(2, 9)),
        *(fp.Rounded(fp.Float8E4M3(), bits) for bits in range(2, 9)),
        fp.Rounded(fp.Float16(), 4),
        fp.Rounded(fp.FixedPoint(2, 4), 3),
        fp.Rounded(fp.FixedPoint(2, 4), 1),
        fp.Rounded(fp.FixedPoint(0, 7), 5),
    ],
    ids=repr,
)
def test_no_word_reads_nearer(format):
    """Whatever is dropped, exponent bits too: of all words of so many bits, none reads nearer to the value."""
    inner = format.inner
    every = torch.arange(2**inner.width).to(torch.int16 if inner.width > 8 else torch.uint8)
    values = inner.decode_words(every, (), torch.float64)
    values = values[torch.isfinite(values)]
    reads = format.decode_words(torch.arange(2**format.bits).to(torch.uint8), (), torch.float64)
    steps, of_words = ((part * 2**24).nan_to_num(nan=2**60, posinf=2**60, neginf=-(2**60)) for part in (values, reads))
    distance = np.abs(of_words.numpy().astype(np.int64)[None, :] - steps.numpy().astype(np.int64)[:, None])
    found = plain(format.encode(values).words)
    own = distance[np.arange(len(found)), found]
    assert (own == distance.min(axis=1)).all()
    # of two words that are as near, and read as different values, the even one
    rivals = (distance == own[:, None]) & (reads.numpy()[None, :] != reads.numpy()[found][:, None])
    tied = rivals.any(axis=1)
    assert (found[tied] % 2 == 0).all()
    assert tied.any() == (format.dropped > 0)


def test_infinities_without_a_word_become_the_largest_value():
    """It was −0.0, since both words were as far from infinity."""
    format = fp.Rounded(fp.Float16(), 5)
    assert format.encode(torch.tensor([float("inf"), -float("inf"), 65504.0])).decode().tolist() == [
        *(32768.0, -32768.0, 32768.0),
    ]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(9, 32))
@settings(deadline=None)
def test_float32_against_its_bytes(value, bits):
    word, dropped = struct.unpack("<I", struct.pack("<f", value))[0], 32 - bits
    shortened = fp.Rounded(fp.Float32(), bits)
    stored = shortened.encode(torch.tensor([value], dtype=torch.float32))
    largest = (0x7F7FFFFF >> dropped) << dropped
    size = (word & 0x7FFFFFFF) / 2**dropped  # exact in float64
    size = min(round(size) << dropped, largest)  # Python rounds half to even
    expected = struct.unpack("<f", struct.pack("<I", word & 0x80000000 | size))[0]
    assert struct.pack("<f", stored.decode().item()) == struct.pack("<f", expected)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(12, 64))
@settings(deadline=None)
def test_float64_against_its_bytes(value, bits):
    word, dropped = struct.unpack("<Q", struct.pack("<d", value))[0], 64 - bits
    stored = fp.Rounded(Float64(), bits).encode(torch.tensor([value], dtype=torch.float64))
    largest = (0x7FEFFFFFFFFFFFFF >> dropped) << dropped
    size = min(round(Fraction(word & (2**63 - 1), 2**dropped)) << dropped, largest)
    expected = struct.unpack("<d", struct.pack("<Q", word & 2**63 | size))[0]
    assert struct.pack("<d", stored.decode().item()) == struct.pack("<d", expected)


@given(st.floats(-40000, 40000, width=32), st.integers(2, 32))
@settings(deadline=None)
def test_fixed_point_is_the_fixed_point_of_fewer_bits(value, bits):
    """By decimal arithmetic: the multiple of the step that is nearest, even where two are; saturated."""
    stored = fp.Rounded(fp.FixedPoint(15, 16), bits).encode(torch.tensor([value], dtype=torch.float32))
    exact = round(Decimal(value) * 2**16)
    exact = min(max(exact, -(2**31)), 2**31 - 1)
    step = 2 ** (32 - bits)
    number = min(round(Fraction(exact, step)), 2 ** (bits - 1) - 1)
    found = fp.Rounded(fp.FixedPoint(15, 16), bits).decode_words(stored.words, (), torch.float64)
    assert Decimal(found.item()) == Decimal(number * step) / 2**16


def test_ties_go_to_the_even_word():
    half = fp.Rounded(fp.Float16(), 11)  # five bits of fraction: steps of 1/32 from 1 on
    ties = torch.tensor([1 + 1 / 64, 1 + 3 / 64, -1 - 1 / 64, -1 - 3 / 64, 2 - 1 / 64])
    assert half.encode(ties).decode().tolist() == [1, 1 + 2 / 32, -1, -1 - 2 / 32, 2]
    assert half.encode(torch.tensor([65504.0, 64512.0 + 512])).decode().tolist() == [64512.0, 64512.0]


def test_affine_words_are_those_of_the_upper_bits():
    x = torch.linspace(-1, 1, 1001)
    stored, inner = fp.Rounded(fp.Affine(8), 5).encode(x), fp.Affine(8).encode(x).words.to(torch.int64)
    down, over = inner // 8, inner % 8
    up = (over > 4) | ((over == 4) & (down % 2 == 1))
    words = stored.words.to(torch.int64)
    # values are computed in float64, so that what is as near in words may be nearer by a last bit
    tie = over == 4
    assert torch.equal(words[~tie], (down + up.to(torch.int64)).clamp(max=31)[~tie])
    assert bool(((words == down) | (words == (down + 1).clamp(max=31)))[tie].all())
    assert words.max() == 31


@pytest.mark.parametrize("text", ["Rounded(Float32(), 26)", "SECDED(Rounded(Float16(), bits=10))"])
def test_read_from_text(text):
    assert parse_format(repr(parse_format(text))) == parse_format(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fp.Rounded(fp.Float16(), 0), "1 to 16"),
        (lambda: fp.Rounded(fp.Float16(), 17), "1 to 16"),
        (lambda: fp.Rounded(fp.Float16(), True), "1 to 16"),
        (lambda: fp.Rounded(fp.Float16, 8), "Format"),
        (lambda: fp.Rounded(fp.SECDED(fp.Float16()), 8), "Put Rounded inside"),
        (lambda: fp.Rounded(fp.SECDED(fp.Float16(), block=64), 8), "Put Rounded inside"),
        (lambda: fp.Rounded(fp.RangeChecked(fp.Float16()), 8), "Put Rounded inside"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(FormatError, match=message):
        make()


def test_dropped_bits_are_not_in_the_space():
    net = torch.nn.Linear(10, 4)
    for bits in (11, 16):
        assert fp.FaultSpace(net, format=fp.Rounded(fp.Float16(), bits)).bits == 44 * bits
