import copy
from itertools import combinations

import pytest
import torch
from format_references import words_of
from hypothesis import given
from hypothesis import strategies as st

import flipproof as fp
from flipproof.errors import FormatError
from flipproof.formats import Affine
from flipproof.testing import FormatContract


class Contract(FormatContract):
    stores_nan = False

    def test_every_bit_of_a_model_can_be_hit_and_comes_back(self):
        super().test_every_bit_of_a_model_can_be_hit_and_comes_back(torch.float32)


class TestFitted(Contract):
    format = fp.SignVote(fp.FixedPoint())


class TestFittedShort(Contract):
    format = fp.SignVote(fp.FixedPoint(integer_bits=2, fraction_bits=5))


class TestGiven(Contract):
    format = fp.SignVote(fp.FixedPoint(), bits=13)


class TestGivenEven(Contract):
    format = fp.SignVote(fp.FixedPoint(), bits=14)


class TestGivenAndSaturating(Contract):
    format = fp.SignVote(fp.FixedPoint(), bits=17)


def voted(word, width, alike):
    """As text: the top bits become what most of them are; of an even number the last has no vote."""
    text = f"{word:0{width}b}"
    top = text[:alike] if alike % 2 else text[: alike - 1]
    return int(("1" if top.count("1") > top.count("0") else "0") * alike + text[alike:], 2)


def leading(words, width):
    """How many bits at the top are alike in every word."""
    return min(
        (next((at for at, bit in enumerate(text) if bit != text[0]), width))
        for text in (f"{word:0{width}b}" for word in words)
    )


@given(st.lists(st.floats(-40000, 40000, width=32), min_size=1, max_size=6))
def test_the_most_bits_that_every_value_allows_are_fitted(values):
    x = torch.tensor(values)
    stored = fp.SignVote(fp.FixedPoint()).encode(x)
    plain = fp.FixedPoint().encode(x)
    assert torch.equal(stored.words, plain.words)
    assert torch.equal(stored.decode(), plain.decode())
    assert int(stored.coding[0]) == leading(words_of(plain.words), 32)


@pytest.mark.parametrize(("values", "bits"), [([0.0], 32), ([2.0**15], 1), ([-1.0, 0.5], 16), ([], 32), ([1e9], 1)])
def test_known_bits(values, bits):
    assert int(fp.SignVote(fp.FixedPoint()).fit(torch.tensor(values))[0]) == bits


@pytest.mark.parametrize("bits", [1, 2, 3, 16, 17, 32])
def test_random_words_are_read_as_text_is(bits):
    format = fp.SignVote(fp.FixedPoint(), bits=bits)
    words = torch.randint(0, 2**32, (2000,), generator=torch.Generator().manual_seed(0))
    found, lost = format.repair_words(words)
    assert lost is None
    assert found.tolist() == [voted(word, 32, bits) for word in words.tolist()]
    values = format.decode_words(words.to(torch.int32), (), torch.float64)
    assert torch.equal(values, fp.FixedPoint().decode_words(found.to(torch.int32), (), torch.float64))


@pytest.mark.parametrize("bits", [None, 13, 14])
def test_every_single_and_double_fault(bits):
    x = torch.tensor([0.5, -0.75, 1.9, -2.0, 0.0])
    format = fp.SignVote(fp.FixedPoint(), bits=bits)
    stored = format.encode(x)
    alike = bits or int(stored.coding[0])
    assert alike == (bits or 15)
    golden = words_of(stored.words)
    for hits in [*combinations(range(32), 1), *combinations(range(32), 2)]:
        mask = sum(1 << bit for bit in hits)
        flip = mask - 2**32 if mask >> 31 else mask
        values = format.decode_words(stored.words ^ flip, stored.coding, torch.float64)
        below = mask & ((1 << (32 - alike)) - 1)  # one or two of 13 or 15 votes change nothing
        assert fp.FixedPoint().encode(values).words.tolist() == [
            word - 2**32 if (word := w ^ below) >> 31 else word for w in golden
        ]


def test_half_of_the_votes_less_one_are_harmless_and_one_more_turns_the_sign():
    stored = fp.SignVote(fp.FixedPoint(integer_bits=3, fraction_bits=4), bits=5).encode(torch.tensor([0.25, -0.25]))
    for hits in combinations(range(3, 8), 2):
        mask = sum(1 << bit for bit in hits)
        found = stored.format.decode_words(stored.words ^ mask, stored.coding, torch.float32)
        assert found.tolist() == [0.25, -0.25]
    for hits in combinations(range(3, 8), 3):
        mask = sum(1 << bit for bit in hits)
        found = stored.format.decode_words(stored.words ^ mask, stored.coding, torch.float32)
        assert found.tolist() == [0.25 - 8 / 16, -0.25 + 8 / 16]


def test_given_bits_saturate():
    format = fp.SignVote(fp.FixedPoint(), bits=17)
    unit = 2.0**-16
    assert format.encode(torch.tensor([0.5, -0.5, -7.0, 0.5 - unit])).decode().tolist() == [
        0.5 - unit,
        -0.5,
        -0.5,
        0.5 - unit,
    ]
    data = torch.tensor([0x00008000, 0xFFFF8000, 0x80000000, 0x00007FFF])
    assert format.protect_words(data).tolist() == [0x7FFF, 0xFFFF8000, 0xFFFF8000, 0x7FFF]


def test_a_campaign_and_packed_memory_agree():
    torch.manual_seed(0)
    net = torch.nn.Linear(5, 3)
    format = fp.SignVote(fp.FixedPoint())
    space, packed = fp.FaultSpace(net, format=format), fp.pack_(copy.deepcopy(net), format)
    in_memory = fp.FaultSpace(packed)
    assert in_memory.bits == space.bits == 18 * 32
    hits = [("weight", 3, bit) for bit in (31, 29, 25, 20)] + [("weight", 7, 3), ("bias", 1, 30)]
    with space.stored():
        golden = net.weight.clone()
        with space.corrupted(space.faults(hits)):
            assert (net.weight != golden).nonzero().tolist() == [[1, 2]]  # the low bit of value 7; the rest is outvoted
            faulty = [p.detach().clone() for p in net.parameters()]
        with in_memory.corrupted(in_memory.faults(hits)):
            assert torch.equal(packed.weight, faulty[0])
            assert torch.equal(packed.bias, faulty[1])


def test_words_alone_do_not_tell_how_many_vote():
    format = fp.SignVote(fp.FixedPoint())
    for method in (format.protect_words, format.repair_words):
        with pytest.raises(FormatError, match="fits its bits to a tensor"):
            method(torch.tensor([1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner": fp.Float32()}, "takes a FixedPoint"),
        ({"inner": Affine(bits=8)}, "takes a FixedPoint"),
        ({"inner": "FixedPoint"}, "protects the words of a Format"),
        ({"inner": fp.FixedPoint(), "bits": 0}, "how many of the 32 bits"),
        ({"inner": fp.FixedPoint(), "bits": 33}, "got 33"),
        ({"inner": fp.FixedPoint(), "bits": True}, "got True"),
        ({"inner": fp.FixedPoint(), "bits": 3.0}, "got 3.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(FormatError, match=message):
        fp.SignVote(**arguments)
