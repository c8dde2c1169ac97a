from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats
from torch import nn

import flipproof as fp
from flipproof.errors import ConfigError
from flipproof.reports import findings, summary_table
from flipproof.reports.tables import number, percent, ranges


@pytest.fixture
def assess(mlp, blobs):
    def assess(faults=None, **change):
        setup = {"data": blobs, "faults": faults or fp.BitErrorRate([1e-3, 1e-2]), "trials": 40, **change}
        return fp.assess(mlp, **setup)

    return assess


def printed(renderable, width=100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("metrics", [("accuracy",), ("auroc", "accuracy", "average_precision")])
def test_the_table_fits_and_shows_every_number(assess, metrics):
    result = assess(metrics=metrics)
    text = printed(summary_table(result, title="A title"))
    assert "A title" in text
    assert "…" not in text
    for _, row in result.summary.iterrows():
        for name in metrics:
            shown = f"{percent(row[name])} [{percent(row[f'{name}_low'])}, {percent(row[f'{name}_high'])}]"
            assert shown in text
        assert f"{int(row['trials'])}" in text


def test_rows_can_be_chosen_and_exact_points_say_so(assess):
    text = printed(summary_table(assess(fp.BitPosition(range(32))), rows=[30]))
    lines = [line for line in text.splitlines() if "exact" in line]
    assert len(lines) == 1
    assert lines[0].split()[0] == "30"


def test_one_trial_has_no_known_interval(assess):
    assert "(unknown)" in printed(summary_table(assess(trials=1)))


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1e-7, "1e-7"), (2.5e-5, "2.5e-5"), (0.05, "5e-2"), (0.5, "0.5"), (2e6, "2e6")]
)
def test_numbers_as_people_write_them(value, text):
    assert number(value) == text


def test_ranges():
    assert ranges([]) == ""
    assert ranges([3, 1, 2, 9]) == "1–3, 9"


class TestFindings:
    def test_sentences_are_true_of_the_table(self, assess):
        result = assess(trials=300)
        said = " ".join(findings(result))
        row = result.summary.iloc[1]
        assert f"Without faults accuracy is {result.golden['accuracy']:.1%} over 30 samples" in said
        assert f"{100 * row['accuracy_drop']:.1f} points" in said
        assert f"{row['critical_total']:.1%} of answers are lost" in said

    def test_too_few_trials_are_not_called_harmless(self, assess):
        said = findings(assess(fp.BitErrorRate([1e-2]), trials=2))
        assert any("2 trials cannot tell" in sentence for sentence in said)
        assert not any("stays within" in sentence for sentence in said)

    def test_a_harmless_sweep(self, blobs, mlp):
        result = fp.assess(mlp, data=blobs, faults=fp.BitPosition([0, 1]), metrics=("accuracy",))
        assert "Bits 0–1 cost less than 0.5 points each" in " ".join(findings(result))


class TestCompare:
    def test_one_row_a_campaign_and_point_and_memory_by_stored_bits(self, assess):
        rates = fp.BitErrorRate([1e-2, 5e-2])
        formats = {"base": None, "half": fp.Float16(), "byte": fp.Affine(bits=8)}
        table = fp.compare(**{name: assess(rates, format=format) for name, format in formats.items()})
        assert table["campaign"].tolist() == ["base", "base", "half", "half", "byte", "byte"]
        weights = 4 * 8 + 8 * 3
        np.testing.assert_allclose(table["memory"].unique(), [1, 0.5, (8 * weights + 32 * 11) / (32 * (weights + 11))])

    def test_the_same_draws_are_paired(self, assess):
        """Two networks hit by the same flips: the interval is of the mean difference, trial by trial."""
        base = assess(trials=300)
        result = fp.compare(base=base, same=base)
        assert result["paired"].all()
        assert (result.loc[2:, "accuracy_gain"] == 0).all()
        q = stats.binomtest(0, 300).proportion_ci(0.95).high
        np.testing.assert_allclose(result.loc[2:, "accuracy_gain_high"], q)
        np.testing.assert_allclose(result.loc[2:, "accuracy_gain_low"], -q)

    def test_paired_differences_are_students_where_they_scatter(self, blobs, mlp):
        torch.manual_seed(7)
        other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        setup = {"data": blobs, "faults": fp.BitErrorRate([2e-2]), "trials": 200}
        one, two = fp.assess(mlp, **setup), fp.assess(other, **setup)
        row = fp.compare(one=one, two=two).iloc[1]
        assert row["paired"]
        differences = two.trials["accuracy"] - one.trials["accuracy"]
        low, high = stats.t.interval(0.95, 199, loc=differences.mean(), scale=stats.sem(differences))
        assert row["accuracy_gain"] == pytest.approx(differences.mean())
        assert row["accuracy_gain_low"] == pytest.approx(low)
        assert row["accuracy_gain_high"] == pytest.approx(high)

    def test_other_draws_are_about_welch(self, assess):
        one, two = assess(trials=300), assess(trials=300, seed=9)
        row = fp.compare(one=one, two=two).iloc[3]
        assert not row["paired"]
        values = [x.trials.query("ber == 1e-2")["accuracy"] for x in (one, two)]
        welch = stats.ttest_ind(values[1], values[0], equal_var=False).confidence_interval(0.95)
        assert row["accuracy_gain_low"] == pytest.approx(welch.low, rel=0.02)
        assert row["accuracy_gain_high"] == pytest.approx(welch.high, rel=0.02)

    def test_points_that_only_one_has(self, assess):
        table = fp.compare(one=assess(fp.BitErrorRate([1e-3])), two=assess(fp.BitErrorRate([1e-2])))
        assert np.isnan(table.iloc[1]["accuracy_gain"])
        assert not table.iloc[1]["paired"]

    def test_exact_points_differ_exactly(self, assess):
        position = fp.BitPosition([30])
        row = fp.compare(full=assess(position), half=assess(fp.BitPosition([14]), format=fp.Float16())).iloc[1]
        assert np.isnan(row["accuracy_gain"])  # bit 14 is another point than bit 30
        row = fp.compare(full=assess(position), again=assess(position)).iloc[1]
        assert (row["accuracy_gain"], row["accuracy_gain_low"], row["accuracy_gain_high"]) == (0, 0, 0)

    def test_nothing_and_other_data_are_refused(self, assess, blobs):
        with pytest.raises(ConfigError, match="at least one assessment"):
            fp.compare()
        with pytest.raises(ConfigError, match="b and a cannot be compared: data differ"):
            fp.compare(a=assess(), b=assess(data=blobs[:1]))
        with pytest.raises(ConfigError, match="metrics differ"):
            fp.compare(a=assess(), b=assess(metrics=("auroc",)))


def test_a_campaign_without_trials_says_so(assess):
    full = assess()
    empty = fp.Assessment(full.header, [])
    assert findings(empty) == ["No trial has been run yet."]
