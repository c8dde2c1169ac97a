"""Intervals and sample sizes against closed forms, SciPy, brute force and simulated coverage."""

from __future__ import annotations

import sys
from math import ceil, isnan
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import flipproof as fp
from flipproof.campaigns import statistics
from flipproof.campaigns.answers import Crossed
from flipproof.campaigns.statistics import (
    _bootstrap_quantile,
    all_within,
    binomial_interval,
    difference_interval,
    half_width,
    level_at_looks,
    mean_interval,
    mean_intervals,
    tail,
    two_way_interval,
    unseen_share,
    wilson_interval,
)
from flipproof.campaigns.strata import stratified_rate
from flipproof.errors import FaultModelError

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import coverage

SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=40)


class TestSampleSize:
    @pytest.mark.parametrize(
        ("population", "expected"),
        [(100, 99), (1_000, 906), (10_000, 4_900), (1_000_000, 9_513), (10**12, 9_604)],  # 1.96² / 4e² = 9,604
    )
    def test_published_table_at_one_percent(self, population, expected):
        assert fp.sample_size(population) == expected

    @given(st.integers(1, 10**9), st.floats(0.001, 0.2), st.floats(0.5, 0.999), st.floats(0.01, 0.99))
    def test_formula(self, population, margin, confidence, p):
        t = stats.norm.ppf(0.5 + confidence / 2)
        exact = population / (1 + margin**2 * (population - 1) / (t**2 * p * (1 - p)))
        n = fp.sample_size(population, margin=margin, confidence=confidence, p=p)
        assert n in {ceil(exact), ceil(exact * (1 - 1e-12)), min(population, ceil(exact * (1 + 1e-12)))}
        assert 1 <= n <= population

    @pytest.mark.parametrize(
        "bad",
        [{"population": 0}, {"margin": 0}, {"margin": 1}, {"confidence": 1}, {"confidence": 0}, {"p": 0}, {"p": 1}],
    )
    def test_nonsense(self, bad):
        arguments = {"population": 100, **bad}
        with pytest.raises(FaultModelError, match="sample_size needs"):
            fp.sample_size(arguments.pop("population"), **arguments)


class TestWilson:
    @given(st.integers(1, 500), st.data(), st.floats(0.5, 0.999))
    def test_equals_scipy(self, n, data, confidence):
        k = data.draw(st.integers(0, n))
        expected = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
        np.testing.assert_allclose(wilson_interval(k, n, confidence=confidence), expected, atol=1e-12)

    def test_nothing_is_known_of_nothing(self):
        assert all(isnan(bound) for bound in wilson_interval(0, 0))


BELL = stats.norm.ppf((np.arange(60) + 0.5) / 60)
"""Sixty values exactly as a bell curve has them."""


class TestMean:
    @pytest.mark.parametrize("seed", range(25))
    def test_equal_values_counted_once_give_the_same_interval(self, seed, monkeypatch):
        rng = np.random.default_rng(seed)
        levels = int(rng.integers(1, 300))
        values = np.round(rng.beta(*rng.uniform(0.05, 5, 2), int(rng.integers(4096, 9000))) * levels) / levels
        if seed % 5 == 0:  # a few among many that agree
            values = np.where(np.arange(5000) < seed // 5, 0.1, 0.9)
        monkeypatch.setattr(statistics, "MANY", 4096)
        for bounds in ((0.0, 1.0), None, (0.0, np.inf)):
            few = mean_interval(values, bounds=bounds)
            monkeypatch.setattr(statistics, "MANY", 10**9)
            assert few == pytest.approx(mean_interval(values, bounds=bounds), rel=1e-11, abs=1e-13, nan_ok=True)
            monkeypatch.setattr(statistics, "MANY", 4096)

    def test_the_range_is_not_put_into_an_interval_of_trials_that_agree_nearly(self):
        """60 trials of mean 90 and SD 0.2: [84.65, 90.61] is what a share of unseen trials would make of it."""
        values = 90 + 0.2 * BELL / BELL.std(ddof=1)
        low, high = mean_interval(values, bounds=(0, 100))
        assert (low, high) == (pytest.approx(89.95, abs=0.01), pytest.approx(90.05, abs=0.01))
        students = stats.t.interval(0.95, 59, loc=90, scale=0.2 / 60**0.5)
        np.testing.assert_allclose((low, high), students, atol=0.005)

    @pytest.mark.parametrize(("n", "hits"), [(20, 2), (60, 3), (500, 10), (300, 150), (1000, 998), (20, 18)])
    @pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
    def test_two_values_are_clopper_pearson(self, n, hits, confidence):
        values = np.r_[np.ones(hits), np.zeros(n - hits)]
        exact = stats.binomtest(hits, n).proportion_ci(confidence, method="exact")
        found = mean_interval(values, confidence=confidence, bounds=(0, 1))
        np.testing.assert_allclose(found, exact, atol=2e-3 * (exact.high - exact.low))

    @given(st.integers(2, 400), st.floats(0, 1), st.floats(0.5, 0.999))
    def test_agreeing_trials_are_clopper_pearson_of_none(self, n, value, confidence):
        low, high = mean_interval([value] * n, confidence=confidence, bounds=(0, 1))
        unseen = stats.binomtest(0, n).proportion_ci(confidence, method="exact").high
        np.testing.assert_allclose((low, high), (value * (1 - unseen), value + (1 - value) * unseen), atol=1e-9)

    @given(SHARES, st.floats(0.5, 0.999))
    def test_holds_the_mean_and_stays_within_the_bounds(self, values, confidence):
        low, high = mean_interval(values, confidence=confidence, bounds=(0, 1))
        assert 0 <= low <= np.mean(values) + 1e-12
        assert np.mean(values) - 1e-12 <= high <= 1

    @given(SHARES)
    def test_bounds_follow_the_scale(self, values):
        low, high = mean_interval(values, bounds=(0, 1))
        shifted = mean_interval([2 * x - 1 for x in values], bounds=(-1, 1))
        if np.ptp(values) == 0 or np.ptp(values) > 1e-6:
            np.testing.assert_allclose(shifted, (2 * low - 1, 2 * high - 1), atol=1e-6)

    @given(SHARES)
    def test_more_confidence_is_wider(self, values):
        usual, wide = (mean_interval(values, confidence=c, bounds=(0, 1)) for c in (0.9, 0.99))
        assert wide[0] <= usual[0] + 1e-9
        assert usual[1] <= wide[1] + 1e-9

    @pytest.mark.parametrize("extra", [0.0, 2.0, 6.0])
    def test_the_quantile_is_that_of_drawn_dirichlet_weights(self, extra):
        rng = np.random.default_rng(0)
        values = rng.exponential(size=40)
        x = np.sort((values - values.mean()) / values.std())
        drawn = rng.dirichlet(np.ones(41), 100_000) @ np.r_[x, extra]
        found = _bootstrap_quantile(x[None], np.array([extra]), 1.959964)
        assert found[0] == pytest.approx(np.quantile(drawn, 0.975), abs=0.01)

    def test_many_rows_at_once_are_what_each_gives(self):
        rows = np.random.default_rng(0).beta(0.3, 3, (7, 50))
        rows[3] = 0.25
        at_once = mean_intervals(rows, bounds=(0, 1))
        np.testing.assert_allclose(at_once, [mean_interval(row, bounds=(0, 1)) for row in rows])

    @pytest.mark.parametrize("values", [[], [0.5], [0.5, float("nan")], [0.5, float("inf")]])
    def test_nothing_is_known(self, values):
        for bounds in (None, (0, 1)):
            assert all(isnan(bound) for bound in mean_interval(values, bounds=bounds))

    def test_agreeing_trials_of_an_unbounded_quantity_say_nothing(self):
        assert all(isnan(bound) for bound in mean_interval([11.33] * 9))
        low, high = mean_interval([11.33] * 9, bounds=(0, float("inf")))
        assert low < 11.33
        assert isnan(high)


def test_tail_is_what_an_unseen_share_at_the_worst_value_does():
    q = stats.binomtest(0, 500).proportion_ci(0.95, method="exact").high
    assert unseen_share(500) == pytest.approx(q)
    assert tail(0.9, 500, 0.0) == pytest.approx((1 - q) * 0.9)
    assert tail(0.1, 500, 1.0) == pytest.approx((1 - q) * 0.1 + q)
    assert isnan(tail(0.9, 500, float("nan")))
    assert unseen_share(0) == 1.0


@given(st.integers(1, 300), st.data(), st.floats(0.5, 0.999))
def test_binomial_interval_equals_scipy(n, data, confidence):
    k = data.draw(st.integers(0, n))
    low, high = binomial_interval([k], [n], confidence=confidence)
    exact = stats.binomtest(k, n).proportion_ci(confidence, method="exact")
    np.testing.assert_allclose((low[0], high[0]), exact, atol=1e-9)


def test_difference_of_two_means_is_about_welch():
    rng = np.random.default_rng(1)
    one, two = rng.normal(0.9, 0.03, 200), rng.normal(0.7, 0.1, 150)
    welch = stats.ttest_ind(one, two, equal_var=False).confidence_interval()
    ours = difference_interval(one.mean(), mean_interval(one), two.mean(), mean_interval(two))
    np.testing.assert_allclose(ours, welch, atol=0.15 * (welch.high - welch.low))


class TestTwoWay:
    def test_residual_is_that_of_an_analysis_of_variance(self):
        table = np.random.default_rng(0).integers(-1, 2, (12, 30)).astype(np.int8)
        rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0, keepdims=True) + table.mean()
        found = Crossed.of(table)
        assert found.residual == pytest.approx((rest**2).sum() / (11 * 29))
        np.testing.assert_allclose(found.trial_means, table.mean(axis=1))
        np.testing.assert_allclose(found.sample_means, table.mean(axis=0))

    def test_no_narrower_than_either_and_the_square_root_of_both(self):
        assert two_way_interval(0.5, (0.47, 0.53), (0.46, 0.54), 0.0) == pytest.approx((0.45, 0.55))
        residual = 0.03**2 / stats.norm.ppf(0.975) ** 2  # all that is between trials is residual
        assert two_way_interval(0.5, (0.47, 0.53), (0.46, 0.54), residual) == pytest.approx((0.46, 0.54))
        assert two_way_interval(0.5, (0.1, 0.53), (0.1, 0.54), 0.0, bounds=(0, 1))[0] == 0
        assert all(isnan(end) for end in two_way_interval(0.5, (float("nan"),) * 2, (0.4, 0.6), 0.0))


class TestStrata:
    def test_layers_count_as_often_as_they_should_be_drawn(self):
        """Layer a was drawn 30 times of 40 and should have been 20: the plain mean would be 0.125."""
        layers = ["a"] * 30 + ["b"] * 10
        hits = [0] * 30 + [8] * 10
        mean, low, high = stratified_rate(hits, 16, layers, {"a": 0.5, "b": 0.5})
        assert mean == 0.25
        b_low, b_high = (end[0] for end in binomial_interval([80], [160]))
        a_high = binomial_interval([0], [480])[1][0]
        assert low == pytest.approx(0.25 - 0.5 * (0.5 - b_low))
        assert high == pytest.approx(0.25 + 0.5 * ((b_high - 0.5) ** 2 + a_high**2) ** 0.5)

    def test_one_layer_is_a_binomial(self):
        found = stratified_rate([1, 0, 3, 0, 2], 10, ["a"] * 5, {"a": 1.0})
        exact = stats.binomtest(6, 50).proportion_ci(0.95, method="exact")
        assert found == pytest.approx((6 / 50, exact.low, exact.high))

    def test_few_trials_fall_back_to_a_trial_as_one_observation(self):
        layers = ["a", "b", "c", "a"]
        found = stratified_rate([1, 0, 3, 0], 10, layers, {"a": 0.4, "b": 0.3, "c": 0.3})
        assert found == (pytest.approx(0.1), *mean_interval([0.1, 0, 0.3, 0], bounds=(0, 1)))


def enough(cell, repetitions: int) -> bool:
    """Not less than 94.5 % cover, as far as so few repetitions can tell (1 in 10,000 says no by chance)."""
    inside = round(cell.inside * repetitions)
    return inside >= stats.binom(repetitions, 0.945).ppf(1e-4)


class TestCoverage:
    """A few cells of docs/results/coverage, which `make coverage` makes whole."""

    @pytest.mark.parametrize("trials", [20, 60, 300])
    @pytest.mark.parametrize("shape", coverage.SHAPES, ids=lambda shape: shape.name)
    def test_of_means(self, shape, trials):
        repetitions = 600 if trials < 300 else 200
        ours, _, _ = coverage.mean_cell(shape, trials, repetitions, seed=1)
        assert enough(ours, repetitions)

    def test_rare_fatal_trials_are_covered_on_both_sides(self):
        """n = 500, p = 0.02: the mean was below the interval in 6.5 % of the campaigns, and covered in 92.8 %."""
        ours, students, _ = coverage.mean_cell(coverage._two(0.02), 500, 600, seed=1)
        assert enough(ours, 600)
        assert ours.above <= stats.binom(600, 0.025).ppf(0.999) / 600
        assert ours.below <= stats.binom(600, 0.025).ppf(0.999) / 600
        assert students.above > ours.above

    def test_bell_curves_take_no_more_than_they_must(self):
        ours, students, _ = coverage.mean_cell(coverage.SHAPES[0], 60, 400, seed=1)
        assert ours.width < 1.1 * students.width

    def test_what_was_not_drawn_is_for_the_tail(self):
        ours, _, held = coverage.mean_cell(coverage._noisy(0.02), 60, 400, seed=1)
        assert ours.inside < 0.8
        assert held > 0.97

    @pytest.mark.parametrize(
        ("shape", "margin"), [(coverage.SHAPES[0], 0.05), (coverage._two(0.1), 0.06), (coverage._noisy(0.1), 0.05)]
    )
    def test_where_a_margin_stops(self, shape, margin):
        cell, spent = coverage.stopped_cell(shape, margin, 300, most=200, seed=1)
        assert enough(cell, 300)
        assert 20 < spent < 200

    @pytest.mark.parametrize("effects", coverage.EFFECTS, ids=lambda effects: effects.name)
    def test_over_trials_and_samples(self, effects):
        both, alone = coverage.two_way_cell(effects, 60, 100, 60, seed=1)
        assert enough(both, 60)
        if effects.name.startswith("samples"):
            assert alone.inside < 0.6

    @pytest.mark.parametrize("layers", coverage.LAYERS)
    def test_of_neuron_campaigns(self, layers):
        ours, plain, _, bias = coverage.neuron_cell(layers, 100, 32, 60, seed=1)
        assert enough(ours, 60)
        assert abs(bias) < 4
        if "different" in layers:
            assert ours.width < 0.6 * plain.width

    @pytest.mark.parametrize("paired", [True, False])
    def test_of_differences(self, paired):
        cell = coverage.difference_cell(coverage.SHAPES[11], coverage.SHAPES[6], 60, 300, paired=paired, seed=1)
        assert enough(cell, 300)


def test_levels_at_looks():
    assert level_at_looks(0.95, None) == 0.95
    assert level_at_looks(0.95, 0.01) == pytest.approx(0.97)
    assert level_at_looks(0.8, 0.01) == pytest.approx(0.88)


def test_margins():
    assert half_width((0.2, 0.6)) == pytest.approx(0.2)
    assert all_within([(0.1, 0.2), (0.4, 0.44)], 0.051)
    assert not all_within([(0.1, 0.2), (0.4, 0.6)], 0.051)
    assert not all_within([(float("nan"), float("nan"))], 0.5)
