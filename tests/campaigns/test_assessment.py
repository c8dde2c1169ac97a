from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import flipproof as fp
from flipproof.errors import ConfigError


@pytest.fixture
def result(mlp, blobs):
    return fp.assess(mlp, data=blobs, faults=fp.BitErrorRate([2e-3, 2e-2]), trials=25, metrics=("accuracy", "auroc"))


def test_columns(result):
    assert list(result.trials) == [
        "point", "ber", "trial", "faults", "flips", "accuracy", "auroc", "masked", "non_critical_sdc", "critical_sdc",
        "due", "samples", "seconds", "digest", "error", "audited",
    ]  # fmt: skip
    named = ("accuracy", "auroc", "accuracy_drop", "auroc_drop", "masked", "non_critical_sdc", "critical_sdc", "due")
    bounds = [f"{name}{end}" for name in (*named, "critical_total") for end in ("", "_low", "_high")]
    assert sorted(result.summary) == sorted(["point", "ber", "trials", "flips", "audited", "coverage", *bounds])
    assert list(result.summary)[-1] == "coverage"


def test_summary_is_means_and_student_intervals_over_trials(result):
    for point, row in result.summary.iterrows():
        trials = result.trials.query(f"point == {point}")
        assert (row["trials"], row["flips"]) == (25, trials["flips"].mean())
        mean = trials["accuracy"].mean()
        low, high = stats.t.interval(0.95, 24, loc=mean, scale=stats.sem(trials["accuracy"]))
        assert row["accuracy"] == pytest.approx(mean)
        unseen = stats.binomtest(0, 25).proportion_ci(0.95).high  # share of trials that may be anything
        assert row["accuracy_low"] == pytest.approx(max(min(low, (1 - unseen) * mean), 0))
        assert row["accuracy_high"] == pytest.approx(min(max(high, (1 - unseen) * mean + unseen), 1))
        assert row["accuracy_drop"] == pytest.approx(result.golden["accuracy"] - mean)
        assert row["accuracy_drop_low"] == pytest.approx(result.golden["accuracy"] - row["accuracy_high"])
        assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
        shares = trials[["masked", "non_critical_sdc", "critical_sdc", "due"]].div(trials["samples"], axis=0)
        assert row[list(shares)].sum() == pytest.approx(1)
        np.testing.assert_allclose(row[list(shares)].to_numpy(float), shares.mean())
        total = shares["critical_sdc"] + shares["due"]
        assert row["critical_total"] == pytest.approx(total.mean())
        low, high = stats.t.interval(0.95, 24, loc=total.mean(), scale=stats.sem(total))
        assert row["critical_total_high"] == pytest.approx(min(max(high, (1 - unseen) * total.mean() + unseen), 1))


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


def test_other_tables_are_refused(result, tmp_path):
    with pytest.raises(ConfigError, match="'trials' or 'summary', got 'trial'"):
        result.to_csv(tmp_path / "table.csv", table="trial")


def test_an_unfinished_journal_has_tables_too(mlp, blobs, tmp_path):
    calls = iter(range(100))

    def stop(outputs, targets):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return 1.0

    store = tmp_path / "journal.jsonl"
    for expected in (3, 3):
        with pytest.raises(KeyboardInterrupt):
            fp.assess(mlp, data=blobs, faults=fp.RandomBits([1, 2]), trials=5, metrics=stop, store=store)
        loaded = fp.Assessment.load(store)
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
        fp.assess(mlp, data=blobs, faults=fp.RandomBits(1), metrics=stop, store=tmp_path / "journal.jsonl")
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
