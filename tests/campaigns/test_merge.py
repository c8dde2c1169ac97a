"""Shards put together are one run, record for record; what does not fit is named and nothing is written."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import flipproof as fp
from flipproof.campaigns.assessment import campaign_journal
from flipproof.campaigns.merge import Shard
from flipproof.errors import ConfigError, JournalError, JournalMismatch
from flipproof.reports.tables import findings


@pytest.fixture
def setup(mlp, blobs):
    return {"model": mlp, "data": blobs, "faults": fp.BitErrorRate([1e-2, 5e-2]), "trials": 7, "seed": 2}


def records_of(result):
    return [replace(record, seconds=0.0) for record in result.records]


def shards(setup, folder, of, **changes):
    paths = [folder / f"{number}.jsonl" for number in range(1, of + 1)]
    for number, path in enumerate(paths, start=1):
        fp.assess(**setup | changes, journal=path, shard=f"{number}/{of}")
    return paths


@pytest.mark.parametrize("of", [1, 2, 3, 14, 20])
def test_shards_together_are_one_run(setup, tmp_path, of):
    whole = fp.assess(**setup)
    paths = shards(setup, tmp_path, of)
    sizes = [len(fp.Assessment.load(path).records) for path in paths]
    assert sum(sizes) == 14
    assert max(sizes) - min(sizes) <= 2
    np.random.default_rng(of).shuffle(paths)
    merged = fp.merge(*paths, into=tmp_path / "new" / "whole.jsonl")
    assert records_of(merged) == records_of(whole)
    assert records_of(fp.Assessment.load(tmp_path / "new" / "whole.jsonl")) == records_of(whole)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["whole.jsonl"]
    assert merged.summary.equals(whole.summary)
    resumed = fp.assess(**setup, journal=tmp_path / "new" / "whole.jsonl")
    assert [r.seconds for r in resumed.records] == [r.seconds for r in merged.records]  # nothing ran again


def test_a_shard_says_that_it_is_one(setup, tmp_path):
    one, two = shards(setup, tmp_path, 2)
    assert any("This is shard 1/2 of a campaign" in said for said in findings(fp.Assessment.load(one)))
    assert not any("shard" in said for said in findings(fp.merge(one, two, into=tmp_path / "whole.jsonl")))


def test_points_that_run_once_are_in_one_shard(setup, tmp_path):
    faults = fp.BitPosition([3, 20, 30])
    paths = shards(setup, tmp_path, 2, faults=faults)
    merged = fp.merge(*paths, into=tmp_path / "whole.jsonl")
    assert records_of(merged) == records_of(fp.assess(**setup | {"faults": faults}))
    assert len(merged.records) == 3


def test_neurons_and_workers(setup, tmp_path):
    changes = {"where": fp.Neurons(), "faults": fp.RandomBits(1), "workers": 2}
    merged = fp.merge(*shards(setup, tmp_path, 3, **changes), into=tmp_path / "whole.jsonl")
    assert records_of(merged) == records_of(fp.assess(**setup | changes))


def test_gaps_are_named_and_can_be_filled(setup, tmp_path):
    one, two, three = shards(setup, tmp_path, 3)
    left_out = fp.Assessment.load(two).trials.groupby("point")["trial"].agg(list)
    said = [
        f"of point {point} .* {len(trials)}: {', '.join(map(str, trials[:3]))}" for point, trials in left_out.items()
    ]
    with pytest.raises(ConfigError, match="trials are missing: " + ".*".join(said)):
        fp.merge(one, three, into=tmp_path / "whole.jsonl")
    assert not (tmp_path / "whole.jsonl").exists()
    part = fp.merge(one, three, into=tmp_path / "part.jsonl", partial=True)
    assert len(part.records) == 14 - left_out.map(len).sum()
    filled = fp.assess(**setup, journal=tmp_path / "part.jsonl")
    assert records_of(filled) == records_of(fp.assess(**setup))
    before = len(fp.Assessment.load(one).records)
    again = fp.assess(**setup, journal=one, shard="2/3")  # a shard's journal takes another shard as well
    assert len(again.records) == before + left_out.map(len).sum()
    assert records_of(fp.merge(one, three, into=tmp_path / "whole.jsonl")) == records_of(filled)


def test_what_is_there_twice_is_named(setup, tmp_path):
    one, two = shards(setup, tmp_path, 2)
    with pytest.raises(ConfigError, match=r"1.jsonl and .*1.jsonl both hold point 0, trial"):
        fp.merge(one, two, one, into=tmp_path / "whole.jsonl")
    fp.assess(**setup, journal=tmp_path / "third.jsonl", shard="1/3")
    with pytest.raises(ConfigError, match=r"both hold point 0, trial"):
        fp.merge(one, tmp_path / "third.jsonl", into=tmp_path / "whole.jsonl", partial=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 3}, "seed: 2 → 3"),
        ({"faults": fp.BitErrorRate([1e-2, 3e-2])}, "faults"),
        ({"format": fp.Affine(8)}, "format"),
        ({"trials": 8}, "trials: 7 → 8"),
    ],
)
def test_foreign_shards_are_named(setup, tmp_path, change, said):
    one, _ = shards(setup, tmp_path, 2)
    fp.assess(**setup | change, journal=tmp_path / "other.jsonl", shard="2/2")
    with pytest.raises(JournalMismatch, match=rf"other.jsonl is of another campaign than .*1.jsonl(.|\n)*{said}"):
        fp.merge(one, tmp_path / "other.jsonl", into=tmp_path / "whole.jsonl")
    with torch.no_grad():
        setup["model"][0].weight += 1
    fp.assess(**setup, journal=tmp_path / "weights.jsonl", shard="2/2")
    with pytest.raises(JournalMismatch, match="weights"):
        fp.merge(one, tmp_path / "weights.jsonl", into=tmp_path / "whole.jsonl")


def test_more_trials_and_rates_belong_to_the_same_shards(setup, tmp_path):
    changes = {"trials": 11, "faults": fp.BitErrorRate([2e-3, 1e-2, 5e-2])}
    paths = shards(setup, tmp_path, 3)
    before = {path: {(r.coordinates["ber"], r.trial) for r in fp.Assessment.load(path).records} for path in paths}
    assert shards(setup, tmp_path, 3, **changes) == paths
    for path in paths:
        assert before[path] <= {(r.coordinates["ber"], r.trial) for r in fp.Assessment.load(path).records}
    merged = fp.merge(*paths, into=tmp_path / "whole.jsonl")
    fresh = fp.assess(**setup | changes)
    bare = [[replace(r, seconds=0.0, audited=False) for r in found.records] for found in (merged, fresh)]
    assert bare[0] == bare[1]


def test_a_campaign_with_a_margin_is_whole_where_it_stops(setup, tmp_path):
    share = fp.Metric(lambda outputs, targets: 0.5, name="share", range=(0, 1))
    changes = {"margin": 0.2, "trials": 400, "metrics": share, "audit": 0}
    whole = fp.assess(**setup | changes, journal=tmp_path / "whole.jsonl")
    count = len(whole.records)
    assert count < 200
    assert len(fp.merge(tmp_path / "whole.jsonl", into=tmp_path / "copy.jsonl").records) == count
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    records = [json.dumps(record.to_json()) + "\n" for record in whole.records]
    (tmp_path / "part.jsonl").write_text("".join([lines[0], *records[: count - 5]]))
    with pytest.raises(ConfigError, match="missing: of point 1"):
        fp.merge(tmp_path / "part.jsonl", into=tmp_path / "other.jsonl")


def test_a_shortcut_that_an_audit_found_wrong_is_not_merged_with_trials_that_used_it(setup, tmp_path):
    paths = shards(setup, tmp_path, 2)
    records = [[json.dumps(r.to_json()) for r in fp.Assessment.load(path).records] for path in paths]
    headers = [path.read_text().splitlines()[0] for path in paths]
    note = json.dumps({"audit_failed": {"shortcut": "suffix", "point": 0, "trial": 0}})
    paths[0].write_text("\n".join([headers[0], note, *records[0]]) + "\n")
    with pytest.raises(ConfigError, match=r"an audit in .*1.jsonl found the shortcut 'suffix' wrong.* 2.jsonl|2.jsonl"):
        fp.merge(*paths, into=tmp_path / "whole.jsonl")
    paths[1].write_text("\n".join([headers[1], note, *records[1]]) + "\n")
    merged = fp.merge(*paths, into=tmp_path / "whole.jsonl")
    assert records_of(merged) == records_of(fp.assess(**setup))
    journal = campaign_journal(tmp_path / "whole.jsonl")
    assert len(journal.read()[1]) == 14
    assert journal.switched_off == {"suffix"}


def test_a_shard_none_of_whose_trials_are_planned_any_more(setup, tmp_path):
    path = tmp_path / "3.jsonl"
    fp.assess(**setup, journal=path, shard="3/20")
    kept = len(fp.Assessment.load(path).records)
    assert kept
    for trials in (6, 3, 1):
        found = fp.assess(**setup | {"trials": trials}, journal=path, shard="3/20")
        assert all(record.trial < trials for record in found.records)
    assert len(found.records) == 0


def test_misuse(setup, tmp_path):
    one, two = shards(setup, tmp_path, 2)
    for shard in (" 1 / 2 ", "١/٢", "1_0/1_00", "0/2", "3/2", "1", "a/b", "1/2/3", "", 3, (1, 2), "1/0", "-1/2"):
        with pytest.raises(ConfigError, match="shard= takes a text such as '3/100'"):
            fp.assess(**setup, shard=shard)
    with pytest.raises(ConfigError, match="margin="):
        fp.assess(**setup, shard="1/2", margin=0.1)
    with pytest.raises(ConfigError, match="got none"):
        fp.merge(into=tmp_path / "whole.jsonl")
    with pytest.raises(ConfigError, match="is there already"):
        fp.merge(one, two, into=two)
    with pytest.raises(JournalError):
        fp.merge(one, tmp_path / "none.jsonl", into=tmp_path / "whole.jsonl")
    assert str(Shard.read("03/100")) == "3/100"
    for into in (None, "", 3):
        with pytest.raises(ConfigError, match="takes the paths"):
            fp.merge(one, two, into=into)
    for journal in ([one], 3, None):
        with pytest.raises(ConfigError, match="takes the paths"):
            fp.merge(journal, into=tmp_path / "whole.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir() if "whole" in path.name) == []
