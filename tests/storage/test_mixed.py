from itertools import product

import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.errors import ConfigError
from flipproof.storage.mixed import _cheapest, doubt

OPTIONS = (fp.Affine(bits=3), fp.Affine(bits=5), fp.TripleMSB(fp.Affine(bits=3)))


def test_the_cheapest_selection_is_that_of_exhaustive_search():
    generator = torch.Generator().manual_seed(0)
    names = ["a", "b", "c", "d"]
    for _ in range(30):
        sizes, costs = torch.randint(1, 9, (4, 3), generator=generator), torch.rand((4, 3), generator=generator)
        rows = [
            (name, format, int(sizes[i, k]) * format.width, float(costs[i, k]))
            for i, name in enumerate(names)
            for k, format in enumerate(OPTIONS)
        ]
        every = [[row for row in rows if row[0] == name] for name in names]
        budget = 70
        fitting = [s for s in product(*every) if sum(row[2] for row in s) <= budget]
        if not fitting:
            with pytest.raises(ConfigError, match="budget"):
                _cheapest(names, rows, budget)
            continue
        best = min(sum(row[3] for row in s) for s in fitting)
        chosen = _cheapest(names, rows, budget)
        picked = [next(row for row in rows if row[0] == name and row[1] == chosen[name]) for name in names]
        assert sum(row[3] for row in picked) == pytest.approx(best)
        assert sum(row[2] for row in picked) <= budget


def test_costs_are_what_assess_measures_and_the_budget_is_kept(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(60, 8)
    data = [(x, net(x).argmax(dim=1))]
    setup = {"memory": 5 * 192, "ber": 1e-2, "options": OPTIONS, "trials": 3, "journal": tmp_path, "progress": False}
    chosen = fp.explore_mixed(net, data, **setup)
    assert chosen.bits <= 960
    assert chosen.bits == fp.FaultSpace(net, format=chosen.formats, where=fp.Parameters(kinds=("weight",))).bits
    assert chosen.table["chosen"].sum() == 2
    assert len(chosen.table) == 2 * 3
    again = fp.explore_mixed(net, data, **setup)
    assert again.formats == chosen.formats
    probability = torch.softmax(net(x).double(), 1).gather(1, data[0][1][:, None]).mean()
    row = chosen.table.iloc[2]
    found = fp.assess(
        net, data=data, faults=fp.BitErrorRate(1e-2, exact=False), format={"0.weight": OPTIONS[2]}, trials=3,
        where=fp.Parameters(include="0.weight"), metrics={"doubt": doubt},
    )  # fmt: skip
    assert row["cost"] == pytest.approx(float(found.summary["doubt"][0]) - float(1 - probability.detach()), abs=1e-6)
    with pytest.raises(ConfigError, match="narrowest options take 576 bits"):
        fp.explore_mixed(net, data, **{**setup, "memory": 100})
