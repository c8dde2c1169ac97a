"""What the codes promise, proved by enumeration, by published weight distributions and by other decoders."""

import copy
import functools
import itertools
import math

import galois
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import flipproof as fp
from flipproof.errors import FormatError
from flipproof.formats import Float64, _compiled, blocks
from flipproof.formats._block_codes import (
    _PRIMITIVE,
    LOST,
    TABLE_CHECKS,
    BlockCode,
    bch_checks,
    bch_code,
    generator,
    hamming_code,
)
from flipproof.spaces.contract import Faults


def patterns(length, errors):
    """Every pattern of so many errors in so many bits, as masks."""
    masks, last = np.zeros(1, np.int64), np.full(1, -1)
    for _ in range(errors):
        before, added = np.nonzero(np.arange(length)[None, :] > last[:, None])
        masks, last = masks[before] | np.int64(1) << added, added
    return masks


def some_patterns(length, errors, count, seed=0):
    """Patterns of so many errors, each as probable as any other."""
    order = np.random.default_rng(seed).random((count, length)).argsort(axis=1)[:, :errors]
    return (np.int64(1) << order).sum(axis=1)


def read(format, words):
    """(inner words, which of them are lost)."""
    data, lost = format.repair_words(torch.from_numpy(np.asarray(words, np.int64)))
    return data.numpy(), lost.numpy()


def written(format, data):
    return format.protect_words(torch.from_numpy(np.asarray(data, np.int64))).numpy()


def a_format(data_bits, t, parity=True):
    return fp.BCH(fp.Rounded(fp.Float32(), data_bits), t, parity=parity)


# ------------------------------------------------------------------- every pattern of at most t errors


CODES = [(11, 5, 32), (5, 3, 16), (7, 2, 16), (16, 3, 32), (6, 7, 32)]


@pytest.mark.parametrize(("data_bits", "t", "length"), CODES)
def test_every_pattern_of_at_most_t_errors_is_corrected_and_t_plus_1_are_detected(data_bits, t, length):
    format = a_format(data_bits, t)
    assert format.width == length
    value = 0x5A5A5A5A % 2**data_bits
    word = written(format, [value])[0]
    for errors in range(t + 1):
        found = patterns(length, errors)
        assert found.size == math.comb(length, errors)
        data, lost = read(format, word ^ found)
        assert (data == value).all()
        assert not lost.any()
    beyond = math.comb(length, t + 1)
    more = patterns(length, t + 1) if beyond < 5e6 else some_patterns(length, t + 1, 300_000)
    assert read(format, word ^ more)[1].all()


def test_secded_within_a_float_corrects_every_single_and_detects_every_double_error():
    format = fp.SECDED(fp.Rounded(fp.Float32(), 26))
    assert format.width == 32
    for value in (0, 1, 2**26 - 1, 0x2A5A5A5 % 2**26):
        word = written(format, [value])[0]
        for errors in (0, 1):
            data, lost = read(format, word ^ patterns(32, errors))
            assert (data == value).all()
            assert not lost.any()
        assert read(format, word ^ patterns(32, 2))[1].all()


@pytest.mark.parametrize(("data_bits", "t", "length"), [*CODES, (26, 1, 32)])
def test_the_codes_are_linear_and_systematic(data_bits, t, length):
    """What holds for the errors of one word holds for those of any."""
    format = a_format(data_bits, t)
    one, other = np.random.default_rng(1).integers(0, 2**data_bits, (2, 5000))
    words = [written(format, data) for data in (one, other, one ^ other)]
    assert (words[0] ^ words[1] == words[2]).all()
    assert (words[0] & (2**data_bits - 1) == one).all()
    hits = np.random.default_rng(2).integers(0, 2**length, 5000)
    of_one, of_other = (read(format, word ^ hits) for word in words[:2])
    assert (of_one[1] == of_other[1]).all()
    known = ~of_one[1]
    assert (of_one[0][known] ^ one[known] == of_other[0][known] ^ other[known]).all()


def test_every_pattern_of_two_errors_in_a_block_and_its_tail():
    format = fp.BCH(fp.Affine(4), t=2, block=16, parity=False)  # 4 words, and 7 at the end
    data = np.arange(11) * 7 % 16
    words = written(format, data)
    stored = format.layout(11)
    assert stored.bits == 44 + bch_checks(16, 2)[1] + bch_checks(28, 4)[1]  # ⌈2 · 7 / 4⌉ faults in the longer one
    values, bits = stored.locate(np.arange(stored.bits))
    for first, last, wide, t in ((0, 4, 16, 2), (4, 11, 28, 4)):
        own = np.flatnonzero((values >= first) & (values < last))
        assert own.size == wide + bch_checks(wide, t)[1]
        for hits in [*itertools.combinations(own, 1), *itertools.combinations(own, 2)]:
            faulty = words.copy()
            for hit in hits:
                faulty[values[hit]] ^= 1 << bits[hit]
            found, lost = read(format, faulty)
            assert (found == data).all()
            assert not lost.any()


LONG = [
    (fp.Affine(4), 14, 512, 128),  # 512 data bits
    (fp.Affine(4), 20, 512, 128),
    (fp.Affine(5, axis=0), 14, 385, 77),
    (fp.Float32(), 3, 64, 2),
    (fp.Affine(8), 1, 64, 8),
]


@given(
    st.sampled_from(LONG),
    st.integers(0, 2**32 - 1),
    st.integers(1, 2),
    st.floats(0, 1, exclude_max=True),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
@example(LONG[0], 0, 1, 0.999, False).via("the longest tail")
@example(LONG[2], 1, 1, 0.999, True)
def test_long_blocks_correct_t_errors_and_detect_one_more(kind, seed, whole, over, full):
    inner, t, block, together = kind
    format = fp.BCH(inner, t, block=block)
    assert format.together == together
    count = whole * together + int(over * together)
    random = np.random.default_rng(seed)
    data = random.integers(0, 2**inner.width, count)
    words, stored = written(format, data), format.layout(count)
    values, bits = stored.locate(np.arange(stored.bits))
    borders = [*range(0, whole * together, together), count]
    for first, last in itertools.pairwise(borders):
        own = np.flatnonzero((values >= first) & (values < last))
        most = -(-t * (last - first) // together)  # a last block that is longer corrects as many more
        for errors in (most, most + 1) if full else (int(random.integers(0, most + 1)),):
            faulty = words.copy()
            for hit in random.permutation(own)[:errors]:
                faulty[values[hit]] ^= np.int64(1) << bits[hit]
            found, lost = read(format, faulty)
            block_ = np.arange(first, last)
            assert lost.tolist() == np.isin(np.arange(count), block_ if errors > most else []).tolist()
            assert (found[~lost] == data[~lost]).all()


def test_a_tail_may_need_a_longer_field():
    format = fp.BCH(fp.Affine(8), t=2, block=48)  # 6 words are 48 bits and 12; 11 words 88 bits in the next field
    assert (bch_checks(48, 2), bch_checks(88, 4)) == ((6, 12), (7, 28))
    data = np.arange(17) * 29 % 256
    words, stored = written(format, data), format.layout(17)
    assert stored.bits == 17 * 8 + 13 + 29
    values, bits = stored.locate(np.arange(stored.bits))
    tail = np.flatnonzero(values >= 6)
    masks = patterns_of_places(tail, 2)
    for hits in masks:
        faulty = words.copy()
        for hit in hits:
            faulty[values[hit]] ^= 1 << bits[hit]
        found, lost = read(format, faulty)
        assert (found == data).all()
        assert not lost.any()


def patterns_of_places(places, errors):
    return list(itertools.combinations(places.tolist(), errors))


# ------------------------------------------------------------------- what is beyond t: by the weights of the code words

PUBLISHED = {
    (15, 7): {0: 1, 5: 18, 6: 30, 7: 15, 8: 15, 9: 30, 10: 18, 15: 1},
    (31, 11): {0: 1, 11: 186, 12: 310, 15: 527, 16: 527, 19: 310, 20: 186, 31: 1},
    (31, 16): {
        **{0: 1, 7: 155, 8: 465, 11: 5208, 12: 8680, 15: 18259},
        **{31: 1, 24: 155, 23: 465, 20: 5208, 19: 8680, 16: 18259},
    },
}
"""Code words of each weight in primitive BCH codes (MacWilliams and Sloane 1977)."""


def weights(format):
    words = written(format, np.arange(2**format.inner.width))
    weight, number = np.unique(np.bitwise_count(words), return_counts=True)
    return dict(zip(weight.tolist(), number.tolist(), strict=True))


@pytest.mark.parametrize(("length", "data_bits", "t"), [(15, 7, 2), (31, 11, 5), (31, 16, 3)])
def test_code_words_have_the_published_weights(length, data_bits, t):
    published = PUBLISHED[length, data_bits]
    assert sum(published.values()) == 2**data_bits
    assert weights(a_format(data_bits, t, parity=False)) == published
    extended = {}
    for weight, number in published.items():
        extended[weight + weight % 2] = extended.get(weight + weight % 2, 0) + number
    assert weights(a_format(data_bits, t)) == extended


def misread(length, t, distribution, errors):
    """Patterns of so many errors that lie within t of a code word that was not written.

    Of a word of weight w, i ones and j zeros are changed: C(w, i) · C(n − w, j) patterns of weight w − i + j.
    """
    return sum(
        number * math.comb(weight, i) * math.comb(length - weight, errors - weight + i)
        for weight, number in distribution.items()
        for i in range(t + 1)
        if weight and errors - weight + i >= 0 and i + errors - weight + i <= t
    )


@pytest.mark.parametrize(
    ("data_bits", "t", "parity", "errors"),
    [
        *((7, 2, False, errors) for errors in (3, 4, 5, 8)),
        *((7, 2, True, errors) for errors in (3, 4, 5, 8)),
        *((16, 3, False, errors) for errors in (4, 5)),
        *((16, 3, True, errors) for errors in (4, 5)),
        (11, 5, False, 6),
        (11, 5, True, 7),
    ],
)
def test_as_many_patterns_are_misread_as_the_weights_say(data_bits, t, parity, errors):
    format = a_format(data_bits, t, parity=parity)
    n = format.width
    value = 0b1011 % 2**data_bits
    hits = patterns(n, errors)
    data, lost = read(format, written(format, [value])[0] ^ hits)
    wrong = ~lost & (data != value)
    assert int(wrong.sum()) == misread(n, t, weights(format), errors)
    # a code word with the same data is the one that was written: nothing beyond t is read rightly
    assert (lost | wrong).all()


@pytest.mark.parametrize("errors", [8, 9, 12, 16])
def test_the_share_that_eleven_bits_misread(errors):
    format, count = a_format(11, 5), 200_000
    expected = misread(32, 5, weights(format), errors) / math.comb(32, errors)
    lost = read(format, some_patterns(32, errors, count))[1]
    deviation = math.sqrt(expected * (1 - expected) / count)
    assert abs(1 - lost.mean() - expected) < 5 * deviation


# ------------------------------------------------------------------- another decoder


@functools.cache
def other_code(m, t):
    """The same code in `galois`, whose vectors have the highest power first."""
    polynomial = galois.Poly.Int(_PRIMITIVE[m])
    field = galois.GF(
        2**m, irreducible_poly=polynomial, primitive_element=2, verify=True, compile="python-calculate"
    )  # compiling takes longer than all that is computed here
    return galois.BCH(2**m - 1, d=2 * t + 1, extension_field=field, alpha=field.primitive_element)


@pytest.mark.parametrize("m", range(2, 14))
def test_the_polynomials_are_primitive(m):
    """x has the order 2^m − 1: no smaller power of it, for any prime factor, is 1."""
    order, polynomial = 2**m - 1, _PRIMITIVE[m]

    def power(exponent):
        result, base = 1, 2
        while exponent:
            if exponent & 1:
                result = product(result, base)
            base, exponent = product(base, base), exponent >> 1
        return result

    def product(a, b):
        total = 0
        for bit in range(m):
            total ^= a << bit if b >> bit & 1 else 0
        for bit in range(2 * m, m - 1, -1):
            total ^= polynomial << (bit - m) if total >> bit & 1 else 0
        return total

    primes = [p for p in range(2, order + 1) if order % p == 0 and all(p % q for q in range(2, math.isqrt(p) + 1))]
    assert polynomial.bit_length() == m + 1
    assert power(order) == 1
    assert all(power(order // p) != 1 for p in primes if p < order or m > 2)


@pytest.mark.parametrize(("m", "t"), [(9, 14)])  # its plain Python cannot decode there
def test_galois_has_the_same_generator_of_long_codes(m, t):
    assert int(other_code(m, t).generator_poly) == generator(m, t)


@pytest.mark.parametrize(("m", "t"), [(4, 2), (4, 3), (5, 3), (5, 5), (6, 4), (7, 6), (8, 10)])
def test_galois_encodes_and_decodes_alike(m, t):
    """Words of one bit, so that the block is the code word, with nothing, at most t, or too many errors in it."""
    theirs = other_code(m, t)
    assert int(theirs.generator_poly) == generator(m, t)
    for data_bits in {theirs.k, max(2, theirs.k - 3)}:  # and shortened
        if bch_checks(data_bits, t)[0] != m:
            continue
        code = bch_code(1, data_bits, 64 if m > 4 else 12, t, parity=False)
        length = data_bits + code.checks
        random, rows = np.random.default_rng(m * t), 200 if m < 6 else 30
        data = random.integers(0, 2, (rows, data_bits))
        checks = check_bits(code, data)
        line = np.concatenate([data[:, ::-1], checks[:, ::-1]], axis=1).astype(np.uint8)
        assert (np.asarray(theirs.encode(data[:, ::-1].astype(np.uint8))) == line).all()
        for row, errors in enumerate([0, 1, t, t, *random.integers(0, t + 6, rows)][:rows]):
            line[row, random.permutation(length)[:errors]] ^= 1
        decoded, number = theirs.decode(line.astype(np.int64), errors=True)
        data, lost = repaired(code, line)
        assert (lost == (np.asarray(number) < 0)).all()
        assert (data[~lost] == np.asarray(decoded)[~lost]).all()
        assert lost.any()
        assert not lost.all()


def check_bits(code, data):
    """Of rows of data bits, by the columns of the code: without the compiled tables."""
    columns = np.array([[column >> i & 1 for i in range(code.checks)] for column in code.columns])
    return data @ columns % 2


def repaired(code, line):
    """Code words with the highest power first, by the compiled decoder: (data with the highest first, lost)."""
    data, checks = line[:, : code.words][:, ::-1], line[:, code.words :][:, ::-1]
    bits, above = np.zeros(data.shape, np.uint64), 63
    code = BlockCode(1, code.words, above, code.t, code.parity, code.columns, code.checks, code.field)
    for i in range(code.checks):
        bits[:, i // above] |= checks[:, i].astype(np.uint64) << np.uint64(1 + i % above)
    words = (bits | data.astype(np.uint64)).reshape(-1)
    out = np.zeros(words.size, np.uint8)
    status = code.repair(words, out)
    return out.reshape(data.shape)[:, ::-1], status == LOST


# ------------------------------------------------------------------- the way without compiled code

SINGLE = [
    a_format(11, 5),  # by table
    fp.BCH(fp.Affine(5), 3),
    fp.BCH(fp.Affine(7), 2, parity=False),
    a_format(6, 7),  # by Berlekamp and Massey
    fp.BCH(fp.Float32(), 5),
    fp.BCH(fp.Rounded(Float64(), 39), 4),  # all 64 bits
    fp.SECDED(fp.Float32()),
    fp.SECDED(fp.Rounded(fp.Float32(), 26)),
]
BLOCKS = [
    fp.BCH(fp.Affine(5, axis=0), 14, block=385),  # two limbs
    fp.BCH(fp.Affine(4), 20, block=512),  # more
    fp.BCH(fp.Affine(4), 2, block=64, parity=False),
    fp.BCH(fp.Affine(8), 2, block=48),
    fp.BCH(fp.Float32(), 3, block=64),
    fp.SECDED(fp.Affine(8), block=64),
    fp.SECDED(fp.Affine(5), block=32),
]


def test_the_codes_below_are_of_both_kinds():
    kinds = [[format.code(format.together).field is None for format in formats] for formats in (SINGLE, BLOCKS)]
    assert all(True in kind and False in kind for kind in kinds)
    assert all(
        (format.code(format.together).field is None) == (format.code(format.together).inside <= TABLE_CHECKS)
        or isinstance(format, fp.SECDED)
        for format in (*SINGLE, *BLOCKS)
    )
    limbs = {format.code(format.together).limbs for format in BLOCKS}
    assert limbs == {1, 2, 4}
    assert {format.width for format in SINGLE} >= {64, 32, 16, 15}


@pytest.fixture
def out_of_reach(monkeypatch):
    """Call it, and what follows is computed as on another device."""

    def leave():
        for module in (blocks, _compiled):
            monkeypatch.setattr(module, "in_reach", lambda words: False)

    return leave


def any_words(format, count, seed, errors=None):
    """Words as they may lie in memory: any bits at all, or so many errors a block."""
    random = np.random.default_rng(seed)
    data = random.integers(0, 2**format.inner.width, count)
    words, stored = written(format, data), format.layout(count)
    values, bits = stored.locate(np.arange(stored.bits))
    if errors is None:
        hit = np.flatnonzero(random.integers(0, 2, stored.bits))
    else:
        last = max(count // format.together - 1, 0)
        block = (values // format.together).clip(max=last)
        hit = np.concatenate([random.permutation(np.flatnonzero(block == b))[:errors] for b in range(last + 1)])
    np.bitwise_xor.at(words, values[hit], np.int64(1) << bits[hit])
    return torch.from_numpy(data), torch.from_numpy(words)


@pytest.mark.parametrize("format", [*SINGLE, *BLOCKS], ids=repr)
def test_the_traceable_way_agrees_with_the_compiled_one(format, out_of_reach):
    k = format.together
    counts = [k, 2 * k, 2 * k + k // 2, 3 * k - 1] if k > 1 else [500]
    most = getattr(format, "t", 1)
    cases = []
    for count in counts:
        for errors in (None, 0, 1, most, most + 1, most + 2):
            data, words = any_words(format, count, seed=count, errors=errors)
            cases.append((data, format.protect_words(data), words, *format.repair_words(words)))
    beyond = torch.cat([case[4] for case in cases])
    assert bool(beyond.any())
    assert not bool(beyond.all())
    out_of_reach()
    for data, whole, words, found, lost in cases:
        assert torch.equal(format.protect_words(data), whole)
        ours = format.repair_words(words)
        assert torch.equal(ours[1], lost)
        assert torch.equal(ours[0][~lost], found[~lost])


@pytest.mark.parametrize("format", [SINGLE[0], SINGLE[3], BLOCKS[0], BLOCKS[5]], ids=repr)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 3), (2, 3), (77, 2)])
def test_shapes_are_kept_either_way(format, shape, out_of_reach):
    words = torch.zeros(shape, dtype=torch.int64)

    def outcome(what):
        try:
            return what(words)
        except FormatError as error:
            return str(error)

    def both():
        return outcome(format.protect_words), outcome(lambda words: format.repair_words(words))

    compiled = both()
    out_of_reach()
    for ours, theirs in zip(both(), compiled, strict=True):
        if isinstance(theirs, str):
            assert 0 < words.numel() < format.together
            assert "smaller than a block" in theirs
            assert ours == theirs
        else:
            for one, other in zip(
                *((part,) if torch.is_tensor(part) else part for part in (ours, theirs)), strict=True
            ):
                assert one.shape == other.shape == shape
                assert one.dtype == other.dtype
                assert torch.equal(one, other)


@pytest.mark.parametrize("format", [*SINGLE, *BLOCKS], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensors_are_stored_and_read_alike_either_way(format, dtype, out_of_reach):
    x = (torch.randn(50, 12, generator=torch.Generator().manual_seed(3)) * 0.3).to(dtype)
    stored = format.encode(x)
    hit = stored.words.clone().reshape(-1)
    for value in range(0, 600, 7):
        hit[value] ^= 1 << value % format.inner.width
    hit = hit.reshape(x.shape)
    values, lost = format.read(hit, torch_dense(stored.coding), dtype)
    out_of_reach()
    again = format.encode(x)
    assert again.words.dtype == stored.words.dtype
    assert torch.equal(again.words, stored.words)
    ours = format.read(hit, torch_dense(stored.coding), dtype)
    assert torch.equal(ours[1], lost)
    assert torch.equal(ours[0], values)


@pytest.mark.parametrize("format", [SINGLE[0], SINGLE[3], SINGLE[6], BLOCKS[4], fp.RangeChecked(SINGLE[6])], ids=repr)
def test_an_exported_model_repairs_as_the_model_does(format):
    """Tracing sees no compiled code: what is exported decodes by itself, with the faults that its memory holds."""
    net, x = torch.nn.Linear(9, 30), torch.randn(4, 9)
    with torch.no_grad():
        clean = fp.pack_(copy.deepcopy(net), {"weight": format}).eval()(x)
        packed = fp.pack_(net, {"weight": format}).eval()
        space = fp.FaultSpace(packed)
        with space.corrupted(Faults(np.arange(3, 0.9 * space.sites[0].bits, 23, dtype=np.int64))):
            expected = packed(x)
            exported = torch.export.export(packed, (x,)).module()
            assert torch.equal(exported(x), expected)
            assert space.word_outcomes.corrected > 0
            bad = space.word_outcomes.detected + space.word_outcomes.miscorrected
            assert torch.equal(expected, clean) == (bad == 0)


def torch_dense(coding):
    return tuple(c.reshape(-1, 1) if c.dim() else c for c in coding)


# ------------------------------------------------------------------- the code itself


def test_the_shortest_code_is_taken():
    """n, k and t of primitive codes (Lin and Costello 2004, Table 6.1)."""
    table = [
        *((7, 4, 1), (15, 11, 1), (15, 7, 2), (15, 5, 3), (31, 26, 1), (31, 21, 2), (31, 16, 3), (31, 11, 5)),
        *((31, 6, 7), (63, 57, 1), (63, 51, 2), (63, 45, 3), (63, 39, 4), (63, 36, 5), (63, 30, 6), (63, 24, 7)),
        *((63, 18, 10), (63, 16, 11), (63, 10, 13), (127, 113, 2), (127, 64, 10), (255, 207, 6), (255, 131, 18)),
        *((511, 385, 14), (1023, 923, 10)),
    ]
    for n, k, t in table:
        assert bch_checks(k, t) == (n.bit_length(), n - k)
        assert bch_checks(k + 1, t)[0] > n.bit_length()
    with pytest.raises(FormatError, match="at most 8191 bits corrects t=3 errors in 8190 data bits"):
        bch_checks(8190, 3)


def test_hamming_columns_are_all_different_and_odd():
    code = hamming_code(8, 8, 1)
    assert code.checks == 8
    columns = [*code.columns, *(1 << i for i in range(8))]
    assert len(set(columns)) == 72
    assert all(column.bit_count() % 2 == 1 for column in code.columns)  # a double error is no single one
