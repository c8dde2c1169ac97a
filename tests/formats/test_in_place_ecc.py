import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flipproof as fp
from flipproof.errors import FormatError
from flipproof.formats import Affine, Integer
from flipproof.formats.in_place_ecc import _repair
from flipproof.testing import FormatContract

SMALL = fp.FixedPoint(integer_bits=4, fraction_bits=3)  # ±16 in eighths: weights are small numbers


class Contract(FormatContract):
    stores_nan = False

    def test_every_bit_of_a_model_can_be_hit_and_comes_back(self):
        super().test_every_bit_of_a_model_can_be_hit_and_comes_back(torch.float32)


class TestFixedPoint(Contract):
    format = fp.InPlaceECC(SMALL)


class TestSymmetric(Contract):
    format = fp.InPlaceECC(fp.Symmetric(8))
    stores_infinity = False

    def test_constant_tensors_stay_constant(self):
        """Not here: a constant is the largest magnitude, and the first words of a block are clamped to half of it."""
        decoded = self.format.encode(torch.full((16,), 127.0)).decode()
        assert decoded.tolist() == ([63.0] * 7 + [127.0]) * 2
        assert self.format.encode(torch.full((16,), -127.0)).decode().tolist() == ([-64.0] * 7 + [-127.0]) * 2


class TestSymmetricPerChannel(TestSymmetric):
    format = fp.InPlaceECC(fp.Symmetric(8, axis=0))

    def test_constant_tensors_stay_constant(self):
        decoded = self.format.encode(torch.tensor([[127.0], [1.0]]).expand(2, 8)).decode()
        assert torch.equal(decoded, torch.tensor([[63.0] * 7 + [127.0], [63 / 127] * 7 + [1.0]]))


class TestSymmetricThatFits(Contract):
    format = fp.InPlaceECC(fp.Symmetric(8, largest=63))
    stores_infinity = False

    def test_nothing_is_clamped(self):
        x = self.values((7, 9))
        assert torch.equal(self.format.encode(x).decode(), self.format.inner.encode(x).decode())


class Twin:
    """The code of one block, bit by bit: lists of 0 and 1, and the places of the docstring."""

    def __init__(self, words):
        self.words, self.checks = words, 7 if words == 8 else 8
        self.place, number = {}, 0
        for i in range(self.checks - 1):
            self.place[i, 6] = 2**i
        self.place[self.checks - 1, 6] = 0
        for word in range(words):
            for bit in range(8):
                if (word, bit) not in self.place:
                    number += 1
                    while bin(number).count("1") == 1:
                        number += 1
                    self.place[word, bit] = number

    def syndrome(self, bits):
        found = 0
        for where, bit in bits.items():
            found ^= self.place[where] * bit
        return found

    def write(self, values):
        """Signed numbers to words."""
        kept = [min(max(v, -64), 63) if i < self.checks else v for i, v in enumerate(values)]
        bits = {(word, bit): kept[word] >> bit & 1 for word in range(self.words) for bit in range(8)}
        for i in range(self.checks):
            bits[i, 6] = 0
        found = self.syndrome(bits)
        for i in range(self.checks - 1):
            bits[i, 6] = found >> i & 1
        bits[self.checks - 1, 6] = sum(bits.values()) % 2
        return [sum(bits[word, bit] << bit for bit in range(8)) for word in range(self.words)]

    def read(self, words):
        """Words to signed numbers, or None for a block that is lost."""
        bits = {(word, bit): words[word] >> bit & 1 for word in range(self.words) for bit in range(8)}
        found = self.syndrome(bits)
        if sum(bits.values()) % 2:
            faulty = [where for where, place in self.place.items() if place == found]
            if not faulty:
                return None
            bits[faulty[0]] ^= 1
        elif found:
            return None
        for i in range(self.checks):
            bits[i, 6] = bits[i, 7]
        numbers = [sum(bits[word, bit] << bit for bit in range(8)) for word in range(self.words)]
        return [n - 256 if n >= 128 else n for n in numbers]


def signed(numbers):
    return [n - 256 if n >= 128 else n for n in numbers]


def borders(count):
    """First and last word of each block; the last one takes what is left over."""
    starts = [8 * k for k in range(count // 8)]
    return list(zip(starts, [*starts[1:], count], strict=True))


def test_places_fill_a_block_of_eight():
    assert sorted(Twin(8).place.values()) == list(range(64))


@given(
    st.lists(st.integers(-128, 127), min_size=8, max_size=40),
    st.sets(st.integers(0, 40 * 8 - 1), max_size=7),
)
@settings(deadline=None)
def test_words_are_written_and_read_as_a_scalar_twin_does(values, hits):
    format = fp.InPlaceECC(SMALL)
    words = format.protect_words(torch.tensor([v % 256 for v in values]))
    hits = {hit for hit in hits if hit < 8 * len(values)}
    faulty = words.clone()
    for hit in hits:
        faulty[hit // 8] ^= 1 << hit % 8
    found, lost = format.repair_words(faulty)
    for first, last in borders(len(values)):
        twin = Twin(last - first)
        assert words[first:last].tolist() == twin.write(values[first:last])
        expected = twin.read(faulty[first:last].tolist())
        assert lost[first:last].tolist() == [expected is None] * (last - first)
        assert expected is None or signed(found[first:last].tolist()) == expected


@pytest.mark.parametrize("count", range(8, 16))
def test_every_single_and_double_fault_of_a_block(count):
    format, draw = fp.InPlaceECC(SMALL), random.Random(count)
    values = [draw.randint(-64, 63) if i < 8 else draw.randint(-128, 127) for i in range(count)]
    masks = torch.zeros(8 * count, count, dtype=torch.int64)
    for hit, row in enumerate(masks):
        row[hit // 8] = 1 << hit % 8
    first, second = torch.triu_indices(8 * count, 8 * count, offset=1)
    for data in torch.tensor([[v % 256 for v in values], [0] * count, [255] * count]):
        words = format.protect_words(data)
        for row in masks:
            found, lost = format.repair_words(words ^ row)
            assert torch.equal(found, data)
            assert not bool(lost.any())
        assert bool((_repair(words ^ masks[first] ^ masks[second]) == -1).all())  # each row is a block of its own


def test_the_last_words_of_a_tensor_are_protected_too():
    format = fp.InPlaceECC(SMALL)
    stored = format.encode(torch.linspace(-1, 1, 29))
    golden = stored.decode()
    for word in range(29):
        for bit in range(8):
            hit = stored.words.clone()
            hit[word] ^= 1 << bit
            assert torch.equal(format.decode_words(hit, stored.coding, torch.float32), golden)


def test_a_campaign_and_packed_memory_agree():
    torch.manual_seed(0)
    net = torch.nn.Linear(14, 2, bias=False)  # blocks of 8, 8 and 12 words
    format = fp.InPlaceECC(fp.Symmetric(8, axis=0))
    golden = format.encode(net.weight).decode().view(-1)
    space, packed = fp.FaultSpace(net, format=format), fp.pack_(copy.deepcopy(net), format)
    in_memory = fp.FaultSpace(packed)
    assert in_memory.bits == space.bits == 28 * 8
    with space.stored():
        for places, lost in (
            ([(17, 0), (27, 7)], slice(16, 28)),
            ([(17, 6)], slice(0, 0)),
            ([(0, 1), (7, 2), (8, 0)], slice(0, 8)),
        ):
            expected = golden.clone()
            expected[lost] = 0
            hits = [("weight", value, bit) for value, bit in places]
            with space.corrupted(space.faults(hits)):
                assert torch.equal(net.weight.view(-1), expected)
            with in_memory.corrupted(in_memory.faults(hits)):
                assert torch.equal(packed.weight.view(-1), expected)


@pytest.mark.parametrize(
    "inner",
    [Affine(bits=8), fp.Symmetric(7), fp.FixedPoint(), Integer(8), fp.Float8E4M3(), fp.Parity(fp.Symmetric(7))],
    ids=repr,
)
def test_other_formats_are_refused(inner):
    with pytest.raises(FormatError, match="takes 8-bit two's complement words"):
        fp.InPlaceECC(inner)


def test_small_tensors_are_refused_by_name():
    with pytest.raises(FormatError, match=r"bias: a tensor of 3 values is smaller than a block of 8 words.*mapping"):
        fp.pack_(torch.nn.Linear(3, 3), {"bias": fp.InPlaceECC(SMALL)})
