"""Strata hold every fault once, shares are exact, and draws within them are those of the fault model."""

import struct
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import flipproof as fp
from flipproof.campaigns.populations import EDGES, FlipCounts, NeuronBits, SingleBits, huge_flips
from flipproof.faults.sampling import TrialGenerator
from flipproof.running.neurons import neuron_space
from flipproof.spaces.contract import Faults


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].bias.zero_()
        net[0].weight[0, 0] = 0.0
    return net.eval()


def slow_class(value, bit, size):
    """In plain Python: how far one flip moves a float32, in octaves of the tensor's size, and to which side."""
    word = struct.unpack("<I", struct.pack("<f", value))[0]
    flipped = struct.unpack("<f", struct.pack("<I", word ^ (1 << bit)))[0]
    change = flipped - value
    if change != change:
        return len(EDGES), False
    ratio = np.log2(abs(change) / size) if change else -np.inf
    octave = sum(edge <= ratio for edge in EDGES)
    return octave, octave > EDGES.index(0.0) and change < 0


def slow_strata(net):
    """Positions of the bits of each (tensor, octave, side)."""
    found, offset = {}, 0
    for name, parameter in net.named_parameters():
        values = parameter.detach().flatten().tolist()
        size = float(np.sqrt(np.mean(np.square(values)))) or 1.0
        for i, value in enumerate(values):
            for bit in range(32):
                found.setdefault((name, *slow_class(value, bit, size)), set()).add(offset + 32 * i + bit)
        offset += 32 * len(values)
    return found


def test_each_bit_is_in_one_stratum_as_decoded_by_hand():
    space = fp.FaultSpace(small())
    slow = slow_strata(small())
    with space.stored():
        population = SingleBits(space)
        assert population.same == 0.0
        assert sorted(round(s.share * space.bits) for s in population.strata) == sorted(map(len, slow.values()))
        for number, stratum in enumerate(population.strata):
            drawn = {
                int(population.draw(number, space, TrialGenerator(0, stratum.name, t)).positions[0]) for t in range(40)
            }
            (home,) = [bits for bits in slow.values() if drawn <= bits]
            assert len(home) == round(stratum.share * space.bits)


def test_every_bit_of_a_stratum_is_as_likely():
    space = fp.FaultSpace(small())
    with space.stored():
        population = SingleBits(space)
        number = max(range(len(population.strata)), key=lambda i: population.strata[i].share)
        drawn = Counter(
            int(population.draw(number, space, TrialGenerator(1, "x", t)).positions[0]) for t in range(4000)
        )
    size = round(population.strata[number].share * space.bits)
    assert len(drawn) == size
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-3


FORMATS = [
    None,
    fp.Float16(),
    fp.FixedPoint(),
    fp.Affine(bits=8),
    fp.SECDED(fp.Affine(bits=8)),
    fp.TripleMSB(fp.Affine(bits=8)),
]


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_shares_are_all_of_the_space_and_what_changes_nothing_changes_nothing(format):
    net = small()
    space = fp.FaultSpace(net, format=format)
    with space.stored():
        population = SingleBits(space)
        assert population.same + population.shares.sum() == pytest.approx(1, abs=1e-12)
        before = [p.detach().clone() for p in net.parameters()]
        silent = 0
        for position in range(space.bits):
            with space.corrupted(Faults(np.array([position]))):
                silent += all(torch.equal(p.detach(), was) for p, was in zip(net.parameters(), before, strict=True))
        if population.same:
            assert silent >= round(population.same * space.bits)
    if isinstance(format, fp.TripleMSB):
        assert population.same > 0


def test_neurons_by_layer_and_bit():
    net, x = small(), torch.randn(5, 3)
    batches = [(x, 5)]
    space = _neurons(net, x)
    population = NeuronBits(space)
    assert len(batches) == 1
    assert population.shares.sum() == pytest.approx(1)
    assert len(population.strata) == 2 * 32
    draw = population.draw(33, space, TrialGenerator(0, "x", 0))
    which, _, bit = space.located(draw.positions)
    assert len(draw) == 5
    assert set(bit.tolist()) == {1}
    assert set(which.tolist()) == {1}
    alone = NeuronBits(space, 30)
    assert [s.name for s in alone.strata] == ["0, bit 30", "2, bit 30"]
    assert alone.shares.tolist() == pytest.approx([4 / 6, 2 / 6])


def _neurons(net, x):
    from flipproof.running.data import read_batches

    return neuron_space(net, read_batches([(x, torch.zeros(len(x)))], torch.device("cpu")), fp.Neurons(), None, None)


@pytest.mark.parametrize("exact", [True, False])
def test_shares_of_numbers_of_huge_flips_are_those_of_plain_draws(exact):
    space = fp.FaultSpace(small())
    point = fp.BitErrorRate(0.02, exact=exact)
    with space.stored():
        up, down = huge_flips(space)
        assert {*up.tolist()} == {
            p for (_, o, side), bits in slow_strata(small()).items() for p in bits if o >= 13 and not side
        }
        population = FlipCounts(point, space, up, down, rate=point)
        count = round(0.02 * space.bits)
        plain = Counter()
        for t in range(3000):
            hit = point.draw(space, TrialGenerator(3, "plain", t)).positions
            plain[np.isin(hit, up).sum(), np.isin(hit, down).sum()] += 1
        if exact:
            for (k, j), seen in plain.items():
                chance = stats.multivariate_hypergeom.pmf(
                    [k, j, count - k - j], [up.size, down.size, space.bits - up.size - down.size], count
                )
                assert abs(seen - 3000 * chance) <= 5 * (3000 * chance) ** 0.5 + 3
        names = {(k, j): _stratum(population, k, j) for k, j in plain}
        for number, stratum in enumerate(population.strata):
            seen = sum(times for pair, times in plain.items() if names[pair] == number)
            assert abs(seen - 3000 * stratum.share) <= 4.5 * (3000 * stratum.share) ** 0.5 + 2
            if stratum.share < 1e-4:
                continue
            for t in range(5):
                hit = population.draw(number, space, TrialGenerator(4, stratum.name, t)).positions
                assert (np.diff(hit) > 0).all()
                assert _stratum(population, int(np.isin(hit, up).sum()), int(np.isin(hit, down).sum())) == number
                assert len(hit) == count or not exact


def _stratum(population, k, j):
    """By the name: '2 up, 4 to 5 down'."""

    def holds(text, n):
        parts = text.split()
        if len(parts) == 1:
            return int(parts[0]) == n
        return int(parts[0]) <= n and (parts[1] == "or" or n <= int(parts[2]))

    (found,) = [
        i
        for i, s in enumerate(population.strata)
        if holds(s.name.split(" up, ")[0], k) and holds(s.name.split(" up, ")[1].removesuffix(" down"), j)
    ]
    return found


def test_what_is_not_huge_is_as_likely_whatever_is():
    """Given the numbers, each bit of the rest is hit as often as any other."""
    space = fp.FaultSpace(small())
    point = fp.BitErrorRate(0.05)
    with space.stored():
        up, down = huge_flips(space)
        population = FlipCounts(point, space, up, down, rate=point)
        number = max(range(len(population.strata)), key=lambda i: population.strata[i].share)
        hits = np.bincount(
            np.concatenate([population.draw(number, space, TrialGenerator(5, "x", t)).positions for t in range(2000)]),
            minlength=space.bits,
        )
    rest = np.setdiff1d(np.arange(space.bits), np.concatenate([up, down]))
    assert stats.chisquare(hits[rest]).pvalue > 1e-3
