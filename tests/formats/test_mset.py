from itertools import combinations

import pytest
import torch
from format_references import float32_of, words_of

import flipproof as fp
from flipproof.errors import FormatError
from flipproof.formats import Affine, FixedPoint, Float8E4M3, Float64
from flipproof.testing import FormatContract


class Contract(FormatContract):
    stores_infinity = False
    healing_keeps_values = False  # its copies are read as the lowest bits of the value

    def test_every_bit_of_a_model_can_be_hit_and_comes_back(self):
        super().test_every_bit_of_a_model_can_be_hit_and_comes_back(torch.float32)


class TestFloat32(Contract):
    format = fp.MSET(fp.Float32())


class TestFloat16(Contract):
    format = fp.MSET(fp.Float16())


class TestBFloat16(Contract):
    format = fp.MSET(fp.BFloat16())


class TestFloat64(Contract):
    format = fp.MSET(Float64())


def written(word, width):
    """FaultForge's documentation as text: the second-highest bit is copied into the two lowest."""
    text = f"{word:0{width}b}"
    return int(text[:-2] + text[1] * 2, 2)


def read(word, width):
    """A majority over the three copies; nothing else changes."""
    text = f"{word:0{width}b}"
    voted = "1" if (text[1] + text[-2:]).count("1") > 1 else "0"
    return int(text[0] + voted + text[2:], 2)


FORMATS = [fp.MSET(fp.Float32()), fp.MSET(fp.Float16()), fp.MSET(fp.BFloat16())]


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_random_words_are_written_and_read_as_published(format):
    words = torch.randint(0, 2**format.width, (4000,), generator=torch.Generator().manual_seed(0))
    assert format.protect_words(words).tolist() == [written(word, format.width) for word in words.tolist()]
    found, lost = format.repair_words(words)
    assert lost is None
    assert found.tolist() == [read(word, format.width) for word in words.tolist()]


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_every_single_and_double_fault(format):
    width, critical = format.width, {format.width - 2, 1, 0}
    data = torch.randint(0, 2**width, (20,), generator=torch.Generator().manual_seed(1))
    stored = format.protect_words(data)
    for hits in [*combinations(range(width), 1), *combinations(range(width), 2)]:
        mask = sum(1 << bit for bit in hits)
        found = format.repair_words(stored ^ mask)[0]
        assert found.tolist() == [read(word ^ mask, width) for word in stored.tolist()]
        outvoted = len(critical & set(hits)) == 2
        assert (((found ^ stored) >> (width - 2)) & 1).tolist() == [int(outvoted)] * 20


def test_known_words():
    stored = fp.MSET(fp.Float32()).encode(torch.tensor([1.0, 2.0, -0.1]))
    assert [f"{word:08x}" for word in words_of(stored.words)] == ["3f800000", "40000003", "bdcccccc"]  # -0.1 is …ccd
    assert stored.decode().tolist() == [1.0, float32_of(0x40000003), float32_of(0xBDCCCCCC)]


def test_it_costs_no_memory():
    assert [format.width for format in FORMATS] == [32, 16, 16]


@pytest.mark.parametrize("inner", [Affine(bits=8), FixedPoint(), Float8E4M3(), fp.Parity(fp.Float32())], ids=repr)
def test_other_formats_are_refused(inner):
    with pytest.raises(FormatError, match="MSET copies an exponent bit"):
        fp.MSET(inner)


def test_no_format_is_refused():
    with pytest.raises(FormatError, match="protects the words of a Format, got 'Float32'"):
        fp.MSET("Float32")


def test_what_becomes_infinite_in_the_inner_format_is_refused():
    with pytest.raises(FormatError, match="1 of 2 values are inf"):
        fp.MSET(fp.Float16()).encode(torch.tensor([1.0, 1e6]))
