from itertools import pairwise
from math import comb

import numpy as np
import pytest
import torch

import flipproof as fp
from flipproof.errors import ConfigError
from flipproof.formats import parse_format
from flipproof.formats.bch import check_bits
from flipproof.storage.codes import (
    capacity,
    cheapest,
    code_table,
    ideal_rate,
    loss,
    shannon_ratio,
    strongest,
    survivable,
    untouched,
)


def tail(n, t, p):
    """P(X > t), term by term."""
    return sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(t + 1, n + 1))


@pytest.mark.parametrize(
    ("format", "bits", "t"),
    [
        (fp.BCH(fp.Affine(bits=5, axis=0), t=3), 16, 3),
        (fp.BCH(fp.Rounded(fp.Float16(), bits=11), t=5), 32, 5),
        (fp.SECDED(fp.Affine(bits=8), block=64), 72, 1),
        (fp.Float16(), 16, 0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("ber", [1e-4, 1e-2, 0.2])
def test_loss_is_the_binomial_tail(format, bits, t, ber):
    assert loss(format, ber) == pytest.approx(tail(bits, t, ber), rel=1e-9)


def test_survivable_inverts_loss():
    format = fp.BCH(fp.Affine(bits=5, axis=0), t=14, block=385)
    for share in (1e-6, 1e-4, 1e-2):
        assert loss(format, survivable(format, share)) == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("words", [3, 13, 77])
def test_check_bits_are_those_of_the_formats(words):
    found = check_bits(5 * words, 1023)
    for t in range(1, 12):
        format = fp.BCH(fp.Affine(bits=5), t=t, block=5 * words)
        assert format.check_bits(words) == found[t] + 1
    assert (np.diff(found) >= 0).all()
    assert 5 * words + found[-1] <= 1023


@pytest.mark.parametrize("ber", [1e-3, 1e-2, 5e-2])
@pytest.mark.parametrize("share", [1e-2, 1e-6])
def test_the_cheapest_keeps_the_loss_and_none_of_its_line_is_much_cheaper(ber, share):
    inner = fp.Affine(bits=5, axis=0)
    found = cheapest(inner, ber, share, words=10_000, line=128)
    assert loss(found, ber) <= share
    layout = found.layout(found.together)
    assert layout.bits <= 128
    best = min(
        (words * 5 + int(checks) + 1) / words
        for words in range(2, 26)
        for t, checks in enumerate(check_bits(5 * words, 127))
        if t and tail(words * 5 + int(checks) + 1, t, ber) <= share
    )
    assert best <= layout.bits / layout.values <= 1.07 * best


def test_no_block_is_longer_than_its_tensor():
    for words in (1, 2, 7, 40):
        found = cheapest(fp.Rounded(fp.Float32(), bits=20), 1e-3, 1e-3, words=words)
        assert found.together <= words
        stored = found.encode(torch.randn(words))
        assert stored.words.shape == (words,)


def test_more_memory_never_survives_less():
    rates = [survivable(strongest(fp.Affine(bits=5, axis=0), bits, words=10**5)) for bits in (6, 7, 8, 12, 16, 32)]
    assert all(a < b for a, b in pairwise(rates))
    assert strongest(fp.Affine(bits=5, axis=0), 5.01, words=10**5) is None


@pytest.mark.parametrize("format", [fp.BCH(fp.Affine(bits=5, axis=0), t=2, block=40), fp.SECDED(fp.Affine(bits=4))])
def test_untouched_is_how_often_a_campaign_loses_no_word(format):
    torch.manual_seed(0)
    net = torch.nn.Linear(20, 6, bias=False)
    x = torch.randn(8, 20)
    ber = 0.02
    found = fp.assess(
        net,
        [(x, net(x).argmax(dim=1))],
        format=format,
        faults=fp.BitErrorRate(ber, exact=False),
        trials=600,
        audit=0.0,
    ).trials
    share = float(((found["detected"] == 0) & (found["miscorrected"] == 0)).mean())
    expected = untouched(format, (6, 20), ber)
    assert 0.1 < expected < 0.9
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 600) ** 0.5


def test_capacity_is_shannons():
    assert capacity(0.5) == pytest.approx(0.0, abs=1e-12)
    assert capacity(0.11) == pytest.approx(0.5001, abs=1e-3)  # H(0.11) is half a bit
    for data, stored in ((5, 32), (5, 8), (11, 12)):
        assert stored * capacity(ideal_rate(data, stored)) == pytest.approx(data)
    assert np.isnan(ideal_rate(8, 7))
    with pytest.raises(ConfigError, match="bit error rate"):
        capacity(-0.1)


def test_blocks_of_512_bits_come_within_a_quarter_of_the_limit_at_one_per_cent():
    code = fp.BCH(fp.Affine(bits=5, axis=0), t=14, block=385)
    assert code.layout(code.together).bits == 512
    assert shannon_ratio(code, 1e-2) < 1.25
    assert loss(code, 1e-2) < 4e-4


def test_the_table_of_codes_fits_and_is_a_front():
    table = code_table()
    assert set(table["stored"]) >= {"float32", "bfloat16", "float16", "Q15.16", "8 bits a channel", "4 bits a channel"}
    widths = {"float32": 32, "bfloat16": 16, "float16": 16, "float8 E4M3": 8, "Q15.16": 32}
    widths |= {"8 bits a channel": 8, "4 bits a channel": 4}
    for row in table[table["format"] != ""].to_dict("records"):
        format = parse_format(row["format"])
        layout = format.layout(format.together)
        assert row["bits"] == layout.bits / layout.values <= widths[row["stored"]] * (1 + row["memory"])
        assert survivable(format) == pytest.approx(row["ber"])
    for _, group in table.groupby(["stored", "memory"]):
        assert group["data"].is_monotonic_decreasing
        assert group["ber"].is_monotonic_increasing
    assert len(set(zip(table["stored"], table["memory"], strict=True))) == 7 * 4
    assert set(table[table["format"] == ""]["stored"]) <= {"float8 E4M3", "8 bits a channel", "4 bits a channel"}
