import math
import struct

import numpy as np
import pytest
import torch
from format_references import Minifloat, Struct, float32_of, float32_tensor, words_of
from hypothesis import given, settings
from hypothesis import strategies as st

import flipproof as fp
from flipproof.formats import Float64
from flipproof.formats.base import word_dtype
from flipproof.testing import FormatContract

REFERENCES = [
    (fp.Float32(), Struct("f")),
    (fp.Float32(), Minifloat(8, 23)),
    (fp.Float16(), Struct("e")),
    (fp.Float16(), Minifloat(5, 10)),
    (fp.BFloat16(), Minifloat(8, 7)),
    (fp.Float8E4M3(), Minifloat(4, 3, fn=True)),
    (fp.Float8E5M2(), Minifloat(5, 2)),
]
IDS = ["f32-struct", "f32-exact", "f16-struct", "f16-exact", "bf16", "e4m3", "e5m2"]


class TestFloat64(FormatContract):
    format = Float64()


class TestFloat32(FormatContract):
    format = fp.Float32()


class TestFloat16(FormatContract):
    format = fp.Float16()


class TestBFloat16(FormatContract):
    format = fp.BFloat16()


class TestFloat8E4M3(FormatContract):
    format = fp.Float8E4M3()


class TestFloat8E5M2(FormatContract):
    format = fp.Float8E5M2()


def patterns():
    """All binary32 patterns, with the corners over-represented."""
    exponents = st.sampled_from([0, 1, 102, 103, 112, 113, 117, 118, 127, 135, 142, 143, 254, 255])
    fractions = st.sampled_from([0, 1, 0x1000, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x100000, 0x400000, 0x7FFFFF])
    corner = st.builds(lambda s, e, f: s << 31 | e << 23 | f, st.integers(0, 1), exponents, fractions)
    return st.one_of(st.integers(0, 2**32 - 1), corner)


@pytest.mark.parametrize(("format", "reference"), REFERENCES, ids=IDS)
@settings(max_examples=60, deadline=None)
@given(data=st.lists(patterns(), min_size=1, max_size=40))
def test_words_and_values_equal_the_exact_reference(format, reference, data):
    words = words_of(format.encode(float32_tensor(data)).words)
    for pattern, word in zip(data, words, strict=True):
        expected = reference.encode(float32_of(pattern))
        if expected is None:
            assert math.isnan(reference.decode(word)), hex(pattern)
        else:
            assert word == expected, hex(pattern)


@pytest.mark.parametrize(("format", "reference"), REFERENCES[2:], ids=IDS[2:])
def test_every_word_decodes_to_its_value(format, reference):
    words = list(range(2**format.width))
    container = format.encode(torch.zeros(1)).words.dtype
    stored = torch.tensor(words).to(container)
    for word, value in zip(words, format.decode_words(stored, (), torch.float64).tolist(), strict=True):
        expected = reference.decode(word)
        assert struct.pack("<d", value) == struct.pack("<d", expected) or (math.isnan(value) and math.isnan(expected))


@settings(max_examples=60, deadline=None)
@given(st.lists(patterns(), min_size=1, max_size=60))
def test_float32_keeps_every_bit_of_a_float32(data):
    stored = fp.Float32().encode(float32_tensor(data))
    assert words_of(stored.words) == data
    assert words_of(stored.decode().view(torch.int32)) == data  # signalling NaNs and their payloads included


@pytest.mark.parametrize(
    ("format", "dtype"), [(fp.Float16(), torch.float16), (fp.BFloat16(), torch.bfloat16)], ids=["f16", "bf16"]
)
def test_half_formats_keep_every_bit_of_their_own_type(format, dtype):
    x = torch.arange(2**16).to(torch.int16).view(dtype)
    stored = format.encode(x)
    assert words_of(stored.words) == list(range(2**16))
    assert torch.equal(stored.decode().view(torch.int16), x.view(torch.int16))


@pytest.mark.parametrize(("format", "reference"), REFERENCES, ids=IDS)
@settings(max_examples=40, deadline=None)
@given(data=st.lists(st.floats(width=64), min_size=1, max_size=30))
def test_float64_is_rounded_once(format, reference, data):
    words = words_of(format.encode(torch.tensor(data, dtype=torch.float64)).words)
    for x, word in zip(data, words, strict=True):
        expected = reference.encode(x)
        assert math.isnan(reference.decode(word)) if expected is None else word == expected, x


def halfway(format) -> np.ndarray:
    """Every middle between neighbours, the points where it overflows, and float64 values as near to them as can be."""
    words = torch.arange(2 ** (format.width - 1)).to(word_dtype(format.width))
    values = format.decode_words(words, (), torch.float64).numpy()
    values = np.sort(values[np.isfinite(values)])
    beyond = values[-1] + (values[-1] - values[-2])
    middles = (values + np.append(values[1:], beyond)) / 2
    assert middles.size == values.size > 100
    near = [middles, np.nextafter(middles, 0), np.nextafter(middles, np.inf)]
    # what the first of two roundings, to 24 bits, would take for the middle, and the least it would not
    near += [middles * (1 + sign * 2.0**-k) for sign in (-1, 1) for k in (24, 25, 26, 40, 52)]
    near += [values, np.nextafter(values[1:], 0), np.array([5e-324, 1e-310, 1e-46, 3.5e38, 1e300, np.inf])]
    points = np.concatenate(near)
    return np.concatenate([points, -points])


def rounded(x: np.ndarray, exponent: int, fraction: int, largest: float, saturates: bool) -> np.ndarray:
    """Exact: dividing by a power of two loses nothing in float64 here, and `rint` takes ties to even."""
    bias = 2 ** (exponent - 1) - 1
    _, power = np.frexp(np.abs(x))
    step = np.ldexp(1.0, np.maximum(power - 1, 1 - bias) - fraction)
    with np.errstate(over="ignore"):
        found = np.where(np.isfinite(x), np.rint(x / step) * step, x)
    over = np.abs(found) > largest
    return np.where(over, np.copysign(largest if saturates else np.inf, x), found)


@pytest.mark.parametrize(
    ("format", "size"),
    [
        (fp.Float16(), (5, 10, 65504.0, False)),
        (fp.BFloat16(), (8, 7, (2 - 2.0**-7) * 2.0**127, False)),
        (fp.Float8E4M3(), (4, 3, 448.0, True)),
        (fp.Float8E5M2(), (5, 2, 57344.0, False)),
    ],
    ids=["f16", "bf16", "e4m3", "e5m2"],
)
def test_every_halfway_point_and_its_neighbours_in_float64(format, size):
    """Some 900,000 values each for the 16-bit types: torch's own cast is wrong on tens of thousands of them."""
    points = halfway(format)
    x = torch.from_numpy(points)
    decoded = format.encode(x).decode().numpy()
    expected = rounded(points, *size)
    assert np.array_equal(decoded.view(np.int64), expected.view(np.int64))
    if format == fp.Float16():  # NumPy rounds once too
        with np.errstate(over="ignore"):
            assert np.array_equal(decoded, points.astype(np.float16).astype(np.float64))
        twice = x.to(torch.float16).to(torch.float64).numpy()
        assert (twice != expected).sum() > 10_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_read_into_a_half_type_are_rounded_once_too(dtype):
    """1 + 2⁻¹¹ + 2⁻⁴⁰ and the like, as words of Float64, FixedPoint and Affine say them."""
    own = fp.Float16() if dtype == torch.float16 else fp.BFloat16()
    x = torch.from_numpy(halfway(own)[::97].copy())
    x = x[x.abs() < 1e4]
    assert torch.equal(Float64().encode(x).decode(), x)
    assert torch.equal(
        Float64().decode_words(Float64().encode(x).words, (), dtype), own.decode_words(own.encode(x).words, (), dtype)
    )
    words = torch.tensor([2**30 + 2**19 + 1, 2**30 + 2**22 + 1, 2**30 + 2**19, 2**30 - 1])
    exact = words.to(torch.float64) * 2.0**-30
    read = fp.FixedPoint(1, 30).decode_words(words.to(torch.int32), (), dtype)
    assert torch.equal(read.to(torch.float64), own.encode(exact).decode())


KNOWN = {
    fp.Float32(): {
        0.0: 0x00000000,
        1.0: 0x3F800000,
        -2.0: 0xC0000000,
        0.5: 0x3F000000,
        2.0**-149: 0x00000001,  # smallest subnormal
        2.0**-126: 0x00800000,  # smallest normal
        2.0**-126 - 2.0**-149: 0x007FFFFF,
        (2 - 2.0**-23) * 2.0**127: 0x7F7FFFFF,
        math.pi: 0x40490FDB,
        math.inf: 0x7F800000,
        -math.inf: 0xFF800000,
    },
    fp.Float16(): {
        0.0: 0x0000,
        1.0: 0x3C00,
        -2.0: 0xC000,
        0.333251953125: 0x3555,
        2.0**-24: 0x0001,
        2.0**-14: 0x0400,
        2.0**-14 - 2.0**-24: 0x03FF,
        65504.0: 0x7BFF,
        65519.0: 0x7BFF,
        65520.0: 0x7C00,  # the first that overflows
        math.inf: 0x7C00,
        -math.inf: 0xFC00,
    },
    fp.BFloat16(): {
        0.0: 0x0000,
        1.0: 0x3F80,
        -2.0: 0xC000,
        math.pi: 0x4049,
        2.0**-133: 0x0001,
        2.0**-126: 0x0080,
        (2 - 2.0**-7) * 2.0**127: 0x7F7F,
        1 + 2.0**-8: 0x3F80,  # a tie goes to the even neighbour below …
        1 + 3 * 2.0**-8: 0x3F82,  # … or above
        math.inf: 0x7F80,
        -math.inf: 0xFF80,
    },
    fp.Float8E4M3(): {
        0.0: 0x00,
        1.0: 0x38,
        -1.0: 0xB8,
        2.0**-9: 0x01,
        7 * 2.0**-9: 0x07,
        2.0**-6: 0x08,
        448.0: 0x7E,
        464.0: 0x7E,  # half way to the NaN pattern: ties to even
        -448.0: 0xFE,
    },
    fp.Float8E5M2(): {
        0.0: 0x00,
        1.0: 0x3C,
        -1.0: 0xBC,
        2.0**-16: 0x01,
        3 * 2.0**-16: 0x03,
        2.0**-14: 0x04,
        57344.0: 0x7B,
        61440.0: 0x7C,  # half way to infinity: ties to even
        math.inf: 0x7C,
        -math.inf: 0xFC,
    },
}


@pytest.mark.parametrize(
    ("format", "value", "word"), [(format, v, w) for format, table in KNOWN.items() for v, w in table.items()]
)
def test_known_words(format, value, word):
    stored = format.encode(torch.tensor([value]))
    assert words_of(stored.words) == [word]


@pytest.mark.parametrize("format", [fp.Float32(), fp.Float16(), fp.BFloat16(), fp.Float8E4M3(), fp.Float8E5M2()])
def test_minus_zero_is_its_sign_bit(format):
    assert words_of(format.encode(torch.tensor([-0.0])).words) == [1 << (format.width - 1)]


@pytest.mark.parametrize(
    ("value", "word"), [(448.0, 0x7E), (465.0, 0x7E), (1e6, 0x7E), (math.inf, 0x7E), (-math.inf, 0xFE)]
)
def test_e4m3_saturates_whatever_torch_does(value, word):
    assert words_of(fp.Float8E4M3().encode(torch.tensor([value])).words) == [word]


def test_e4m3_says_nan():
    assert words_of(fp.Float8E4M3().encode(torch.tensor([math.nan])).words)[0] & 0x7F == 0x7F


def test_the_critical_bit_of_a_float32():
    # bit 30 is 0 in every weight below 2; set, it multiplies by 2^128
    stored = fp.Float32().encode(torch.tensor([0.75, -1.0]))
    hit = fp.Float32().decode_words(stored.words ^ (1 << 30), (), torch.float32)
    assert hit.tolist() == [0.75 * 2.0**128, -math.inf]
