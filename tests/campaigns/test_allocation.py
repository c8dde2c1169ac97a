"""Strata are drawn from and bet on adaptively: estimates stay unbiased and intervals hold, whatever is believed."""

import sys
from pathlib import Path

import numpy as np
import pytest

from flipproof.campaigns.allocation import Belief, _two_values, allocation, stakes
from flipproof.campaigns.betting import Bets

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.rate_coverage import POPULATIONS, Seen, estimate

RUNS = 100


@pytest.mark.parametrize("name", POPULATIONS)
def test_estimates_are_unbiased_for_a_fixed_number_of_draws(name):
    population = POPULATIONS[name]
    errors = [estimate(population, seed, margin=0.2).early - population.rate for seed in range(RUNS)]
    assert abs(np.mean(errors)) <= 3 * np.std(errors) / RUNS**0.5 + 1e-12


@pytest.mark.parametrize("name", POPULATIONS)
def test_intervals_hold_where_the_margin_stops(name):
    population, runs = POPULATIONS[name], 60
    margin = 0.1 if name == "the guess lies" else 0.05  # a wrong guess costs draws
    found = [estimate(population, seed, margin=margin, confidence=0.9)[2:4] for seed in range(runs)]
    missed = sum(not low <= population.rate <= high for low, high in found)
    assert missed <= 0.1 * runs + 2.33 * (0.1 * 0.9 * runs) ** 0.5
    assert all((high - low) / 2 <= margin for low, high in found)


def test_neymans_allocation_where_only_variance_counts():
    shares, means = np.array([0.6, 0.3, 0.1]), np.array([0.5, 0.05, 0.3])
    belief = Belief(shares, np.arange(3), means)
    belief.learn(
        np.repeat(np.arange(3), 100_000), np.concatenate([np.arange(1e5) < 1e5 * m for m in means]).astype(float)
    )
    q = allocation(belief, 1e-6, 0.95)
    spread = np.sqrt(means * (1 - means))
    best = float((shares * spread).sum()) ** 2
    assert q.sum() == pytest.approx(1)
    assert float((shares**2 / q) @ spread**2) == pytest.approx(best, rel=0.01)


def test_in_proportion_to_its_share_where_nothing_was_found():
    """A small stratum of nothing needs no more than its share; no stratum gets nothing."""
    shares = np.array([0.9, 0.1])
    belief = Belief(shares, np.array([0, 0]), np.array([0.01, 0.01]))
    belief.learn(np.array([0] * 900 + [1] * 100), np.zeros(1000))
    assert allocation(belief, 0.01, 0.95) == pytest.approx(shares, rel=0.05)


def test_a_range_is_never_left():
    rng = np.random.default_rng(0)
    for _ in range(50):
        shares = rng.dirichlet(np.ones(6))
        belief = Belief(0.9 * shares, rng.integers(0, 3, 6), rng.random(6), known=0.05)
        belief.learn(rng.integers(0, 6, 40), rng.random(40))
        q = allocation(belief, 0.02, 0.95)
        weights = belief.shares / q
        below, above = belief.range(weights)
        for y in (0.0, 1.0):
            z = weights * (y - belief.means)
            assert (z >= -below - 1e-12).all()
            assert (z <= above + 1e-12).all()


def test_stakes_are_about_kellys():
    """One stratum of coin flips: against a mean d away, d / (variance + d²)."""
    belief = Belief(np.ones(1), np.zeros(1, np.int64), np.array([0.5]))
    belief.learn(np.zeros(100_000, np.int64), (np.arange(100_000) % 2).astype(float))
    less, more = stakes(belief, np.ones(1), 0.02)
    assert less == pytest.approx(0.02 / (0.25 + 0.02**2), rel=0.4)
    assert more == pytest.approx(less, rel=0.1)


def test_fewer_draws_than_uniform():
    population = POPULATIONS["like ResNet-20"]
    ours, uniform = (
        np.mean([estimate(one, seed, margin=0.004).draws for seed in range(3)])
        for one in (population, population.together)
    )
    assert 4 * ours < uniform


def test_no_worse_than_uniform_where_no_stratum_is_pure():
    """A small network: what is believed of sixty strata of all rates lags behind, and a single bettor lost by it."""
    population = POPULATIONS["sixty strata of all rates"]
    ours, uniform = (
        np.mean([estimate(one, seed, margin=0.006).draws for seed in range(4)])
        for one in (population, population.together)
    )
    assert ours < uniform


def test_bets_take_what_was_there():
    bets = Bets(0.0, 1.0)
    for k in range(30):
        bets.add(np.full(100, k / 30), within=(0.0, 1.0), stakes=[(0.1, 0.1)])
    assert len(bets) == 3000
    assert bets.mean == pytest.approx(29 / 60)


def test_two_values_have_the_mean_and_the_spread():
    rng = np.random.default_rng(0)
    mean = np.concatenate([[0.0, 1.0, 0.5, 0.5], rng.random(10_000)])
    spread = np.concatenate([[0.0, 0.0, 0.0, 0.5], np.sqrt(mean[4:] * (1 - mean[4:])) * rng.random(10_000)])
    up, down, part = _two_values(mean, spread)
    assert down.min() >= 0
    assert up.max() <= 1 + 1e-12
    assert part * up + (1 - part) * down == pytest.approx(mean)
    assert part * (up - mean) ** 2 + (1 - part) * (down - mean) ** 2 == pytest.approx(spread**2)


def test_both_ends_close_where_rare_draws_are_far_below_the_others():
    """Accuracy at a low rate: nearly always that without faults, now and then that of guessing."""
    accuracies = Seen(np.concatenate([np.full(290, 0.95), np.full(10, 0.1)]))
    found = estimate(accuracies, 0, margin=0.02, most=20_000)
    assert found.draws < 3000
