"""Floats of any split, against sorted lists of all their values, torch's own types and ml_dtypes."""

from bisect import bisect_right
from fractions import Fraction
from math import copysign, inf, isinf, isnan, nan

import numpy as np
import pytest
import torch
from format_references import words_of
from hypothesis import given, settings
from hypothesis import strategies as st

import flipproof as fp
from flipproof.errors import FormatError
from flipproof.formats import parse_format
from flipproof.formats.base import word_dtype
from flipproof.testing import FormatContract


class Contract(FormatContract):
    def test_every_bit_of_a_model_can_be_hit_and_comes_back(self):
        super().test_every_bit_of_a_model_can_be_hit_and_comes_back(torch.float32)


class TestFloat43(Contract):
    format = fp.Float(4, 3)


class TestFloat43WithOneNaN(Contract):
    format = fp.Float(4, 3, "nan")


class TestFloat21(Contract):
    format = fp.Float(2, 1, "none")
    stores_nan = False


class TestWithoutSubnormals(Contract):
    format = fp.Float(5, 5, subnormals=False)


class TestWithoutAFraction(Contract):
    format = fp.Float(6, 0)
    stores_nan = False


class TestTruncatedDouble(Contract):
    format = fp.Float(11, 20)


class TestSECDED(Contract):
    format = fp.SECDED(fp.Float(4, 3))


class TestRounded(Contract):
    format = fp.Rounded(fp.Float(5, 8), bits=10)


class TestRangeChecked(Contract):
    format = fp.RangeChecked(fp.Float(4, 3))
    stores_nan = False


class Sorted:
    """A float by its definition alone: every magnitude as an exact number, in the order of its words."""

    def __init__(self, exponent, mantissa, specials="ieee", subnormals=True):
        self.whole = mantissa == 0
        self.width, bias, steps = 1 + exponent + mantissa, 2 ** (exponent - 1) - 1, 2**mantissa
        numbers = 2**exponent - 1 if specials == "ieee" else 2**exponent
        self.values = [Fraction(f, steps) * Fraction(2) ** (1 - bias) for f in range(steps)]
        if not subnormals:
            self.values = [Fraction(0)] * steps
        for e in range(1, numbers):
            self.values += [(1 + Fraction(f, steps)) * Fraction(2) ** (e - bias) for f in range(steps)]
        self.specials = [inf, *[nan] * (steps - 1)] if specials == "ieee" else []
        if specials == "nan":
            self.values.pop()
            self.specials = [nan]
        spacing = Fraction(2) ** (max(numbers - 1, 1) - bias - mantissa)
        self.overflow = self.values[-1] + spacing / 2 if specials == "ieee" else None

    def decode(self, word):
        sign, magnitude = divmod(word, 2 ** (self.width - 1))
        value = float([*self.values, *self.specials][magnitude])
        return -value if sign else value

    def encode(self, x):
        """None for NaN."""
        if isnan(x):
            return None
        sign = 2 ** (self.width - 1) if copysign(1, x) < 0 else 0
        last = len(self.values) - 1
        if isinf(x):
            return sign | (last if self.overflow is None else last + 1)
        size = abs(Fraction(x))
        if self.overflow is not None and size >= self.overflow:
            return sign | (last + 1)
        below = bisect_right(self.values, size) - 1
        if self.values[below] == 0:  # several words are 0 where there are no subnormals; 0 is written
            below = 0
        above = bisect_right(self.values, self.values[below])
        if below == last:
            return sign | last
        down, up = size - self.values[below], self.values[above] - size
        if down == up:
            # without a fraction, no digit of a number is even but that of 0: IEEE 754-2019 then takes the larger one
            even = below == 0 if self.whole else below % 2 == 0
            return sign | (below if even else above)
        return sign | (below if down < up else above)


SPLITS = [
    (4, 3, "ieee", True),
    (4, 3, "nan", True),
    (5, 2, "ieee", True),
    (3, 2, "none", True),
    (2, 3, "none", True),
    (2, 1, "none", True),
    (5, 6, "ieee", False),
    (4, 4, "none", False),
    (6, 0, "ieee", True),
    (3, 0, "nan", True),
    (1, 5, "ieee", True),
    (1, 0, "none", True),
    (8, 4, "ieee", True),
    (10, 2, "none", True),
]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_word_reads_as_its_value(split):
    format, twin = fp.Float(*split), Sorted(*split)
    words = torch.arange(2**format.width)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        read = format.decode_words(words.to(word_dtype(format.width)), (), dtype)
        exact = torch.tensor([twin.decode(word) for word in words.tolist()], dtype=torch.float64)
        # one rounding: by NumPy and ml_dtypes, not by torch
        expected = torch.from_numpy(rounded_by_numpy(exact.numpy(), dtype))
        assert torch.equal(torch.isnan(read), torch.isnan(expected))
        kept = ~torch.isnan(expected)
        assert torch.equal(read.double()[kept].view(torch.int64), expected[kept].view(torch.int64))


def rounded_by_numpy(values, dtype):
    kind = {torch.float64: "float64", torch.float32: "float32"}.get(dtype)
    kind = pytest.importorskip("ml_dtypes").bfloat16 if kind is None else kind
    with np.errstate(over="ignore"):
        return values.astype(kind).astype(np.float64)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_words_are_those_of_the_nearest_values(split, data):
    twin = Sorted(*split)
    known = [float(value) for value in twin.values]
    near = st.builds(
        lambda i, share, sign: sign * (known[i] + share * (known[min(i + 1, len(known) - 1)] - known[i])),
        st.integers(0, len(known) - 1),
        st.sampled_from([0.0, 0.25, 0.5, 0.5 - 2.0**-40, 0.5 + 2.0**-40, 1.0]),
        st.sampled_from([1, -1]),
    )
    special = [known[-1] * share for share in (1.1, 1.25, 1.5, 2.0) if known[-1] < 1e300]
    other = st.one_of(near, st.floats(width=64), st.sampled_from([0.0, -0.0, inf, -inf, *special]))
    x = data.draw(st.lists(other if fp.Float(*split)._split.has_nan else other.filter(lambda v: v == v), min_size=1))
    words = words_of(fp.Float(*split).encode(torch.tensor(x, dtype=torch.float64)).words)
    for value, word in zip(x, words, strict=True):
        expected = twin.encode(value)
        if expected is None:
            assert isnan(twin.decode(word))
        else:
            assert word == expected, value


@pytest.mark.parametrize(
    ("split", "dtype"), [((5, 10), torch.float16), ((8, 7), torch.bfloat16)], ids=["float16", "bfloat16"]
)
def test_all_words_and_all_midpoints_of_the_half_floats(split, dtype):
    format = fp.Float(*split)
    words = torch.arange(-(2**15), 2**15).to(torch.int16)
    values, read = words.view(dtype).double(), format.decode_words(words, (), torch.float64)
    kept = ~torch.isnan(values)
    assert torch.equal(torch.isnan(read), ~kept)
    assert torch.equal(read[kept].view(torch.int64), values[kept].view(torch.int64))
    assert torch.equal(format.encode(values[kept]).words, words[kept])
    finite = torch.arange((2 ** split[0] - 1) << split[1])  # of the positive ones, ascending
    values = finite.to(torch.int16).view(dtype).double()
    above = torch.cat([values[1:], 2 * values[-1:] - values[-2:-1]])  # the next value, had the exponents not ended
    middle = (values + above) / 2
    even = finite + (finite & 1)
    for sign in (1, -1):
        for x, expected in (
            (middle, even),
            (torch.nextafter(middle, above), finite + 1),
            (torch.nextafter(middle, values), finite),
        ):
            stored = fp.Float(*split).encode(sign * x).words.to(torch.int64) & 0xFFFF
            assert torch.equal(stored, expected + (sign < 0) * 2**15)


def test_a_float_of_8_and_23_bits_is_a_float32():
    format = fp.Float(8, 23)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    values = words.view(torch.float32)
    assert torch.equal(format.encode(values).words, words)  # NaN payloads included
    assert torch.equal(format.decode_words(words, (), torch.float32).view(torch.int32), words)
    kept = ~torch.isnan(values)
    # by arithmetic, where the types differ
    assert torch.equal(format.decode_words(words[kept], (), torch.float64), values[kept].double())
    x = torch.randn(100_000, dtype=torch.float64, generator=generator)
    x = x * torch.exp2(torch.randint(-160, 130, x.shape, generator=generator).double())
    assert torch.equal(format.encode(x).words, torch.from_numpy(numpy_float32(x.numpy())).view(torch.int32))
    space = fp.FaultSpace(torch.nn.Linear(3, 2), format=format)
    assert all(cell.held for cell in space.cells)  # hit where they lie: nothing is encoded


def numpy_float32(values):
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


@pytest.mark.parametrize(
    ("format", "storage"),
    [(fp.Float(5, 2), torch.float8_e5m2), (fp.Float(4, 3, "nan"), torch.float8_e4m3fn)],
    ids=["e5m2", "e4m3fn"],
)
def test_8_bit_floats_of_torch(format, storage):
    words = torch.arange(256).to(torch.uint8)
    values, read = words.view(storage).float(), format.decode_words(words, (), torch.float32)
    assert torch.equal(torch.isnan(read), torch.isnan(values))
    assert torch.equal(read.nan_to_num(nan=0.5), values.nan_to_num(nan=0.5))
    x = torch.randn(20_000) * torch.exp2(torch.randint(-20, 9, (20_000,)).float())
    x = x[x.abs() < 440]  # beyond, releases of torch differ
    assert torch.equal(format.encode(x).words, x.to(storage).view(torch.uint8))
    assert format.is_native(storage)


def test_where_e4m3fn_differs_from_an_ieee_split():
    ieee, fn = fp.Float(4, 3), fp.Float(4, 3, "nan")
    words = torch.arange(256).to(torch.uint8)
    a, b = (format.decode_words(words, (), torch.float32) for format in (ieee, fn))
    differ = {word for word in words.tolist() if a[word] != b[word] and not (isnan(a[word]) and isnan(b[word]))}
    assert differ == {sign + word for sign in (0, 128) for word in range(0x78, 0x7F)}  # the largest exponent
    assert ieee.encode(torch.tensor([240.0, 247.9, 248.0, inf])).decode().tolist() == [240.0, 240.0, inf, inf]
    assert fn.encode(torch.tensor([247.9, 448.0, 1e9, inf])).decode().tolist() == [240.0, 448.0, 448.0, 448.0]


@pytest.mark.parametrize(
    ("format", "name"),
    [
        (fp.Float(4, 3), "float8_e4m3"),
        (fp.Float(3, 4), "float8_e3m4"),
        (fp.Float(4, 3, "nan"), "float8_e4m3fn"),
        (fp.Float(5, 2), "float8_e5m2"),
        (fp.Float(3, 2, "none"), "float6_e3m2fn"),
        (fp.Float(2, 3, "none"), "float6_e2m3fn"),
        (fp.Float(2, 1, "none"), "float4_e2m1fn"),
        (fp.Float(8, 7), "bfloat16"),
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_splits_of_ml_dtypes(format, name):
    kind = getattr(pytest.importorskip("ml_dtypes"), name)
    words = np.arange(2**format.width).astype(f"uint{8 * np.dtype(kind).itemsize}")
    with np.errstate(invalid="ignore"):  # of NaN that are quiet elsewhere
        expected = torch.from_numpy(words.view(kind).astype(np.float64))
    read = format.decode_words(torch.from_numpy(words.astype(np.int64)).to(word_dtype(format.width)), (), torch.float64)
    assert torch.equal(torch.isnan(read), torch.isnan(expected))
    kept = ~torch.isnan(expected)
    assert torch.equal(read[kept].view(torch.int64), expected[kept].view(torch.int64))
    largest = float(expected[kept & torch.isfinite(expected)].max())
    x = np.random.default_rng(0).normal(size=20_000) * 2.0 ** np.random.default_rng(1).integers(-12, 12, 20_000)
    x = x[np.abs(x) < largest].astype(np.float32)
    stored = format.encode(torch.from_numpy(x)).words.to(torch.int64) & (2**format.width - 1)
    assert stored.tolist() == x.astype(kind).view(words.dtype).astype(np.int64).tolist()


def test_a_double_is_rounded_once():
    x = torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64)  # its float32 is a middle of two float16
    assert fp.Float(5, 10).encode(x).decode().item() == 1 + 2.0**-10


def test_a_campaign_over_a_split_equals_the_one_over_torch_s_type():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    x = torch.randn(40, 6)
    setup = {"data": [(x, net(x).argmax(dim=1))], "faults": fp.BitErrorRate([1e-3, 1e-2]), "trials": 10}
    for split, known in ((fp.Float(5, 10), fp.Float16()), (fp.Float(8, 7), fp.BFloat16())):
        ours, theirs = fp.assess(net, format=split, **setup), fp.assess(net, format=known, **setup)
        columns = [name for name in ours.trials if name != "seconds"]
        assert ours.trials[columns].equals(theirs.trials[columns])
        assert ours.trials["critical_sdc"].sum() > 0


@pytest.mark.parametrize("inner", [fp.Float(4, 3), fp.Float(5, 8, subnormals=False), fp.Float(8, 12)], ids=repr)
def test_codes_around_a_split_repair_it(inner):
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    for format in (fp.SECDED(inner), fp.BCH(inner, t=2), fp.TripleMSB(inner), fp.Parity(inner)):
        stored = format.encode(x)
        top = torch.ones_like(stored.words) << (inner.width - 2)  # the highest bit of the exponent
        read = format.decode_words(stored.words ^ top, (), torch.float32)
        golden = inner.encode(x).decode()
        if isinstance(format, (fp.SECDED, fp.BCH)):
            assert torch.equal(read, golden)
        elif isinstance(format, fp.Parity):
            assert not read.any()
        else:
            assert not torch.equal(read, golden)  # its votes are over the sign


@pytest.mark.parametrize("format", [fp.Float(4, 3), fp.Float(2, 1, "none"), fp.Float(8, 10), fp.Float(6, 14)], ids=repr)
def test_packed_words_are_hit_as_simulated_ones(format):
    from copy import deepcopy

    torch.manual_seed(0)
    net, x = torch.nn.Linear(9, 7), torch.randn(5, 9)
    packed = fp.pack_(deepcopy(net), {"*": format})
    assert fp.packed_bytes(packed) == -(-63 * format.width // 8) + -(-7 * format.width // 8)
    simulated, real = fp.FaultSpace(net, format={"*": format}), fp.FaultSpace(packed)
    assert simulated.bits == real.bits
    for seed in range(3):
        draw = fp.BitErrorRate(0.05).draw(simulated, fp.faults.sampling.TrialGenerator(seed, 0, 0))
        with torch.no_grad(), simulated.stored(), simulated.corrupted(draw):
            expected = net(x)
        with torch.no_grad(), real.corrupted(draw):
            assert torch.equal(packed(x).nan_to_num(nan=0.125), expected.nan_to_num(nan=0.125))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"exponent": 0, "mantissa": 3}, "1 to 11 bits of exponent"),
        ({"exponent": 12, "mantissa": 3}, "1 to 11 bits of exponent"),
        ({"exponent": 4, "mantissa": -1}, "0 to 30 bits of mantissa"),
        ({"exponent": True, "mantissa": 1}, "bits of exponent"),
        ({"exponent": 8, "mantissa": 24}, "at most 32 bits"),
        ({"exponent": 4, "mantissa": 3, "specials": "fn"}, "'ieee', 'nan' or 'none'"),
        ({"exponent": 4, "mantissa": 3, "subnormals": 1}, "True or False"),
        ({"exponent": 11, "mantissa": 3, "specials": "none"}, "beyond float64"),
        ({"exponent": 1, "mantissa": 0}, "no finite value but 0"),
        ({"exponent": 1, "mantissa": 3, "subnormals": False}, "no finite value but 0"),
    ],
)
def test_other_splits_are_refused(given, said):
    with pytest.raises(FormatError, match=said):
        fp.Float(**given)


def test_as_people_type_it():
    assert parse_format("SECDED(Float(4, 3, 'nan'))") == fp.SECDED(fp.Float(4, 3, "nan"))
