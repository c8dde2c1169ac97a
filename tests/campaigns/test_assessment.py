from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import flipproof as fp
from flipproof.campaigns.statistics import mean_interval, wilson_interval
from flipproof.campaigns.strata import stratified_rate
from flipproof.errors import ConfigError
from flipproof.running.scales import OUTCOMES


@pytest.fixture
def result(mlp, blobs):
    return fp.assess(mlp, data=blobs, faults=fp.BitErrorRate([2e-3, 2e-2]), trials=25, metrics=("accuracy", "auroc"))


def test_columns(result):
    assert list(result.trials) == [
        "point", "ber", "trial", "faults", "flips", "accuracy", "auroc", "masked", "non_critical_sdc", "critical_sdc",
        "due", "corrected", "detected", "miscorrected", "samples", "seconds", "digest", "error", "audited",
    ]  # fmt: skip
    numbers = ("accuracy", "auroc", "accuracy_drop", "auroc_drop", *OUTCOMES, "critical_total")
    ends = ("", "_low", "_high", "_samples_low", "_samples_high", "_both_low", "_both_high")
    tails = ("accuracy_tail", "auroc_tail", "critical_total_tail")
    expected = ["point", "ber", "trials", "flips", *tails, *(f"{name}{end}" for name in numbers for end in ends)]
    words = ("corrected", "detected", "miscorrected")
    assert sorted(result.summary) == sorted([*expected, *words, "audited", "coverage"])
    assert list(result.summary)[-5:] == ["flips", *words, "audited", "coverage"][-5:]


def test_summary_is_means_and_intervals_over_trials(result):
    q = stats.binomtest(0, 25).proportion_ci(0.95, method="exact").high
    for point, row in result.summary.iterrows():
        trials = result.trials.query(f"point == {point}")
        assert (row["trials"], row["flips"]) == (25, trials["flips"].mean())
        for name in ("accuracy", "auroc"):
            mean = trials[name].mean()
            assert row[name] == pytest.approx(mean)
            assert (row[f"{name}_low"], row[f"{name}_high"]) == mean_interval(trials[name], bounds=(0, 1))
            assert row[f"{name}_tail"] == pytest.approx((1 - q) * mean)
            assert row[f"{name}_drop"] == pytest.approx(result.golden[name] - mean)
            assert row[f"{name}_drop_low"] == pytest.approx(result.golden[name] - row[f"{name}_high"])
        shares = trials[list(OUTCOMES)].div(trials["samples"], axis=0)
        assert row[list(shares)].sum() == pytest.approx(1)
        np.testing.assert_allclose(row[list(shares)].to_numpy(float), shares.mean())
        total = shares["critical_sdc"] + shares["due"]
        assert row["critical_total"] == pytest.approx(total.mean())
        ends = (row["critical_total_low"], row["critical_total_high"])
        assert ends == pytest.approx(mean_interval(total, bounds=(0, 1)))
        assert row["critical_total_tail"] == pytest.approx((1 - q) * total.mean() + q)


def test_steps_of_nested_rates_are_of_paired_differences(mlp, blobs):
    rates = [1e-3, 2e-3, 5e-3]
    found = fp.assess(mlp, data=blobs, faults=fp.BitErrorRate(rates, nested=True), trials=40)
    assert found.steps[["point", "ber_before", "ber", "draws", "trials"]].values.tolist() == [
        [1, 1e-3, 2e-3, "paired", 40],
        [2, 2e-3, 5e-3, "paired", 40],
    ]
    by_trial = found.trials.pivot(index="trial", columns="point", values="accuracy")
    for _, row in found.steps.iterrows():
        differences = by_trial[row["point"]] - by_trial[row["point"] - 1]
        assert row["accuracy_step"] == pytest.approx(differences.mean())
        ends = mean_interval(differences, bounds=(-1, 1))
        assert (row["accuracy_step_low"], row["accuracy_step_high"]) == pytest.approx(ends)


def test_steps_of_other_rates_are_of_two_means(result):
    (row,) = (row for _, row in result.steps.iterrows())
    assert (row["draws"], row["ber_before"], row["ber"]) == ("independent", 2e-3, 2e-2)
    means = result.summary["accuracy"]
    assert row["accuracy_step"] == pytest.approx(means[1] - means[0])
    low, high = result.summary["accuracy_low"], result.summary["accuracy_high"]
    assert row["accuracy_step_low"] < means[1] - means[0] < row["accuracy_step_high"]
    assert row["accuracy_step_low"] > low[1] - high[0]
    assert len(fp.Assessment(result.header, result.records[:5]).steps) == 0


def test_nested_rates_survive_journal_and_extension(mlp, blobs, tmp_path):
    """A rate's trials are the same whatever other rates are in the sweep."""
    setup = {"data": blobs, "trials": 10, "seed": 3}
    path = tmp_path / "nested.jsonl"
    few = fp.assess(mlp, faults=fp.BitErrorRate([1e-3, 5e-3], nested=True), journal=path, **setup)
    more = fp.assess(mlp, faults=fp.BitErrorRate([1e-3, 2e-3, 5e-3], nested=True), journal=path, **setup)
    alone = fp.assess(mlp, faults=fp.BitErrorRate(5e-3, nested=True), **setup)
    digests = [r.trials.query("ber == 0.005")["digest"].tolist() for r in (few, more, alone)]
    assert digests[0] == digests[1] == digests[2]
    assert fp.Assessment.load(path).steps.equals(more.steps)
    assert set(more.steps["draws"]) == {"paired"}


def test_a_rare_fatal_trial_is_in_the_tail_and_not_in_every_interval(mlp, blobs):
    """60 trials around 0.9 with an SD of 0.002: what a fatal one could do is not in their interval but in the tail."""
    base = fp.assess(mlp, data=blobs, faults=fp.RandomBits(1), trials=60)
    bell = stats.norm.ppf((np.arange(60) + 0.5) / 60)
    values = (0.9 + 0.002 * bell / bell.std(ddof=1)).tolist()
    records = [replace(r, metrics={"accuracy": v}) for r, v in zip(base.records, values, strict=True)]
    row = fp.Assessment(base.header, records).summary.iloc[0]
    assert row["accuracy_low"] == pytest.approx(0.8995, abs=1e-4)
    assert row["accuracy_high"] == pytest.approx(0.9005, abs=1e-4)
    assert row["accuracy_tail"] == pytest.approx(0.9 * 0.025 ** (1 / 60))


class TestOverSamples:
    def table(self, assessment, point, of):
        codes = np.concatenate([*assessment.point(point).records.codes()])
        return np.array([of(code) for code in codes], float)

    def test_intervals_are_of_the_answers_in_the_records(self, result):
        for point, row in result.summary.iterrows():
            right = self.table(result, point, lambda code: code >> 2)
            np.testing.assert_allclose(right.mean(axis=1), result.trials.query(f"point == {point}")["accuracy"])
            over_samples = mean_interval(right.mean(axis=0), bounds=(0, 1))
            assert (row["accuracy_samples_low"], row["accuracy_samples_high"]) == pytest.approx(over_samples)
            assert row["accuracy_both_low"] <= min(row["accuracy_low"], row["accuracy_samples_low"])
            assert row["accuracy_both_high"] >= max(row["accuracy_high"], row["accuracy_samples_high"])
            lost = self.table(result, point, lambda code: (code & 3) >= 2)
            over_samples = mean_interval(lost.mean(axis=0), bounds=(0, 1))
            assert (row["critical_total_samples_low"], row["critical_total_samples_high"]) == pytest.approx(
                over_samples
            )

    def test_a_drop_is_paired_by_sample(self, result):
        """What the network gets wrong without faults is no news: the drop is of the difference of each sample."""
        before = result.point(0).golden.astype(float)
        gone = before - self.table(result, 0, lambda code: code >> 2).mean(axis=0)
        row = result.summary.iloc[0]
        ends = (row["accuracy_drop_samples_low"], row["accuracy_drop_samples_high"])
        assert ends == pytest.approx(mean_interval(gone, bounds=(-1, 1)))
        assert before.mean() == pytest.approx(result.golden["accuracy"])

    def test_no_flips_lose_nothing_on_any_sample(self, mlp, blobs):
        row = fp.assess(mlp, data=blobs, faults=fp.BitErrorRate(0.0), trials=5).summary.iloc[0]
        for end in ("low", "high", "samples_low", "samples_high", "both_low", "both_high"):
            assert row[f"critical_total_{end}"] == 0
            assert row[f"accuracy_drop_{end}"] == 0
        assert row["accuracy_both_low"] < row["accuracy"] < row["accuracy_both_high"]
        assert row["accuracy_tail"] == row["accuracy"]

    def test_other_metrics_say_that_nothing_is_known(self, result):
        assert result.summary[["auroc_samples_low", "auroc_both_high"]].isna().all(axis=None)

    def test_golden_accuracy_is_wilsons_over_samples(self, result):
        right = round(30 * result.golden["accuracy"])
        assert result.golden_interval("accuracy") == pytest.approx(wilson_interval(right, 30))
        low, high = result.golden_interval("auroc")
        assert 0.5 < low < result.golden["auroc"] < high < 1
        with pytest.raises(ConfigError, match="no metric 'f1'"):
            result.golden_interval("f1")

    def test_a_journal_without_answers_is_read_and_says_unknown(self, mlp, blobs, tmp_path):
        journal = tmp_path / "old.jsonl"
        result = fp.assess(mlp, data=blobs, faults=fp.BitErrorRate(2e-2), trials=9, journal=journal)
        new = ("answers", "layer", "golden_answers", "golden_intervals", "metrics")
        lines = [result.header.to_json() | {"flipproof_journal": 1}, *(record.to_json() for record in result.records)]
        old = [
            json.dumps(
                {key: value for key, value in line.items() if key not in new or (key == "metrics" and "point" in line)}
            )
            for line in lines
        ]
        journal.write_text("\n".join(old) + "\n")
        row, expected = fp.Assessment.load(journal).summary.iloc[0], result.summary.iloc[0]
        assert (row["accuracy_low"], row["accuracy_high"]) == (expected["accuracy_low"], expected["accuracy_high"])
        assert np.isnan(row["accuracy_samples_low"])
        assert np.isnan(row["critical_total_both_high"])


class TestNeurons:
    @pytest.fixture
    def result(self, mlp, blobs):
        return fp.assess(mlp, data=blobs, faults=fp.RandomBits(1), where=fp.Neurons(), trials=60, seed=2)

    def test_rates_are_stratified_by_layer(self, result):
        shares = {"0": 8 / 11, "2": 3 / 11}
        assert {record.layer for record in result.records} == set(shares)
        assert all(place[0] == record.layer for record in result.records for place in record.where)
        hits = result.trials["critical_sdc"] + result.trials["due"]
        layers = [record.layer for record in result.records]
        row = result.summary.iloc[0]
        found = (row["critical_total"], row["critical_total_low"], row["critical_total_high"])
        assert found == pytest.approx(stratified_rate(hits, 30, layers, shares))
        by_layer = (hits / 30).groupby(layers).mean()
        assert row["critical_total"] == pytest.approx(sum(share * by_layer[name] for name, share in shares.items()))
        assert row["accuracy"] == pytest.approx(result.golden["accuracy"] - row["accuracy_drop"])

    def test_it_holds_the_rate_of_every_single_upset(self, mlp, blobs, result):
        """All (neuron, bit) of all samples, flipped one by one by hand."""
        x = torch.cat([inputs for inputs, _ in blobs])
        with torch.no_grad():
            golden = mlp(x).argmax(dim=1)
            first = mlp[0](x)
            lost = []
            for bit in range(32):
                mask = torch.tensor(-(2**31) if bit == 31 else 2**bit, dtype=torch.int32)
                for layer, clean, rest in ((8, first, mlp[1:]), (3, mlp(x), torch.nn.Identity())):
                    for neuron in range(layer):
                        faulty = clean.clone()
                        faulty[:, neuron] = (clean[:, neuron].contiguous().view(torch.int32) ^ mask).view(torch.float32)
                        out = rest(faulty)
                        lost.append((out.argmax(dim=1) != golden) | out.isnan().any(dim=1))
        truth = float(torch.stack(lost).float().mean())
        row = result.summary.iloc[0]
        assert row["critical_total_low"] <= truth <= row["critical_total_high"]


def test_confidence_widens_intervals(mlp, blobs):
    setup = {"data": blobs, "faults": fp.BitErrorRate(2e-2), "trials": 25}
    wide, usual = (fp.assess(mlp, **setup, confidence=c).summary.iloc[0] for c in (0.99, 0.95))
    assert wide["accuracy_low"] < usual["accuracy_low"] < usual["accuracy_high"] < wide["accuracy_high"]


@pytest.mark.parametrize("table", ["trials", "summary"])
def test_csv_and_parquet_bring_every_number_back(result, tmp_path, table):
    expected = getattr(result, table)
    written = result.to_csv(tmp_path / "new" / "table.csv", table=table)
    read = pd.read_csv(written, dtype={"digest": str})
    pd.testing.assert_frame_equal(read, expected, check_exact=True, check_dtype=False, check_column_type=False)
    pytest.importorskip("pyarrow")
    read = pd.read_parquet(result.to_parquet(tmp_path / "table.parquet", table=table))
    pd.testing.assert_frame_equal(read, expected, check_exact=True, check_dtype=False)


def test_a_table_is_compressed_by_its_ending_and_written_whole_or_not_at_all(result, tmp_path):
    written = result.to_csv(tmp_path / "table.csv.gz")
    assert written.read_bytes()[:2] == b"\x1f\x8b"
    assert len(pd.read_csv(written)) == len(result.trials)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match=r"cannot write .*table\.csv"):
        result.to_csv(tmp_path / "file" / "table.csv")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "table.csv.gz"]


def test_other_tables_are_refused(result, tmp_path):
    with pytest.raises(ConfigError, match="'trials' or 'summary', got 'trial'"):
        result.to_csv(tmp_path / "table.csv", table="trial")


def test_an_unfinished_journal_has_tables_too(mlp, blobs, tmp_path):
    calls = iter(range(100))

    def stop(outputs, targets):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return 1.0

    journal = tmp_path / "journal.jsonl"
    for expected in (3, 3):
        with pytest.raises(KeyboardInterrupt):
            fp.assess(mlp, data=blobs, faults=fp.RandomBits([1, 2]), trials=5, metrics=stop, journal=journal)
        loaded = fp.Assessment.load(journal)
        assert len(loaded.trials) == expected
        assert loaded.summary["trials"].tolist() == [expected]
        calls = iter(range(4, 100))


def test_no_trial_yet_gives_empty_tables(mlp, blobs, tmp_path):
    def stop(outputs, targets):
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return 1.0

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        fp.assess(mlp, data=blobs, faults=fp.RandomBits(1), metrics=stop, journal=tmp_path / "journal.jsonl")
    loaded = fp.Assessment.load(tmp_path / "journal.jsonl")
    assert len(loaded.trials) == len(loaded.summary) == 0
    assert loaded.golden == {"stop": 1.0}


def test_infinite_and_undefined_metrics_have_no_interval(mlp, blobs):
    values = iter([1.0, float("inf"), 2.0, 3.0])
    row = fp.assess(
        mlp, data=blobs, faults=fp.RandomBits(1), trials=3, metrics={"loss": lambda outputs, targets: next(values)}
    ).summary.iloc[0]
    assert row["loss"] == float("inf")
    assert np.isnan(row["loss_low"])
    assert np.isnan(row["loss_high"])
