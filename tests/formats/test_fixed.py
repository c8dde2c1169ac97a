import math
from fractions import Fraction

import pytest
import torch
from format_references import fixed_decode, fixed_encode, float32_of, float32_tensor, words_of
from hypothesis import given, settings
from hypothesis import strategies as st

import flipproof as fp
from flipproof.testing import FormatContract

SHAPES = [(0, 1), (1, 0), (3, 4), (7, 0), (0, 7), (7, 8), (0, 15), (8, 8), (15, 16), (0, 31), (31, 0), (2, 9)]


class TestQ15x16(FormatContract):
    format = fp.FixedPoint()
    stores_nan = False


class TestQ3x4(FormatContract):
    format = fp.FixedPoint(integer_bits=3, fraction_bits=4)
    stores_nan = False


class TestQ7x8Truncating(FormatContract):
    format = fp.FixedPoint(integer_bits=7, fraction_bits=8, rounding="truncate")
    stores_nan = False


class TestSeventeenBits(FormatContract):
    format = fp.FixedPoint(integer_bits=8, fraction_bits=8)
    stores_nan = False


class TestTwoBits(FormatContract):
    format = fp.FixedPoint(integer_bits=0, fraction_bits=1)
    stores_nan = False


def inputs(integer_bits, fraction_bits):
    """Values that matter to this shape: any float32, and multiples of half a step, where ties are."""
    half = st.integers(-(2**12), 2**12).map(lambda n: n * 2.0 ** (-fraction_bits - 1))
    ends = st.sampled_from([s * 2.0**integer_bits + d * 2.0**-fraction_bits for s in (-1, 1) for d in (-1, -0.5, 0, 1)])
    anything = st.integers(0, 2**32 - 1).map(float32_of).filter(lambda x: not math.isnan(x))
    return st.lists(st.one_of(half, ends, anything), min_size=1, max_size=40)


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize(("i", "f"), SHAPES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_words_and_values_equal_integer_arithmetic(i, f, rounding, data):
    values = data.draw(inputs(i, f))
    format = fp.FixedPoint(i, f, rounding)
    x = torch.tensor(values, dtype=torch.float64)
    stored = format.encode(x)
    expected = [fixed_encode(v, i, f, rounding) for v in values]
    assert words_of(stored.words) == expected
    assert [Fraction(v) for v in stored.decode().tolist()] == [fixed_decode(word, i, f) for word in expected]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_any_float32_pattern(data):
    finite = [p for p in data if not math.isnan(float32_of(p))]
    words = words_of(fp.FixedPoint().encode(float32_tensor(finite)).words)
    assert words == [fixed_encode(float32_of(p), 15, 16, "nearest") for p in finite]


@pytest.mark.parametrize(("i", "f"), [(0, 1), (3, 4), (7, 8)])
def test_every_word_decodes_to_its_value(i, f):
    format = fp.FixedPoint(i, f)
    words = torch.arange(2**format.width).to(format.encode(torch.zeros(1)).words.dtype)
    decoded = format.decode_words(words, (), torch.float64).tolist()
    assert [Fraction(v) for v in decoded] == [fixed_decode(word, i, f) for word in range(2**format.width)]


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (0.0, 0),
        (-0.0, 0),
        (1.0, 0x00010000),
        (-1.0, 0xFFFF0000),
        (2.0**-16, 1),
        (-(2.0**-16), 0xFFFFFFFF),
        (2.0**-17, 0),  # a tie, to even
        (3 * 2.0**-17, 2),
        (32767.99999, 0x7FFFFFFF),
        (32768.0, 0x7FFFFFFF),
        (-32768.0, 0x80000000),
        (1e30, 0x7FFFFFFF),
        (math.inf, 0x7FFFFFFF),
        (-math.inf, 0x80000000),
        (1e-40, 0),
    ],
)
def test_known_words_of_q15_16(value, word):
    assert words_of(fp.FixedPoint().encode(torch.tensor([value], dtype=torch.float64)).words) == [word]


def test_truncation_goes_toward_zero():
    format = fp.FixedPoint(3, 1, "truncate")
    assert format.encode(torch.tensor([0.99, -0.99, 1.49, -1.49])).decode().tolist() == [0.5, -0.5, 1.0, -1.0]


def test_nothing_becomes_negative_zero():
    decoded = fp.FixedPoint().encode(torch.tensor([-0.0, -1e-9])).decode()
    assert not torch.signbit(decoded).any()


def test_nan_is_counted_in_the_message():
    with pytest.raises(fp.FlipproofError, match=r"FixedPoint\(.*\) has no word for NaN; 2 of 3 values are NaN"):
        fp.FixedPoint().encode(torch.tensor([math.nan, 0.0, math.nan]))


@pytest.mark.parametrize(("i", "f"), [(0, 0), (16, 16), (-1, 8), (8, -1), (32, 0)])
def test_widths_that_do_not_fit_are_refused(i, f):
    with pytest.raises(fp.FlipproofError, match=rf"got 1 \+ {i} \+ {f}"):
        fp.FixedPoint(i, f)


def test_unknown_rounding_is_refused():
    with pytest.raises(fp.FlipproofError, match="'nearest' or 'truncate', got 'up'"):
        fp.FixedPoint(rounding="up")
