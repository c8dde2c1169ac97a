import pytest
import torch

import flipproof as fp
from flipproof.errors import FormatError
from flipproof.formats import Integer
from flipproof.formats.base import bit_pattern
from flipproof.formats.integer import INTEGERS


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_words_are_the_bytes_in_memory(dtype):
    info = torch.iinfo(dtype)
    values = [info.min, info.max, 0, 1, info.max // 3]
    x = torch.tensor(values, dtype=dtype)
    format = Integer.of(dtype)
    stored = format.encode(x)
    assert (format.width, format.signed) == (info.bits, info.min < 0)
    assert format.is_native(dtype)
    modulus = 2**info.bits
    assert [word % modulus for word in stored.words.tolist()] == [value % modulus for value in values]
    assert stored.decode().tolist() == values
    assert stored.decode().dtype == dtype
    for bit in range(info.bits):
        word = (values[3] % modulus) ^ (1 << bit)
        flipped = format.decode_words(stored.words ^ torch.ones_like(stored.words).bitwise_left_shift(bit), (), dtype)
        assert flipped.tolist()[3] == (word - modulus if info.min < 0 and word >= modulus // 2 else word)


def test_encoding_leaves_its_input_alone_whatever_the_layout():
    x = torch.arange(12, dtype=torch.int32).reshape(3, 4).t()
    stored = Integer(32).encode(x)
    assert torch.equal(stored.decode(), x)
    stored.words.zero_()
    assert int(x.sum()) == 66


def test_other_types_are_refused():
    for x in (torch.zeros(3), torch.zeros(3, dtype=torch.uint8)):
        with pytest.raises(FormatError, match=r"Integer\(bits=8, signed=True\) stores integers of its own sign alone"):
            Integer(8).encode(x)
    with pytest.raises(FormatError, match=r"Integer\(bits=16, signed=True\) stores"):
        Integer(16).encode(torch.zeros(3, dtype=torch.int8))  # a wider word than the tensor has
    for bits in (4, 7, True):
        with pytest.raises(FormatError, match="8, 16, 32 or 64"):
            Integer(bits)
    with pytest.raises(FormatError, match=r"torch\.bool is no integer type"):
        Integer.of(torch.bool)


def test_a_model_of_integers_comes_back_bit_for_bit():
    net = torch.nn.Module()
    for dtype in INTEGERS:
        net.register_buffer(str(dtype)[6:], torch.randint(0, 100, (5,)).to(dtype))
    space = fp.FaultSpace(net, where=fp.Parameters(buffers=True), format=fp.Affine(8))
    assert [site.format for site in space.sites] == [Integer.of(site.dtype) for site in space.sites]
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    for draw in (fp.RandomBits(space.bits // 2), fp.StuckAt(0.5, value=1)):
        with space.corrupted(draw.draw(space, fp.faults.TrialGenerator(0, "p", 0))):
            assert not all(torch.equal(bit_pattern(b), bit_pattern(before[n])) for n, b in net.named_buffers())
        assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())
