from itertools import combinations

import pytest
import torch

import flipproof as fp
from flipproof.errors import FormatError
from flipproof.formats import Affine, Format
from flipproof.testing import FormatContract


class Contract(FormatContract):
    def test_every_bit_of_a_model_can_be_hit_and_comes_back(self):
        super().test_every_bit_of_a_model_can_be_hit_and_comes_back(torch.float32)


class TestFloat32(Contract):
    format = fp.LSBParity(fp.Float32())


class TestFloat16(Contract):
    format = fp.LSBParity(fp.Float16())


class TestBFloat16(Contract):
    format = fp.LSBParity(fp.BFloat16())


class TestFixedPoint(Contract):
    format = fp.LSBParity(fp.FixedPoint())
    stores_nan = False


class TestAffinePerChannel(Contract):
    format = fp.LSBParity(Affine(bits=8, axis=0))
    stores_nan = stores_infinity = False


FORMATS = [fp.LSBParity(inner) for inner in (fp.Float32(), fp.Float16(), fp.BFloat16(), Affine(bits=5))]


def written(word, width):
    text = f"{word:0{width}b}"[:-1]
    return int(text + str(text.count("1") % 2), 2)


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_random_words_are_written_and_read_bit_by_bit(format):
    words = torch.randint(0, 2**format.width, (4000,), generator=torch.Generator().manual_seed(0))
    assert format.protect_words(words).tolist() == [written(word, format.width) for word in words.tolist()]
    found, lost = format.repair_words(words)
    assert found.tolist() == [word - word % 2 for word in words.tolist()]
    assert lost.tolist() == [f"{word:b}".count("1") % 2 == 1 for word in words.tolist()]


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_every_single_fault_is_seen_and_no_double_one(format):
    width = format.width
    data = torch.randint(0, 2**width, (20,), generator=torch.Generator().manual_seed(1))
    stored = format.protect_words(data)
    assert not bool(format.repair_words(stored)[1].any())
    for bit in range(width):
        assert bool(format.repair_words(stored ^ (1 << bit))[1].all())
    for one, two in combinations(range(width), 2):
        found, lost = format.repair_words(stored ^ (1 << one) ^ (1 << two))
        assert not bool(lost.any())
        assert torch.equal(found, (data ^ (1 << one) ^ (1 << two)) & ~1)


def test_a_lost_word_reads_as_zero_in_any_format():
    stored = fp.LSBParity(Affine(bits=8)).encode(torch.tensor([-1.0, 0.5, 2.0]))
    decoded = stored.decode_at(torch.tensor([0, 2]), stored.words[[0, 2]] ^ 64)
    assert decoded.tolist() == [0.0, 0.0]


def test_infinities_come_back():
    infinite = torch.tensor([float("inf"), float("-inf")])
    for format in FORMATS[:3]:
        assert torch.equal(format.encode(infinite).decode(), infinite)


def test_words_of_one_bit_are_refused():
    class Sign(Format):
        width = 1
        encode_values = decode_words = None

    with pytest.raises(FormatError, match="one bit have none to spare"):
        fp.LSBParity(Sign())
