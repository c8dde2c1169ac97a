from __future__ import annotations

from itertools import pairwise
from math import comb

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import flipproof as fp
from flipproof.errors import FaultModelError, FlipproofWarning
from flipproof.faults import TrialGenerator
from flipproof.spaces.parameters import FaultSpace
from flipproof.testing import FaultModelContract


class TestExactRate(FaultModelContract):
    model = fp.BitErrorRate([1e-3, 1e-2, 0.4])


class TestIndependentRate(FaultModelContract):
    model = fp.BitErrorRate([1e-2, 0.4], exact=False)


class TestRateOverLayers(FaultModelContract):
    model = fp.BitErrorRate([1e-3, 0.3], spread="layers")


class TestRateOverLayersIndependent(FaultModelContract):
    model = fp.BitErrorRate([1e-2], spread="layers", exact=False)


class TestNestedRate(FaultModelContract):
    model = fp.BitErrorRate([1e-3, 1e-2, 0.4, 0.7], nested=True)


class TestNestedRateIndependent(FaultModelContract):
    model = fp.BitErrorRate([1e-2, 0.4, 0.7], exact=False, nested=True)


class TestBitPosition(FaultModelContract):
    model = fp.BitPosition([0, 30, 31])


class TestBitPositionOfAShare(FaultModelContract):
    model = fp.BitPosition([0, 30, 31], share=0.3)


class TestRandomBits(FaultModelContract):
    model = fp.RandomBits([1, 17])


class TestStuckAtOne(FaultModelContract):
    model = fp.StuckAt([1e-2, 0.3], value=1)


class TestStuckAtZero(FaultModelContract):
    model = fp.StuckAt([1e-2], value=0, exact=False)


def draw(model, space, trial=0):
    return model.draw(space, TrialGenerator(0, model.stream, trial))


@pytest.fixture
def uneven() -> FaultSpace:
    """A layer of 32,000 bits and one of 320."""
    return FaultSpace(nn.Sequential(nn.Linear(100, 10, bias=False), nn.Linear(10, 1, bias=False)))


@pytest.mark.parametrize(("ber", "count"), [(1e-3, 32), (1e-4, 3), (0.0, 0), (1.0, 32_320)])
def test_the_count_is_taken_over_the_whole_space(uneven, ber, count):
    """Existing tools floor it per layer or tensor, so that small layers are never hit."""
    assert len(draw(fp.BitErrorRate(ber), uneven)) == count


def test_small_layers_are_hit_as_their_bits_deserve(uneven):
    model = fp.BitErrorRate(1e-3)
    hits = sum(int((draw(model, uneven, trial).positions >= 32_000).sum()) for trial in range(2000))
    expected = stats.hypergeom(32_320, 320, 32)
    assert hits == pytest.approx(2000 * expected.mean(), abs=5 * (2000 * expected.var()) ** 0.5)


def test_spread_over_layers_hits_each_layer_equally(uneven):
    model = fp.BitErrorRate(1e-3, spread="layers")
    hits = np.array([(draw(model, uneven, trial).positions >= 32_000).sum() for trial in range(500)])
    expected = stats.binom(32, 0.5)
    assert hits.mean() == pytest.approx(expected.mean(), abs=5 * expected.std() / 500**0.5)


def test_spread_over_layers_passes_over_full_layers(uneven):
    faults = draw(fp.BitErrorRate(0.9, spread="layers"), uneven)
    assert len(faults) == round(0.9 * 32_320)
    assert (faults.positions >= 32_000).sum() == 320


def test_flips_of_one_draw_are_distinct_however_dense():
    """A bit that is drawn twice would cancel out."""
    space = FaultSpace(nn.Linear(3, 1))
    for trial in range(50):
        positions = draw(fp.BitErrorRate(0.45), space, trial).positions
        assert len(set(positions.tolist())) == positions.size == round(0.45 * space.bits)


@pytest.mark.parametrize("exact", [True, False])
def test_flips_of_a_lower_nested_rate_are_among_those_of_a_higher_one(uneven, exact):
    rates = [0.0, 1e-4, 1e-3, 0.02, 0.3, 0.499, 0.501, 0.75, 0.9, 1.0]
    for trial in range(20):
        drawn = [draw(fp.BitErrorRate(rate, exact, nested=True), uneven, trial).positions for rate in rates]
        for fewer, more in pairwise(drawn):
            assert np.isin(fewer, more).all()
        assert (len(drawn[0]), len(drawn[-1])) == (0, uneven.bits)
        if exact:
            assert [len(each) for each in drawn] == [round(rate * uneven.bits) for rate in rates]


def test_a_nested_rate_draws_every_subset_equally_often():
    space = FaultSpace(nn.Linear(1, 1, bias=False), format=fp.FixedPoint(integer_bits=2, fraction_bits=2))
    bits = space.bits
    for count in range(1, bits):
        model, draws = fp.BitErrorRate(count / bits, nested=True), 3000
        found: dict[bytes, int] = {}
        for trial in range(draws):
            key = draw(model, space, trial).positions.tobytes()
            found[key] = found.get(key, 0) + 1
        subsets = comb(bits, count)
        seen = np.array([*found.values(), *[0] * (subsets - len(found))])
        assert stats.chisquare(seen).pvalue > 1e-4, count


@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3, 0.7])
def test_a_nested_independent_rate_hits_a_binomial_number_of_bits(uneven, rate):
    model, trials = fp.BitErrorRate(rate, exact=False, nested=True), 800
    counts = np.array([len(draw(model, uneven, trial)) for trial in range(trials)])
    of = stats.binom(uneven.bits, rate)
    assert counts.mean() == pytest.approx(of.mean(), abs=4.5 * of.std() / trials**0.5)
    # the population's fourth moment gives the error of the variance
    error = of.var() * ((2 + of.stats("k")) / trials) ** 0.5
    assert counts.var() == pytest.approx(of.var(), abs=4.5 * error)
    assert (
        abs(
            stats.kstest(of.cdf(counts) - of.pmf(counts) * np.random.default_rng(0).random(trials), "uniform").statistic
        )
        < 0.05
    )


def test_only_nested_rates_share_their_random_numbers():
    assert len({point.stream for point in fp.BitErrorRate([1e-3, 1e-2], nested=True).points()}) == 1
    assert len({point.stream for point in fp.BitErrorRate([1e-3, 1e-2]).points()}) == 2
    assert fp.BitErrorRate(1e-3).stream == "BitErrorRate(ber=0.001, exact=True, spread='bits')"  # as ever


@pytest.mark.parametrize("given", [{"nested": True, "spread": "layers"}, {"nested": 2}, {"nested": "yes"}])
def test_nested_nonsense_is_refused(given):
    with pytest.raises(FaultModelError, match="nested"):
        fp.BitErrorRate(1e-3, **given)


def test_bit_position_takes_that_bit_of_every_value_and_skips_narrow_ones():
    net = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    space = FaultSpace(net, format={"0": fp.Float16(), "1": fp.Float32()})
    table = space.locate(draw(fp.BitPosition(20), space))
    assert list(zip(table["site"], table["value"], table["bit"], strict=True)) == [
        ("1.weight", 0, 20),
        ("1.bias", 0, 20),
    ]
    with pytest.raises(FaultModelError, match="widest stored value has 32 bits"):
        fp.BitPosition(32).check(space)


@pytest.mark.parametrize("value", [0, 1])
def test_stuck_cells_read_their_value_and_come_back_from_saved_words(value):
    """A second XOR would set cells that already held the value."""
    net = nn.Linear(8, 8)
    space = FaultSpace(net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    faults = draw(fp.StuckAt(0.2, value=value), space)
    places = space.locate(faults)
    held = 0
    with space.corrupted(faults) as changed:
        for site, index, bit in zip(places["site"], places["value"], places["bit"], strict=True):
            word = net.get_parameter(site).detach().view(torch.int32).view(-1)[index].item()
            assert (word >> bit) & 1 == value
            old = before[site].view(torch.int32).view(-1)[index].item()
            held += (old >> bit) & 1 == value
    assert 0 < held < len(faults)
    assert changed == len(faults) - held
    for name, p in net.named_parameters():
        assert torch.equal(p.view(torch.int32), before[name].view(torch.int32))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fp.BitErrorRate(1.5), r"ber must be a rate in \[0, 1\], got 1.5"),
        (lambda: fp.BitErrorRate(-1e-9), "got -1e-09"),
        (lambda: fp.BitErrorRate(float("nan")), "got nan"),
        (lambda: fp.BitErrorRate("1e-3"), "got '1e-3'"),
        (lambda: fp.BitErrorRate([]), "empty sweep"),
        (lambda: fp.BitErrorRate([1e-3, 0.001]), "names a point twice"),
        (lambda: fp.BitErrorRate(True), "got True"),
        (lambda: fp.BitErrorRate(1e-3, spread="rows"), "spread must be 'bits' or 'layers', got 'rows'"),
        (lambda: fp.BitPosition(-1), "got -1"),
        (lambda: fp.BitPosition(1, share=0.0), "share"),
        (lambda: fp.BitPosition(1, share=True), "share"),
        (lambda: fp.BitPosition(1.5), "got 1.5"),
        (lambda: fp.RandomBits(-1), "got -1"),
        (lambda: fp.StuckAt(1e-3, value=2), "value must be 0 or 1, got 2"),
    ],
)
def test_nonsense_is_refused(build, message):
    with pytest.raises(FaultModelError, match=message):
        build()


def test_more_bits_than_there_are():
    with pytest.raises(FaultModelError, match="only 96 bits"):
        fp.RandomBits(97).check(FaultSpace(nn.Linear(2, 1)))


def test_a_rate_that_rounds_to_no_flip_warns_and_says_the_expected_number():
    space = FaultSpace(nn.Linear(2, 1))
    for model in (fp.BitErrorRate(1e-3), fp.StuckAt(1e-3)):
        with pytest.warns(FlipproofWarning, match=r"0\.001 × 96 bits = 0\.096 expected flips, which rounds to 0"):
            model.check(space)
    fp.BitErrorRate(1e-3, exact=False).check(space)  # draws 0, 1, … flips: nothing to warn of
    fp.BitErrorRate(0.0).check(space)
