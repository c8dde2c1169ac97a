from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import flipproof as fp
from flipproof.campaigns.statistics import half_width, level_at_looks, mean_interval, unseen_share
from flipproof.errors import ConfigError, JournalMismatch

SWEEP = fp.BitErrorRate([2e-3, 1e-2])


def records_of(result):
    """Everything but the time it took."""
    return [replace(record, seconds=0.0) for record in result.records]


@pytest.fixture
def setup(blobs):
    return {"data": blobs, "faults": SWEEP, "trials": 30, "seed": 5, "metrics": ("accuracy", "auroc")}


def stopping_after(trials):
    """A metric that interrupts the campaign as Ctrl-C would, after the golden run and this many trials."""
    left = iter(range(trials + 1))  # not a number: that would be part of the metric, and another campaign

    def auroc_like(outputs, targets):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return float((outputs.argmax(dim=1) == targets).double().mean())

    return {"mine": auroc_like}


def test_two_workers_no_cache_or_a_store_change_nothing(mlp, setup, tmp_path):
    reference = fp.assess(mlp, **setup)
    columns = reference.trials.drop(columns="seconds")
    for change in (
        {},
        {"workers": 2},
        {"cache_bytes": 0},
        {"journal": tmp_path / "journal.jsonl"},
        {"workers": 2, "journal": tmp_path / "other.jsonl", "cache_bytes": 0},
    ):
        result = fp.assess(mlp, **setup, **change)
        assert records_of(result) == records_of(reference)
        pd.testing.assert_frame_equal(result.trials.drop(columns="seconds"), columns, check_exact=True)
        pd.testing.assert_frame_equal(result.summary, reference.summary, check_exact=True)


def test_the_process_wide_generators_and_threads_play_no_part(mlp, setup):
    reference = fp.assess(mlp, **setup)
    torch.manual_seed(12345)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert records_of(fp.assess(mlp, **setup)) == records_of(reference)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_draws_other_faults(mlp, setup):
    digests = set(fp.assess(mlp, **setup).trials["digest"])
    assert len(digests) == 60
    assert not digests & set(fp.assess(mlp, **{**setup, "seed": 6}).trials["digest"])


def test_a_point_keeps_its_draws_when_others_join_the_sweep(mlp, setup):
    alone = fp.assess(mlp, **{**setup, "faults": fp.BitErrorRate(1e-2)})
    both = fp.assess(mlp, **setup)
    assert list(both.trials.query("ber == 0.01")["digest"]) == list(alone.trials["digest"])


@pytest.mark.parametrize("stop", [0, 1, 7, 29])
@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_and_resumed(mlp, blobs, tmp_path, stop, workers):
    setup = {"data": blobs, "faults": SWEEP, "trials": 15, "seed": 5}
    reference = fp.assess(mlp, **setup, metrics=stopping_after(10**9))
    journal = tmp_path / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        fp.assess(mlp, **setup, metrics=stopping_after(stop), journal=journal)
    assert len(fp.Assessment.load(journal).records) == stop
    kept = journal.read_bytes()
    resumed = fp.assess(mlp, **setup, metrics=stopping_after(10**9), journal=journal, workers=workers)
    assert journal.read_bytes().startswith(kept)
    assert records_of(resumed) == records_of(reference)
    assert resumed.records[:stop] == fp.Assessment.load(journal).records[:stop]  # not run again: even the seconds


def test_a_finished_campaign_runs_nothing_again(mlp, setup, tmp_path):
    journal = tmp_path / "journal.jsonl"
    first = fp.assess(mlp, **setup, journal=journal)
    content = journal.read_bytes()
    second = fp.assess(mlp, **setup, journal=journal)
    assert journal.read_bytes() == content
    assert second.records == first.records


def test_a_higher_ceiling_adds_trials_and_a_lower_one_hides_them(mlp, setup, tmp_path):
    journal = tmp_path / "journal.jsonl"
    few = fp.assess(mlp, **{**setup, "trials": 6}, journal=journal)
    many = fp.assess(mlp, **setup, journal=journal)
    assert [r for r in many.records if r.trial < 6] == list(few.records)
    assert records_of(many) == records_of(fp.assess(mlp, **setup))
    again = fp.assess(mlp, **{**setup, "trials": 6}, journal=journal)
    assert again.records == few.records
    assert fp.Assessment.load(journal).records == few.records  # the latest plan counts
    assert fp.assess(mlp, **setup, journal=journal).records == many.records


def test_points_without_chance_run_once_and_are_certain(mlp, blobs):
    result = fp.assess(mlp, data=blobs, faults=fp.BitPosition([30, 2]), trials=50, workers=2)
    assert list(result.trials["bit"]) == [30, 2]
    assert list(result.summary["trials"]) == [1, 1]
    for name in ("accuracy", "masked", "non_critical_sdc", "critical_sdc", "due", "critical_total"):
        assert (result.summary[f"{name}_low"] == result.summary[name]).all()
        assert (result.summary[f"{name}_high"] == result.summary[name]).all()


def test_a_rate_that_flips_nothing_warns_and_runs_once(mlp, blobs):
    with pytest.warns(fp.FlipproofWarning, match=r"1e-06 × 2,144 bits = 0\.00214 expected flips"):
        result = fp.assess(mlp, data=blobs, faults=fp.BitErrorRate([1e-6, 1e-2]), trials=3)
    assert list(result.summary["trials"]) == [1, 3]
    first = result.summary.iloc[0]
    assert (first["accuracy"], first["masked"], first["flips"]) == (result.golden["accuracy"], 1.0, 0.0)


def bare(result):
    return [replace(record, seconds=0.0, audited=False) for record in result.records]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stored_sweep_is_extended_by_rates_and_trials(mlp, blobs, tmp_path, workers):
    setup = {"data": blobs, "journal": tmp_path / "journal.jsonl", "workers": workers}
    first = fp.assess(mlp, **setup, faults=fp.BitErrorRate([1e-2, 5e-2]), trials=5)
    for rates, trials in (([2e-3, 1e-2, 5e-2], 5), ([2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1], 7)):
        faults = fp.BitErrorRate(rates)
        longer = fp.assess(mlp, **setup, faults=faults, trials=trials)
        assert bare(longer) == bare(fp.assess(mlp, data=blobs, faults=faults, trials=trials))
        assert bare(fp.Assessment.load(setup["journal"])) == bare(longer)
        assert fp.Assessment.load(setup["journal"]).summary["ber"].tolist() == rates
        kept = {(r.coordinates["ber"], r.trial): r.seconds for r in longer.records}
        assert all(kept[r.coordinates["ber"], r.trial] == r.seconds for r in first.records)  # they did not run again
    with pytest.raises(JournalMismatch, match="faults"):
        fp.assess(mlp, **setup, faults=fp.BitErrorRate([1e-2, 0.3]), trials=5)
    with pytest.raises(JournalMismatch, match="seed"):
        fp.assess(mlp, **setup, faults=fp.BitErrorRate([*rates, 0.2]), trials=5, seed=1)
    assert bare(fp.assess(mlp, **setup, faults=faults, trials=7)) == bare(longer)


class TestMargin:
    def setup_for(self, blobs, **change):
        return {"data": blobs, "faults": fp.BitErrorRate([5e-4, 2e-2]), "trials": 200, "seed": 1, **change}

    def test_stops_at_the_first_look_that_is_narrow_enough(self, mlp, blobs):
        result = fp.assess(mlp, **self.setup_for(blobs, margin=0.04))
        full = fp.assess(mlp, **self.setup_for(blobs))
        counts, level = result.summary["trials"].tolist(), level_at_looks(0.95, 0.04)
        for point, count in enumerate(counts):
            of_point = [r for r in records_of(full) if r.point == point]
            assert [r for r in records_of(result) if r.point == point] == of_point[:count]
            widths = {
                n: half_width(
                    mean_interval([r.metrics["accuracy"] for r in of_point[:n]], confidence=level, bounds=(0, 1))
                )
                for n in range(20, 201, 20)
            }
            means = {n: np.mean([r.metrics["accuracy"] for r in of_point[:n]]) for n in widths}
            tails = {n: unseen_share(n, 0.95) * mean for n, mean in means.items()}  # the worst value is 0
            assert count == min(n for n, width in widths.items() if width <= 0.04 and tails[n] <= 0.04)
        assert counts[0] <= counts[1] < 200  # fewer faults, less scatter, fewer trials
        assert counts[0] == 80  # trials that agree closely do not stop a campaign that cannot know of a fatal one

    def test_workers_do_not_matter(self, mlp, blobs):
        one = fp.assess(mlp, **self.setup_for(blobs, margin=0.04))
        two = fp.assess(mlp, **self.setup_for(blobs, margin=0.04, workers=2))
        assert records_of(one) == records_of(two)

    def test_the_ceiling_holds(self, mlp, blobs):
        result = fp.assess(mlp, **self.setup_for(blobs, margin=1e-6, trials=33))
        assert result.summary["trials"].tolist() == [33, 33]

    def test_resuming_with_another_margin(self, mlp, blobs, tmp_path):
        journal = tmp_path / "journal.jsonl"
        for margin in (0.08, 0.03, 0.08, None, 0.05):
            resumed = fp.assess(mlp, **self.setup_for(blobs, margin=margin, trials=90, journal=journal))
            afresh = fp.assess(mlp, **self.setup_for(blobs, margin=margin, trials=90))
            assert records_of(resumed) == records_of(afresh)
            loaded = fp.Assessment.load(journal)
            assert loaded.records == resumed.records
            assert loaded.header.plan.margin == margin

    @pytest.mark.parametrize("margin", [0, 1, -0.1])
    def test_margins_out_of_range(self, mlp, blobs, margin):
        with pytest.raises(ConfigError, match="margin in"):
            fp.assess(mlp, **self.setup_for(blobs, margin=margin))
