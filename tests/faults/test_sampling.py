"""The generator against a twin in plain Python, and its draws against their distributions."""

from __future__ import annotations

from hashlib import blake2b
from math import floor, log, log1p

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flipproof.errors import FaultModelError
from flipproof.faults.sampling import TrialGenerator

MASK = 2**64 - 1


class Twin:
    """splitmix64 in a counter, Lemire's method for integers, as the published algorithms are written."""

    def __init__(self, seed: int, point: str, trial: int) -> None:
        name = f"{seed}\0{point}\0{trial}".encode()
        self.key = int.from_bytes(blake2b(name, digest_size=8).digest(), "little")
        self.counter = 0

    def word(self) -> int:
        self.counter += 1
        z = (self.key + self.counter * 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def below(self, high: int, count: int) -> list[int]:
        out = []
        for _ in range(count):
            product = self.word() * high
            while (product & MASK) < 2**64 % high:
                product = self.word() * high
            out.append(product >> 64)
        return out

    def distinct(self, count: int, population: int) -> list[int]:
        if count > population // 2:
            return sorted(set(range(population)) - set(self.distinct(population - count, population)))
        chosen: set[int] = set()
        while len(chosen) < count:
            chosen |= set(self.below(population, count - len(chosen)))
        return sorted(chosen)

    def bernoulli(self, probability: float, population: int) -> list[int]:
        out, position = [], -1
        while True:
            uniform = ((self.word() >> 11) + 1) * 2.0**-53
            position += 1 + floor(log(uniform) / log1p(-probability))
            if position >= population:
                return out
            out.append(position)


NAMES = st.tuples(st.integers(0, 2**63), st.text(max_size=10), st.integers(0, 2**40))


@given(NAMES, st.integers(1, 2**62), st.integers(0, 50))
def test_integers_equal_the_twins(name, high, count):
    assert TrialGenerator(*name).below(high, count).tolist() == Twin(*name).below(high, count)


@given(NAMES, st.data())
def test_subsets_equal_the_twins(name, data):
    population = data.draw(st.integers(1, 400))
    count = data.draw(st.integers(0, population))
    assert TrialGenerator(*name).distinct(count, population).tolist() == Twin(*name).distinct(count, population)


@given(NAMES, st.floats(1e-4, 0.9), st.integers(1, 3000))
def test_independent_bits_equal_the_twins(name, probability, population):
    drawn = TrialGenerator(*name).bernoulli(probability, population)
    assert drawn.tolist() == Twin(*name).bernoulli(probability, population)


def test_draws_follow_each_other_in_one_stream():
    ours, twin = TrialGenerator(1, "p", 2), Twin(1, "p", 2)
    assert ours.below(10, 3).tolist() == twin.below(10, 3)
    assert ours.distinct(20, 50).tolist() == twin.distinct(20, 50)
    assert ours.bernoulli(0.1, 90).tolist() == twin.bernoulli(0.1, 90)


@given(st.integers(0, 300), st.data())
def test_subsets_are_sorted_distinct_and_inside(population, data):
    count = data.draw(st.integers(0, population))
    drawn = TrialGenerator(0, "p", 0).distinct(count, population)
    assert drawn.dtype == np.int64
    assert drawn.size == count
    assert (np.diff(drawn) > 0).all()
    assert count == 0 or (drawn[0] >= 0 and drawn[-1] < population)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_every_element_is_equally_likely(count):
    hits = np.zeros(10)
    for trial in range(6000):
        hits[TrialGenerator(3, "uniform", trial).distinct(count, 10)] += 1
    expected = 600 * count
    # hits of one element are Binomial(6000, count/10); negatively correlated ones make chi-square conservative
    assert stats.chisquare(hits, np.full(10, expected)).pvalue > 1e-4


def test_every_subset_is_equally_likely():
    counts: dict[tuple[int, ...], int] = {}
    for trial in range(6000):
        drawn = tuple(TrialGenerator(5, "subsets", trial).distinct(2, 5).tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 10
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_consecutive_trials_points_and_seeds_are_independent():
    draws = [TrialGenerator(seed, f"p{point}", trial).below(1000, 40)
             for seed in range(3) for point in range(3) for trial in range(30)]  # fmt: skip
    correlation = np.corrcoef(np.array(draws))
    outside = correlation[~np.eye(len(draws), dtype=bool)]
    assert abs(outside.mean()) < 0.01
    assert np.abs(outside).max() < 0.8
    assert stats.kstest(np.concatenate(draws) / 1000, "uniform").pvalue > 1e-4


@pytest.mark.parametrize(("probability", "population"), [(1e-3, 100_000), (0.3, 1000)])
def test_the_count_of_independent_bits_is_binomial(probability, population):
    counts = [TrialGenerator(1, "b", trial).bernoulli(probability, population).size for trial in range(2000)]
    expected = stats.binom(population, probability)
    assert np.mean(counts) == pytest.approx(expected.mean(), abs=5 * expected.std() / 2000**0.5)
    assert np.var(counts) == pytest.approx(expected.var(), rel=0.2)


@pytest.mark.parametrize(("probability", "expected"), [(0.0, []), (1.0, list(range(7))), (-0.0, [])])
def test_certain_bits(probability, expected):
    assert TrialGenerator(0, "p", 0).bernoulli(probability, 7).tolist() == expected
    assert TrialGenerator(0, "p", 0).bernoulli(0.5, 0).tolist() == []


def test_rates_far_below_one_bit():
    assert TrialGenerator(0, "p", 0).bernoulli(1e-300, 10**12).size == 0


@pytest.mark.parametrize(
    "call",
    [lambda: TrialGenerator(-1, "p", 0), lambda: TrialGenerator(0, "p", -1),
     lambda: TrialGenerator(0, "p", 0).distinct(4, 3), lambda: TrialGenerator(0, "p", 0).distinct(-1, 3)],
)  # fmt: skip
def test_nonsense_is_refused(call):
    with pytest.raises(FaultModelError):
        call()
