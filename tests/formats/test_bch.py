import pytest
import torch

import flipproof as fp
from flipproof.errors import FormatError
from flipproof.formats import parse_format
from flipproof.spaces.contract import Faults
from flipproof.testing import FormatContract


class Repairs(FormatContract):
    def test_every_bit_of_a_model_can_be_hit_and_comes_back(self):
        super().test_every_bit_of_a_model_can_be_hit_and_comes_back(torch.float32)


class Finite(Repairs):
    stores_nan = stores_infinity = False


class TestElevenBits(Repairs):
    format = fp.BCH(fp.Rounded(fp.Float16(), 11), 5)


class TestFiveBits(Finite):
    format = fp.BCH(fp.Affine(5, axis=0), 3)


class TestAllSixtyFourBits(Repairs):
    format = fp.BCH(fp.Rounded(fp.Float32(), 30), 6)


class TestLongBlock(Finite):
    format = fp.BCH(fp.Affine(5, axis=0), t=14, block=385)

    def test_every_bit_of_a_model_can_be_hit_and_comes_back(self):
        """A block of 77 words takes all bits of a model of 308 values: one in 17 of them is enough."""
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 80)
        space = fp.FaultSpace(net, format={"*": self.format})
        assert space.bits == self.format.stored_bits((80, 3)) + self.format.stored_bits((80,))
        # blocks of 77, 77 and 86 words, and of 80, in which 14, 14, 16 and 15 faults are corrected
        assert space.bits == 320 * 5 + 2 * 127 + 161 + 151
        golden = {name: self.format.encode(p.detach()).decode() for name, p in net.named_parameters()}
        before = [p.detach().clone() for p in net.parameters()]
        with space.stored():
            for first in range(0, space.bits - 14, 17):
                # fourteen hits in a row, in one block or in two
                places = space.places(Faults(torch.arange(first, first + 14).numpy()))
                with space.corrupted(space.faults(places)) as changed:
                    assert changed == 14
                    assert all(torch.equal(p, golden[name]) for name, p in net.named_parameters())
        assert all(torch.equal(p, was) for p, was in zip(net.parameters(), before, strict=True))


class TestBlockWithoutParity(Finite):
    format = fp.BCH(fp.Affine(4), t=2, block=64, parity=False)


class TestSECDEDRounded(Repairs):
    format = fp.SECDED(fp.Rounded(fp.Float32(), 26))


def test_widths_are_the_textbooks():
    """Data bits and m · t check bits, as long as the generator has no root twice, and a parity."""
    widths = {
        **{fp.BCH(fp.Rounded(fp.Float16(), 11), 5): 32, fp.BCH(fp.Affine(5), 3): 16, fp.BCH(fp.Affine(7), 2): 16},
        **{fp.BCH(fp.Rounded(fp.Float32(), 16), 3): 32, fp.BCH(fp.Affine(6), 7): 32},
        **{fp.BCH(fp.Rounded(fp.Float32(), 26), 1): 32, fp.BCH(fp.Affine(7), 2, parity=False): 15},
        **{fp.BCH(fp.Float32(), 2): 32 + 12 + 1, fp.BCH(fp.Float32(), 5): 32 + 27 + 1},
    }
    assert {format: format.width for format in widths} == widths


def test_a_code_with_a_parity_is_no_wider_in_blocks_than_its_bits():
    block = fp.BCH(fp.Affine(5, axis=0), t=14, block=385)
    assert (block.together, block.width) == (77, 8)  # a last block of 150 words has 3 check bits a word, here 2
    assert block.layout(77 * 9).bits == 9 * (385 + 126 + 1)


@pytest.mark.parametrize(
    "text",
    [
        "BCH(Rounded(Float16(), 11), 5)",
        "BCH(Affine(5, axis=0), t=14, block=385)",
        "BCH(Affine(4), 2, block=64, parity=False)",
    ],
)
def test_codes_are_read_from_text(text):
    assert parse_format(repr(parse_format(text))) == parse_format(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fp.BCH(fp.Float32(), t=6), "75 bits a word; at most 64"),
        (lambda: fp.BCH(fp.Float32(), t=0), "from 1, got t=0"),
        (lambda: fp.BCH(fp.Float32(), t=True), "from 1, got t=True"),
        (lambda: fp.BCH(fp.Float32(), t=1.0), "from 1, got t=1.0"),
        (lambda: fp.BCH(fp.Float32(), t=1, parity=1), "parity is True or False"),
        (lambda: fp.BCH(fp.Float32(), t=1, block=16), "holds no word"),
        (lambda: fp.BCH(fp.Float32(), t=1, block=8192), "at most 4096"),
        (lambda: fp.BCH(fp.Affine(2), t=4000), "at most 8191 bits"),
        (lambda: fp.BCH(fp.Affine, t=1), "Format"),
        (lambda: fp.BCH(fp.BCH(fp.Affine(4), t=1, block=16), t=1), "inside"),
        (lambda: fp.Rounded(fp.BCH(fp.Affine(5), 3), 8), "Put Rounded inside"),
    ],
)
def test_refuses_what_is_no_code(make, message):
    with pytest.raises(FormatError, match=message):
        make()
