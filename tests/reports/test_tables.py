from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats
from torch import nn

import flipproof as fp
from flipproof.campaigns.statistics import mean_interval
from flipproof.errors import ConfigError
from flipproof.reports.tables import findings, gain_text, number, percent, ranges
from flipproof.reports.terminal import summary_table
from flipproof.running.scales import Scale


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
        low, high = result.golden_interval("accuracy")
        interval = f"[{100 * low:.1f}, {100 * high:.1f}]"
        assert f"Without faults accuracy is {result.golden['accuracy']:.1%} {interval} over 30 samples" in said
        assert f"{100 * row['accuracy_drop']:.1f} points" in said
        assert f"{row['critical_total']:.1%} of answers are lost" in said
        assert "over trials and samples" in said

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

    def test_a_campaign_against_itself_is_identical_and_differs_by_nothing(self, assess, tmp_path):
        """It was ± 0.116 for 30 trials: nothing was drawn for either that the other one has not."""
        base = assess(trials=30, journal=tmp_path / "a.jsonl")
        result = fp.compare(base=base, same=fp.Assessment.load(tmp_path / "a.jsonl"), more=assess(trials=40))
        for name in ("same", "more"):
            rows = result[result["campaign"] == name]
            assert (rows["draws"] == "identical").all()
            for end in ("", "_low", "_high", "_samples_low", "_both_high"):
                assert (rows[f"accuracy_gain{end}"] == 0).all()
        text = gain_text(result.iloc[2], "accuracy", base.scale("accuracy"))
        assert text == "accuracy: no difference, it is the same campaign"

    def test_the_same_draws_of_two_networks_are_paired(self, blobs, mlp):
        torch.manual_seed(7)
        other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        setup = {"data": blobs, "faults": fp.BitErrorRate([2e-2])}
        one, two = fp.assess(mlp, **setup, trials=80), fp.assess(other, **setup, trials=60)
        row = fp.compare(one=one, two=two).iloc[1]
        assert (row["draws"], row["gain_trials"]) == ("paired", 60)
        differences = two.trials["accuracy"] - one.trials["accuracy"][:60]
        assert row["accuracy_gain"] == pytest.approx(differences.mean())
        ends = mean_interval(differences, bounds=(-1, 1))
        assert (row["accuracy_gain_low"], row["accuracy_gain_high"]) == pytest.approx(ends)
        ours, theirs = (
            np.array([code >> 2 for code in np.concatenate([*x.point(0).records.codes()])[:60]], float)
            for x in (two, one)
        )
        ends = mean_interval((ours - theirs).mean(axis=0), bounds=(-1, 1))
        assert (row["accuracy_gain_samples_low"], row["accuracy_gain_samples_high"]) == pytest.approx(ends)
        assert row["accuracy_gain_both_low"] <= min(row["accuracy_gain_low"], ends[0])

    def test_agreeing_differences_of_other_networks_are_not_certain(self, blobs, mlp):
        """Trial by trial no difference, but only in the trials that were run."""
        copy = nn.Sequential(*mlp, nn.Identity())
        faults = fp.RandomBits(1)
        table = fp.compare(one=fp.assess(mlp, data=blobs, faults=faults, trials=30),
                           two=fp.assess(copy, data=blobs, faults=faults, trials=30))  # fmt: skip
        row = table.iloc[1]
        assert (row["draws"], row["accuracy_gain"]) == ("paired", 0)
        q = stats.binomtest(0, 30).proportion_ci(0.95, method="exact").high
        assert (row["accuracy_gain_low"], row["accuracy_gain_high"]) == pytest.approx((-q, q))

    def test_other_draws_are_about_welch(self, assess):
        one, two = assess(trials=300), assess(trials=300, seed=9)
        row = fp.compare(one=one, two=two).iloc[3]
        assert row["draws"] == "independent"
        values = [x.trials.query("ber == 1e-2")["accuracy"] for x in (one, two)]
        welch = stats.ttest_ind(values[1], values[0], equal_var=False).confidence_interval(0.95)
        width = welch.high - welch.low
        assert row["accuracy_gain_low"] == pytest.approx(welch.low, abs=0.15 * width)
        assert row["accuracy_gain_high"] == pytest.approx(welch.high, abs=0.15 * width)

    def test_a_side_without_flips_is_named_and_makes_nobody_certain(self, assess):
        """It was [-0.065, -0.065], or [nan, nan]: the rate rounds to no flip in the smaller space only."""
        rate = fp.BitErrorRate([2.6e-4])  # 0.56 flips of 2,144 bits, 0.28 of half as many
        with pytest.warns(fp.FlipproofWarning):
            none = assess(rate, format=fp.Float16())
        some = assess(rate)
        assert (none.summary["flips"][0], some.summary["flips"][0]) == (0, 1)
        for first, second, name in (({"none": none}, {"some": some}, "none"), ({"some": some}, {"none": none}, "none")):
            row = fp.compare(**first, **second).iloc[1]
            assert (row["draws"], row["fault_free"]) == ("independent", name)
            low, high = row["accuracy_gain_low"], row["accuracy_gain_high"]
            width = some.summary["accuracy_high"][0] - some.summary["accuracy_low"][0]
            assert high - low == pytest.approx(width)
            assert "no bit is flipped in none" in gain_text(row, "accuracy", some.scale("accuracy"))
        assert "(no flips)" in printed(summary_table(none))
        assert "At BER 2.6e-4 no bit is flipped" in " ".join(findings(none))

    def test_neuron_campaigns_are_paired_upset_by_upset(self, blobs, mlp):
        torch.manual_seed(7)
        other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        setup = {"data": blobs, "faults": fp.RandomBits(1), "where": fp.Neurons(), "trials": 60}
        one, two = fp.assess(mlp, **setup), fp.assess(other, **setup)
        row = fp.compare(one=one, two=two).iloc[1]
        assert row["draws"] == "paired"
        for name in ("accuracy", "critical_total"):
            difference = two.summary[name][0] - one.summary[name][0]
            assert row[f"{name}_gain"] == pytest.approx(difference)
            assert row[f"{name}_gain_low"] < difference < row[f"{name}_gain_high"]

    def test_points_that_only_one_has(self, assess):
        table = fp.compare(one=assess(fp.BitErrorRate([1e-3])), two=assess(fp.BitErrorRate([1e-2])))
        assert np.isnan(table.iloc[1]["accuracy_gain"])
        assert table.iloc[1]["draws"] == "none"
        assert gain_text(table.iloc[1], "accuracy", Scale("%")) == "the first campaign has no such point"

    def test_exact_points_differ_exactly_for_these_samples(self, assess, blobs, mlp):
        position = fp.BitPosition([30])
        row = fp.compare(full=assess(position), half=assess(fp.BitPosition([14]), format=fp.Float16())).iloc[1]
        assert np.isnan(row["accuracy_gain"])  # bit 14 is another point than bit 30
        assert row["draws"] == "none"
        row = fp.compare(full=assess(position), again=assess(position)).iloc[1]
        assert (row["accuracy_gain"], row["accuracy_gain_low"], row["accuracy_gain_high"]) == (0, 0, 0)
        other = fp.assess(nn.Sequential(*mlp, nn.Identity()), data=blobs, faults=fp.BitPosition([29]))
        row = fp.compare(full=assess(fp.BitPosition([29])), other=other).iloc[1]
        assert (row["draws"], row["accuracy_gain_low"], row["accuracy_gain_high"]) == ("exact", 0, 0)
        assert row["accuracy_gain_samples_low"] < 0 < row["accuracy_gain_samples_high"]

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


def perplexity(outputs, targets):
    return torch.exp(nn.functional.cross_entropy(outputs.double(), targets))


class TestOtherMetrics:
    """Perplexity 11.33 was "1133.44%", infinity made "−inf points [nan, nan]"."""

    PERPLEXITY = fp.Metric(perplexity, range=(1, None), higher_is_better=False)

    @pytest.mark.parametrize("metric", [perplexity, PERPLEXITY, fp.Metric(perplexity, unit="nats")])
    def test_it_is_no_percentage(self, assess, tmp_path, metric):
        result = assess(fp.BitErrorRate([1e-3, 1e-2, 1e-1]), metrics=[metric, "accuracy"], journal=tmp_path / "a.jsonl")
        for found in (result, fp.Assessment.load(tmp_path / "a.jsonl")):  # the journal keeps what it means
            said, shown = " ".join(findings(found)), printed(summary_table(found))
            golden = f"{found.golden['perplexity']:.4g}"
            unit = " nats" if found.scale("perplexity").unit else ""
            assert f"Without faults perplexity is {golden}{unit} over" in said
            assert "perplexity %" not in shown
            for text in (said, shown):
                assert "nan" not in text.lower()
                assert "inf points" not in text
            assert not np.isfinite(found.summary["perplexity"]).all()
            assert "is not finite in" in said
            assert "∞" in shown or "–" in shown
        page = fp.report(tmp_path / "page.html", a=result, b=assess(metrics=[metric, "accuracy"])).read_text("utf-8")
        assert "nan points" not in page
        assert "nan]" not in page
        assert golden in page

    def test_less_is_better_rises(self, assess):
        result = assess(fp.BitErrorRate([1e-2]), metrics=[self.PERPLEXITY], seed=5, format=fp.FixedPoint(4, 11))
        row = result.summary.iloc[0]
        assert row["perplexity"] > result.golden["perplexity"]
        assert "it measurably rises: by " in " ".join(findings(result))
        assert row["perplexity_drop"] < 0
        assert "rise" in printed(summary_table(result))
        assert np.isnan(row["perplexity_tail"])  # there is no worst perplexity

    def test_a_bare_function_has_no_direction_and_no_bounds(self, assess):
        result = assess(fp.BitErrorRate([1e-2]), metrics=[perplexity], seed=5, format=fp.FixedPoint(4, 11))
        assert "− mean" in printed(summary_table(result))
        said = " ".join(findings(result))
        assert "the difference is -" in said or "it measurably changes: by -" in said
        for word in ("drop", "falls", "rises"):
            assert word not in said
        assert np.isnan(result.summary["perplexity_tail"][0])

    def test_a_bounded_metric_stays_within_its_range(self, assess):
        """A user's accuracy got [0.886, 1.039]."""

        def own(outputs, targets):
            return (outputs.argmax(dim=1) == targets).double().mean()

        metric = fp.Metric(own, unit="%", range=(0, 1))
        result = assess(fp.BitErrorRate([1e-3, 1e-2]), metrics=[metric, "accuracy"], trials=5)
        for _, row in result.summary.iterrows():
            assert 0 <= row["own_low"] <= row["own_high"] <= 1
            for end in ("", "_low", "_high", "_tail", "_drop"):
                assert row[f"own{end}"] == row[f"accuracy{end}"]

    def test_gains_without_points(self, assess):
        scale = self.PERPLEXITY.scale
        one = assess(metrics=[self.PERPLEXITY], format=fp.FixedPoint(4, 11))
        two = assess(metrics=[self.PERPLEXITY], format=fp.FixedPoint(4, 11), seed=4)
        text = gain_text(fp.compare(one=one, two=two).iloc[3], "perplexity", scale)
        assert text.startswith("perplexity changes by ")
        assert "points" not in text
        broken = {"draws": "paired", "fault_free": "", "a_gain": float("nan"), "a_gain_low": float("nan")}
        assert "not finite" in gain_text(broken, "a", scale)


@pytest.mark.parametrize("name", ["[bold]x", "[/]", "$x_1$", "<b>", "a[b]c"])
def test_names_are_printed_as_they_are(assess, name):
    assert name in printed(summary_table(assess(), title=name))


def test_findings_say_how_stored_words_were_read():
    torch.manual_seed(0)
    net = torch.nn.Linear(16, 4, bias=False)
    x = torch.randn(40, 16)
    found = fp.assess(
        net,
        [(x, net(x).argmax(dim=1))],
        format=fp.SECDED(fp.Float16()),
        faults=fp.BitErrorRate([1e-3, 2e-2]),
        trials=20,
    )
    last = found.summary.iloc[-1]
    assert findings(found)[-1] == (
        f"At BER 2e-2 a trial hits {last['corrected'] + last['detected'] + last['miscorrected']:,.1f} stored words: "
        f"{last['corrected']:,.1f} read as without faults, {last['detected']:,.1f} are known to be lost, "
        f"{last['miscorrected']:,.1f} read as another value, and nothing notices."
    )
    plain = fp.assess(net, [(x, net(x).argmax(dim=1))], faults=fp.BitErrorRate(2e-2), trials=5)
    assert not any("stored words" in sentence for sentence in findings(plain))
