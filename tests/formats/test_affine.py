import math
from fractions import Fraction

import pytest
import torch
from format_references import affine_encode, near_tie, words_of
from hypothesis import given, settings
from hypothesis import strategies as st

import flipproof as fp
from flipproof.testing import FormatContract


class TestAffine8(FormatContract):
    format = fp.Affine()
    stores_nan = stores_infinity = False


class TestAffine3(FormatContract):
    format = fp.Affine(bits=3)
    stores_nan = stores_infinity = False


class TestAffine2PerChannel(FormatContract):
    format = fp.Affine(bits=2, axis=0)
    stores_nan = stores_infinity = False


class TestAffine5PerChannel(FormatContract):
    format = fp.Affine(bits=5, axis=0)
    stores_nan = stores_infinity = False


weights = st.floats(-100, 100, width=32)


def check_rows(format, x, rows, words, decoded):
    """Words and values of each row against exact rational arithmetic."""
    top = 2**format.bits - 1
    assert len(rows) == len(words) == len(decoded) == len(x)
    for row, row_words, row_values in zip(rows, words, decoded, strict=True):
        exact, scale, zero = affine_encode(row, format.bits, whole_zero=format.axis == 0)
        if near_tie(-min(map(Fraction, row)) / scale) and format.axis == 0:
            continue  # the zero point itself may round to either side in float64
        for unrounded, word, value in zip(exact, row_words, row_values, strict=True):
            clamped = min(max(round(unrounded), 0), top)
            assert word == clamped or (near_tie(unrounded) and abs(word - unrounded) < 1)
            assert abs(Fraction(value) - scale * (word - zero)) <= abs(scale * top) * Fraction(1, 2**40)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("bits", range(2, 9))
@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.lists(weights, min_size=5, max_size=5), min_size=1, max_size=4))
def test_words_and_values_equal_exact_arithmetic(bits, axis, values):
    x = torch.tensor(values, dtype=torch.float32).to(torch.float64)  # float64 so that decoding is not rounded again
    format = fp.Affine(bits, axis)
    stored = format.encode(x)
    rows = x.tolist() if axis == 0 else [x.reshape(-1).tolist()]
    shape = (len(rows), -1)
    flat = words_of(stored.words)
    words = [flat[i * len(rows[0]) : (i + 1) * len(rows[0])] for i in range(len(rows))]
    check_rows(format, rows, rows, words, stored.decode().reshape(shape).tolist())


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_word_decodes_to_its_value(bits):
    x = torch.tensor([-1.5, 0.25, 2.0], dtype=torch.float64)
    format = fp.Affine(bits)
    _, scale, zero = affine_encode(x.tolist(), bits, whole_zero=False)
    words = torch.arange(2**bits, dtype=torch.uint8)
    for word, value in enumerate(format.decode_words(words, format.fit(x), torch.float64).tolist()):
        assert value == pytest.approx(float(scale * (word - zero)), abs=1e-14)


@settings(max_examples=60, deadline=None)
@given(st.lists(weights, min_size=2, max_size=30), st.integers(2, 8))
def test_error_is_at_most_half_a_step_and_the_ends_are_exact(values, bits):
    x = torch.tensor(values)
    stored = fp.Affine(bits).encode(x)
    decoded = stored.decode().to(torch.float64)
    low, high = min(x.tolist()), max(x.tolist())
    step = (high - low) / (2**bits - 1)
    assert bool(((decoded - x.to(torch.float64)).abs() <= step / 2 + 1e-5 * max(abs(low), abs(high))).all())
    assert decoded.min().item() == pytest.approx(low, rel=1e-6)
    assert decoded.max().item() == pytest.approx(high, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_constant_reads_exactly_and_its_word_is_zero(bits, dtype, axis):
    for constant in (0.3, -0.7, 1.0, 1e-4, -123.0, 0.1, 0.0):
        x = torch.full((2, 3), constant, dtype=dtype)
        stored = fp.Affine(bits, axis).encode(x)
        assert words_of(stored.words) == [0] * 6
        assert torch.equal(stored.decode(), x)


def test_per_channel_scales_are_each_channels_own():
    x = torch.tensor([[0.0, 7.0], [0.0, 0.7], [5.0, 5.0]])
    decoded = fp.Affine(bits=3, axis=0).encode(x).decode()
    assert torch.allclose(decoded, x, rtol=1e-6)


def test_per_channel_zero_points_are_whole():
    # z = 0.4 · 7 = 2.8 rounds to 3, so the ends move by 0.2 steps and the top is clamped, as the authors' code does it
    x = torch.tensor([[-0.4, 0.6]], dtype=torch.float64)
    stored = fp.Affine(bits=3, axis=0).encode(x)
    assert words_of(stored.words) == [0, 7]
    assert stored.decode().tolist() == [pytest.approx([-3 / 7, 4 / 7])]


def test_known_words():
    # s = 0.5, z = 2: −1 → 0, −0.75 → 0.5 → 0 (tie to even), −0.25 → 1.5 → 2, 2.5 → 7
    stored = fp.Affine(bits=3).encode(torch.tensor([-1.0, -0.75, -0.25, 2.5]))
    assert words_of(stored.words) == [0, 0, 2, 7]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_counted_in_the_message(bad):
    with pytest.raises(fp.FlipproofError, match=r"Affine\(bits=4, axis=None\).*2 of 3 values are not finite"):
        fp.Affine(bits=4).encode(torch.tensor([bad, 1.0, bad]))


@pytest.mark.parametrize("values", [[-1.7e308, 1.7e308], [0.0, 5e-324]], ids=["spread overflows", "step underflows"])
def test_float64_ranges_without_a_scale_are_refused(values):
    with pytest.raises(fp.FlipproofError, match="scale"):
        fp.Affine().encode(torch.tensor(values, dtype=torch.float64))


def test_float32_extremes_have_a_scale():
    top = torch.finfo(torch.float32).max
    for values in ([-top, top], [0.0, 1e-45], [1e-45, 1e-45]):
        x = torch.tensor(values)
        assert fp.Affine().encode(x).decode().tolist() == x.tolist()


@pytest.mark.parametrize("bits", [1, 9, 0, -3])
def test_other_widths_are_refused(bits):
    with pytest.raises(fp.FlipproofError, match=f"2 to 8 bits a value, got bits={bits}"):
        fp.Affine(bits)


def test_other_axes_are_refused():
    with pytest.raises(fp.FlipproofError, match="got 1"):
        fp.Affine(axis=1)
