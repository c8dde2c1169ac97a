from itertools import combinations

import pytest
import torch
from format_references import words_of

import flipproof as fp
from flipproof.errors import FormatError
from flipproof.formats import Affine, Float64
from flipproof.testing import FormatContract


class Contract(FormatContract):
    def test_every_bit_of_a_model_can_be_hit_and_comes_back(self):
        super().test_every_bit_of_a_model_can_be_hit_and_comes_back(torch.float32)


class TestFloat32D3(Contract):
    format = fp.CEP(fp.Float32())


class TestFloat32D7(Contract):
    format = fp.CEP(fp.Float32(), data=7)


class TestFloat32D15(Contract):
    format = fp.CEP(fp.Float32(), data=15)


class TestFloat16(Contract):
    format = fp.CEP(fp.Float16())


class TestBFloat16(Contract):
    format = fp.CEP(fp.BFloat16(), data=7)


class TestFloat64OneChunk(Contract):
    format = fp.CEP(Float64(), data=63)


class TestFixedPoint(Contract):
    format = fp.CEP(fp.FixedPoint(), data=7)
    stores_nan = False


class TestAffine(Contract):
    format = fp.CEP(Affine(bits=8))
    stores_nan = stores_infinity = False


def written(word, width, data):
    """FaultForge's table as text: chunks from the left, behind them their parities in the same order."""
    text, count = f"{word:0{width}b}", width // (data + 1)
    chunks = [text[k * data : (k + 1) * data] for k in range(count)]
    return int("".join(chunks) + "".join(str(chunk.count("1") % 2) for chunk in chunks), 2)


def read(word, width, data):
    """Chunks whose parity is wrong are zeros, and so are the parities."""
    text, count = f"{word:0{width}b}", width // (data + 1)
    chunks = [text[k * data : (k + 1) * data] for k in range(count)]
    checks = text[count * data :]
    kept = [c if (c + check).count("1") % 2 == 0 else "0" * data for c, check in zip(chunks, checks, strict=True)]
    return int("".join(kept) + "0" * count, 2)


SCHEMES = [fp.CEP(inner, data=data) for inner in (fp.Float32(), fp.Float16(), fp.BFloat16()) for data in (3, 7, 15)]


@pytest.mark.parametrize("format", [*SCHEMES, fp.CEP(Affine(bits=6), data=2), fp.CEP(Affine(bits=4), data=1)], ids=repr)
def test_random_words_are_written_and_read_as_published(format):
    words = torch.randint(0, 2**format.width, (3000,), generator=torch.Generator().manual_seed(0))
    shape = (format.width, format.data)
    assert format.protect_words(words).tolist() == [written(word, *shape) for word in words.tolist()]
    found, lost = format.repair_words(words)
    assert lost is None
    assert found.tolist() == [read(word, *shape) for word in words.tolist()]


@pytest.mark.parametrize("format", SCHEMES, ids=repr)
def test_every_single_and_double_fault(format):
    width, data = format.width, format.data
    count = width // (data + 1)
    group = {width - 1 - k * data - j: k for k in range(count) for j in range(data)}
    group |= {count - 1 - k: k for k in range(count)}
    assert sorted(group) == list(range(width))
    stored = format.protect_words(torch.randint(0, 2**width, (12,), generator=torch.Generator().manual_seed(1)))
    clean = format.repair_words(stored)[0]
    assert torch.equal(clean >> count, stored >> count)
    for hits in [*combinations(range(width), 1), *combinations(range(width), 2)]:
        mask = sum(1 << bit for bit in hits)
        found = format.repair_words(stored ^ mask)[0]
        seen = {group[bit] for bit in hits} if len({group[bit] for bit in hits}) == len(hits) else set()
        zeroed = sum(1 << bit for bit, k in group.items() if k in seen and bit >= count)
        expected = (clean if seen else (stored ^ mask)) & ~zeroed & ~((1 << count) - 1)
        assert torch.equal(found, expected)


def test_the_word_of_the_documentation():
    """HHHG GGFF FEEE DDDC CCBB BAAA HGFE DCBA: one bit of each chunk, and its parity bit is the one of its letter."""
    picture = "HHHGGGFFFEEEDDDCCCBBBAAAHGFEDCBA"
    format = fp.CEP(fp.Float32())
    for letter in "ABCDEFGH":
        places = [31 - at for at, found in enumerate(picture) if found == letter]
        for bit in places[:3]:
            assert format.protect_words(torch.tensor([1 << bit])).tolist() == [(1 << bit) | (1 << places[3])]


def test_known_words():
    stored = fp.CEP(fp.Float32()).encode(torch.tensor([1.0, -1.0]))
    # 1.0 is 001 111 111 0…, so the parities are 1 1 1 0 0 0 0 0; the sign makes the first one even
    assert [f"{word:08x}" for word in words_of(stored.words)] == ["3f8000e0", "bf800060"]
    assert stored.decode().tolist() == [1.0, -1.0]


def test_infinities_and_nan_come_back():
    decoded = fp.CEP(fp.Float16()).encode(torch.tensor([float("inf"), float("-inf"), float("nan")])).decode()
    assert decoded[:2].tolist() == [float("inf"), float("-inf")]
    assert bool(torch.isnan(decoded[2]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner": fp.Float32(), "data": 4}, "chunks of 4 data bits and 1 parity bit do not fill the 32 bits"),
        ({"inner": fp.Float16(), "data": 31}, "do not fill the 16 bits"),
        ({"inner": fp.Float32(), "data": 0}, "number of bits of a chunk"),
        ({"inner": fp.Float32(), "data": True}, "number of bits of a chunk"),
        ({"inner": fp.Float32(), "data": 3.0}, "number of bits of a chunk"),
        ({"inner": fp.Float32(), "parity": 2}, "one parity bit, got parity=2"),
        ({"inner": None}, "protects the words of a Format"),
        ({"inner": fp.SECDED(fp.Float16(), block=64)}, "can be inside it, not around"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(FormatError, match=message):
        fp.CEP(**arguments)
