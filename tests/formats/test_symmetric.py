from fractions import Fraction

import pytest
import torch
from format_references import near_tie, words_of
from hypothesis import given
from hypothesis import strategies as st

import flipproof as fp
from flipproof.errors import FormatError
from flipproof.testing import FormatContract


class Contract(FormatContract):
    stores_nan = stores_infinity = False


class TestEight(Contract):
    format = fp.Symmetric()


class TestEightPerChannel(Contract):
    format = fp.Symmetric(bits=8, axis=0)


class TestFour(Contract):
    format = fp.Symmetric(bits=4)


class TestHalfOfTheWords(Contract):
    format = fp.Symmetric(bits=8, axis=0, largest=63)


class TestTwo(Contract):
    format = fp.Symmetric(bits=2)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=12), st.integers(2, 8), st.booleans())
def test_words_and_values_as_exact_arithmetic_has_them(values, bits, half):
    largest = max(2 ** (bits - 2) - 1, 1) if half else 2 ** (bits - 1) - 1
    stored = fp.Symmetric(bits, largest=largest if half else None).encode(torch.tensor(values, dtype=torch.float64))
    top = max(abs(Fraction(v)) for v in values) or Fraction(1)
    scale = top / largest
    for value, word, read in zip(values, words_of(stored.words), stored.decode().tolist(), strict=True):
        exact = Fraction(value) / scale
        signed = word - 2**bits if word >> (bits - 1) else word
        if not near_tie(exact):
            assert signed == round(exact)
        assert abs(exact - signed) <= Fraction(1, 2) + Fraction(1, 10**9)
        assert read == pytest.approx(float(signed * scale), rel=1e-12, abs=0)


def test_every_channel_has_its_scale():
    x = torch.tensor([[1.0, -0.5], [100.0, 25.0], [0.0, 0.0]])
    stored = fp.Symmetric(bits=8, axis=0).encode(x)
    assert words_of(stored.words) == [127, 256 - 64, 127, 32, 0, 0]  # 63.5 to the even 64
    assert stored.coding[0].tolist() == [1 / 127, 100 / 127, 1 / 127]


def test_the_word_that_is_never_written_reads_as_one_step_beyond():
    stored = fp.Symmetric(bits=4).encode(torch.tensor([7.0, -7.0]))
    assert words_of(stored.words) == [7, 9]
    assert stored.decode_at(torch.tensor([1]), stored.words[1:] ^ 1).tolist() == [-8.0]


def test_given_alone_it_stores_the_weights_and_leaves_the_biases():
    space = fp.FaultSpace(torch.nn.Linear(3, 2), format=fp.Symmetric(8))
    assert {site.name: repr(site.format) for site in space.sites} == {
        "weight": "Symmetric(bits=8, axis=None, largest=None)",
        "bias": "Float32()",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "2 to 8 bits"),
        ({"bits": 9}, "2 to 8 bits"),
        ({"bits": 8.0}, "2 to 8 bits"),
        ({"axis": 1}, "axis=None"),
        ({"axis": False}, "axis=None"),
        ({"largest": 128}, "is 1 to 127, got largest=128"),
        ({"bits": 4, "largest": 0}, "is 1 to 7, got largest=0"),
        ({"largest": True}, "got largest=True"),
        ({"largest": 63.0}, r"got largest=63\.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(FormatError, match=message):
        fp.Symmetric(**arguments)


def test_a_magnitude_without_a_scale_is_refused():
    with pytest.raises(FormatError, match="no scale in float64"):
        fp.Symmetric().encode(torch.tensor([5e-324], dtype=torch.float64))
