import json
import subprocess
import sys
import time
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.errors import ConfigError, JournalError, JournalMismatch
from flipproof.storage.mixed import doubt, least_cost

OPTIONS = (fp.Affine(bits=3), fp.Affine(bits=5), fp.TripleMSB(fp.Affine(bits=3)))


def by_dominance(table, memory):
    """(cost, bits) of the best selection: layer by layer, only partial ones stay that none beats in bits and cost."""
    partial = [(0, 0.0)]
    for _, rows in table.groupby("layer", sort=False):
        options = rows[["bits", "cost"]].itertuples(index=False)
        longer = [(b + more, c + extra) for more, extra in options for b, c in partial if b + more <= memory]
        partial, best = [], float("inf")
        for bits, cost in sorted(longer):
            if cost < best:
                partial.append((bits, cost))
                best = cost
    return min(((cost, bits) for bits, cost in partial), default=None)


def by_enumeration(table, memory):
    every = [rows[["cost", "bits"]].to_numpy().tolist() for _, rows in table.groupby("layer")]
    sums = [(sum(cost for cost, _ in s), sum(bits for _, bits in s)) for s in product(*every)]
    return min((s for s in sums if s[1] <= memory), default=None)


def random_costs(layers, options, *, largest, spread, seed):
    """Costs of either sign; with spread 0 whole numbers, many of which tie."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(1, largest, (layers, 1), endpoint=True) * np.arange(3, 3 + options)
    shape = (layers, options)
    cost = generator.normal(0, spread, shape) if spread else generator.integers(-2, 3, shape).astype(float)
    names = np.repeat([f"layer {i}" for i in range(layers)], options)
    budget = int(generator.integers(bits.min(1).sum() - 1, bits.max(1).sum(), endpoint=True))
    return pd.DataFrame({"layer": names, "bits": bits.ravel(), "cost": cost.ravel()}), budget


@pytest.mark.parametrize("largest", [5, 10**4, 10**8])
@pytest.mark.parametrize("spread", [0, 1e-6, 1.0])
def test_the_cheapest_selection_is_that_of_exhaustive_search(largest, spread):
    refused = 0
    for seed in range(12):
        table, budget = random_costs(4, 3, largest=largest, spread=spread, seed=seed)
        best = by_enumeration(table, budget)
        if best is None:
            refused += 1
            assert by_dominance(table, budget) is None
            with pytest.raises(ConfigError, match="budget"):
                least_cost(table, budget)
            continue
        assert by_dominance(table, budget) == pytest.approx(best, rel=1e-12)
        taken = table[least_cost(table, budget)]
        assert sorted(taken["layer"]) == sorted(table["layer"].unique())
        assert taken["bits"].sum() <= budget
        assert taken["cost"].sum() == pytest.approx(best[0], rel=1e-12, abs=1e-12 * spread)
    assert refused < 12


@pytest.mark.parametrize("seed", range(3))
def test_many_layers_and_options_come_to_the_same_cost_as_without_a_solver(seed):
    table, _ = random_costs(16, 13, largest=10**5, spread=1e-2, seed=seed)
    budget = int(table.groupby("layer")["bits"].median().sum())
    taken = table[least_cost(table, budget)]
    assert taken["bits"].sum() <= budget
    assert taken["cost"].sum() == pytest.approx(by_dominance(table, budget)[0], rel=1e-12)


def test_of_options_that_cost_the_same_the_smallest_is_taken():
    table = pd.DataFrame({"layer": list("aaab"), "bits": [8, 3, 3, 5], "cost": [0.0, 0.0, 0.0, 1.0]})
    assert least_cost(table, 100).tolist() == [False, True, False, True]


def test_costs_are_what_assess_measures_and_the_budget_is_kept(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(60, 8)
    data = [(x, net(x).argmax(dim=1))]
    setup = {"memory": 5 * 192, "ber": 1e-2, "options": OPTIONS, "trials": 3, "journal": tmp_path / "costs.jsonl"}
    setup["progress"] = False
    chosen = fp.explore_mixed(net, data, **setup)
    assert chosen.bits <= 960
    assert chosen.bits == fp.FaultSpace(net, format=chosen.formats, where=fp.Parameters(kinds=("weight",))).bits
    assert chosen.table["chosen"].sum() == 2
    assert len(chosen.table) == 2 * 3
    written = (tmp_path / "costs.jsonl").read_bytes()
    again = fp.explore_mixed(net, data, **setup)
    assert again.formats == chosen.formats
    pd.testing.assert_frame_equal(again.table, chosen.table)
    assert (tmp_path / "costs.jsonl").read_bytes() == written
    probability = torch.softmax(net(x).double(), 1).gather(1, data[0][1][:, None]).mean()
    row = chosen.table.iloc[2]
    found = fp.assess(
        net, data=data, faults=fp.BitErrorRate(1e-2, exact=False), format={"0.weight": OPTIONS[2]}, trials=3,
        where=fp.Parameters(include="0.weight"), metrics={"doubt": doubt},
    )  # fmt: skip
    assert row["cost"] == pytest.approx(float(found.summary["doubt"][0]) - float(1 - probability.detach()), abs=1e-6)
    with pytest.raises(ConfigError, match="narrowest options take 576 bits"):
        fp.explore_mixed(net, data, **{**setup, "memory": 100})


def test_resumed_or_with_workers_or_elsewhere_the_costs_are_the_same(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(60, 8)
    data = [(x, net(x).argmax(dim=1))]
    setup = {"memory": 5 * 192, "ber": 1e-2, "options": OPTIONS, "trials": 3, "progress": False}
    alone = fp.explore_mixed(net, data, **setup, device="cpu", decision="logits")
    journal = tmp_path / "costs.jsonl"
    both = fp.explore_mixed(net, data, **setup, workers=2, journal=journal)
    pd.testing.assert_frame_equal(both.table, alone.table)
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 3
    journal.write_text("".join(lines[:4]))
    resumed = fp.explore_mixed(net, data, **setup, journal=journal)
    pd.testing.assert_frame_equal(resumed.table, alone.table)
    assert len(journal.read_text().splitlines()) == len(lines)
    smaller = fp.explore_mixed(net, data, **{**setup, "memory": 600}, journal=journal)  # what was measured still holds
    assert smaller.bits <= 600 < resumed.bits
    assert len(journal.read_text().splitlines()) == len(lines)
    whole = journal.read_text()
    edited = json.loads(lines[1])
    for wrong in (-5, float("nan"), 1e30, "x"):
        journal.write_text("".join([lines[0], json.dumps({**edited, "doubt": wrong}) + "\n", *lines[2:]]))
        with pytest.raises(JournalError, match=r"costs\.jsonl, line 2: .*doubt: expected"):
            fp.explore_mixed(net, data, **setup, journal=journal)
    journal.write_text(whole)
    for changes in ({"ber": 1e-3}, {"trials": 4}, {"seed": 1}, {"options": OPTIONS[:2]}):
        with pytest.raises(JournalMismatch):
            fp.explore_mixed(net, data, **{**setup, **changes}, journal=journal)
    with torch.no_grad():
        net[0].weight[0, 0] += 1
    with pytest.raises(JournalMismatch):
        fp.explore_mixed(net, data, **setup, journal=journal)


def test_a_killed_exploration_goes_on_where_it_was(tmp_path):
    journal = tmp_path / "costs.jsonl"
    script = f"""
import torch, flipproof as fp
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
x = torch.randn(60, 8)
fp.explore_mixed(net, [(x, net(x).argmax(dim=1))], memory=960, ber=1e-2, trials=3, workers=2, journal={str(journal)!r})
"""
    child = subprocess.Popen([sys.executable, "-c", script])
    while child.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 4):
        time.sleep(0.01)
    assert child.poll() is None, "it ended before it could be killed"
    child.kill()
    child.wait()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(60, 8)
    setup = {"memory": 960, "ber": 1e-2, "trials": 3, "progress": False}
    kept = journal.read_bytes().rpartition(b"\n")[0].splitlines()
    resumed = fp.explore_mixed(net, [(x, net(x).argmax(dim=1))], journal=journal, **setup)
    assert journal.read_bytes().splitlines()[: len(kept)] == kept
    pd.testing.assert_frame_equal(resumed.table, fp.explore_mixed(net, [(x, net(x).argmax(dim=1))], **setup).table)
    with pytest.raises(JournalError, match="is the journal of a mixed-width exploration, expected that of a campaign"):
        fp.assess(net, [(x, net(x).argmax(dim=1))], faults=fp.BitErrorRate(1e-2), trials=3, journal=journal)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": ()}, "at least one"),
        ({"options": (3,)}, "formats such as"),
        ({"memory": "x"}, "whole number of bits"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(change, message):
    net = nn.Linear(4, 3)
    with pytest.raises(ConfigError, match=message):
        fp.explore_mixed(net, [(torch.randn(6, 4), torch.arange(6) % 3)], **{"memory": 60, **change})
