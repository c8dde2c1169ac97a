"""Models that keep state, sent to a worker of a cluster as bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch
import zoo

import flipproof as fp

STATEFUL = [zoo.Observed, zoo.FakeQuantized, zoo.MaxNorm, zoo.TrainedNorm]


@pytest.mark.filterwarnings("ignore:what a sample answers depends on")
@pytest.mark.parametrize("make", STATEFUL, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("where", [fp.Parameters(), fp.Neurons()], ids=["weights", "neurons"])
def test_models_that_write_into_themselves_do_so_elsewhere_too(make, where):
    torch.manual_seed(2)
    data = [(torch.randn(12, zoo.FEATURES), torch.arange(12) % 3)]
    asked = {"faults": fp.RandomBits(1), "trials": 8, "where": where, "audit": 0.5, "progress": False}
    with ThreadPoolExecutor(1) as pool:
        there = fp.assess(make(), data, **asked, client=pool).trials
    here = fp.assess(make(), data, **asked).trials
    pd.testing.assert_frame_equal(there.drop(columns="seconds"), here.drop(columns="seconds"), check_exact=True)


def test_rates_are_those_of_one_process():
    torch.manual_seed(2)
    data = [(torch.randn(12, zoo.FEATURES), torch.arange(12) % 3)]
    asked = {"faults": fp.RandomBits(1), "margin": 0.2, "progress": False}
    with ThreadPoolExecutor(2) as pool:
        there = fp.estimate_rates(zoo.Net(), data, **asked, client=pool)
    pd.testing.assert_frame_equal(there.table, fp.estimate_rates(zoo.Net(), data, **asked).table, check_exact=True)
