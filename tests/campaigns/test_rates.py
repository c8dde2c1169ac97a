"""`estimate_rates` against every single bit, and its trials against those of `assess`."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.errors import AuditError, ConfigError, FlipproofError, FlipproofWarning, JournalError
from flipproof.spaces.contract import Faults


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


@pytest.fixture(scope="module")
def data(net):
    torch.manual_seed(2)
    x = 2 * torch.randn(12, 3)
    with torch.no_grad():
        y = net(x).argmax(dim=1)
    y[::5] = (y[::5] + 1) % 3
    return [(x[:8], y[:8]), (x[8:], y[8:])]


@pytest.fixture(scope="module")
def table(net, data):
    """Whether each bit is critical for each sample, (bits, samples), by a plain forward of each sample alone."""
    space, x = fp.FaultSpace(net), torch.cat([inputs for inputs, _ in data])
    found = np.zeros((space.bits, len(x)), bool)
    with torch.no_grad():
        golden = torch.cat([net(row[None]) for row in x]).argmax(dim=1)
        for bit in range(space.bits):
            with space.corrupted(Faults(np.array([bit]))):
                out = torch.cat([net(row[None]) for row in x])
            found[bit] = (torch.isnan(out).any(dim=1) | (out.argmax(dim=1) != golden)).numpy()
    return found


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_every_trial_is_that_bit_on_that_sample(net, data, table, tmp_path):
    journal = tmp_path / "rates.jsonl"
    found = fp.estimate_rates(net, data, faults=fp.RandomBits(1), margin=0.05, journal=journal, audit=1.0)
    space, seen = fp.FaultSpace(net), []
    for record in rows(journal):
        (bit,) = space.faults([tuple(place) for place in record["where"]]).positions
        assert record["samples"] == 1
        critical = record["outcomes"]["critical_sdc"] + record["outcomes"]["due"]
        seen.append((bit, critical))
        assert table[bit].min() <= critical <= table[bit].max()
        assert record["audited"]
    assert len(seen) == found.table["trials"].iloc[0]
    row = found.table.iloc[0]
    assert row["critical_total_low"] <= table.mean() <= row["critical_total_high"]
    assert row["critical_total_high"] - row["critical_total_low"] <= 0.1
    assert found.strata["share"].sum() == pytest.approx(1)
    assert found.strata["trials"].sum() == row["trials"] == row["images"]


def test_rates_are_those_of_every_bit_and_the_interval_holds_them(net, data, table):
    estimates, held = [], 0
    for seed in range(12):
        with pytest.warns(FlipproofWarning, match="trials say no more"):
            found = fp.estimate_rates(
                net, data, faults=fp.RandomBits(1), margin=1e-3, confidence=0.9, trials=60, seed=seed, audit=0
            )
        row = found.table.iloc[0]
        estimates.append(row["critical_total"])
        held += row["critical_total_low"] <= table.mean() <= row["critical_total_high"]
    assert abs(np.mean(estimates) - table.mean()) <= 3.5 * np.std(estimates) / 12**0.5
    assert held >= 9  # 90 % of 12, less two standard errors


@pytest.mark.parametrize("images", [None, 3])
def test_all_samples_or_some(net, data, table, images):
    found = fp.estimate_rates(net, data, faults=fp.RandomBits([1, 60]), margin=0.05, images=images)
    most = (12 if images is None else 3) * found.table["trials"]
    assert (found.table["images"] == most if images is None else found.table["images"] < most).all()
    assert found.table["critical_total_low"].iloc[0] <= table.mean() <= found.table["critical_total_high"].iloc[0]
    assert found.table["critical_total"].iloc[1] > found.table["critical_total"].iloc[0]


SETUPS = {
    "bits": {"faults": fp.RandomBits(1), "margin": 0.06},
    "rates": {"faults": fp.BitErrorRate([2e-3, 2e-2]), "of": "accuracy", "margin": 0.06},
    "neurons": {"faults": fp.RandomBits(1), "where": fp.Neurons(), "margin": 0.06},
    "uniform": {"faults": fp.RandomBits(1), "sampling": "uniform", "margin": 0.06},
    "int8": {"faults": fp.RandomBits(1), "format": fp.Affine(bits=8), "margin": 0.06},
}


@pytest.mark.parametrize("name", SETUPS)
def test_interrupted_and_resumed_and_with_two_workers(net, data, name, tmp_path, monkeypatch):
    setup = SETUPS[name]
    whole = fp.estimate_rates(net, data, **setup, journal=tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:20]) + lines[20][:7])
    again = fp.estimate_rates(net, data, **setup, journal=tmp_path / "part.jsonl")
    assert (tmp_path / "part.jsonl").read_bytes().splitlines()[1:] == [line.rstrip() for line in lines[1:]]
    _same(whole, again)
    if name in ("bits", "rates"):
        two = fp.estimate_rates(net, data, **setup, workers=2, journal=tmp_path / "two.jsonl")
        _same(whole, two)
        assert sorted(map(str, rows(tmp_path / "two.jsonl"))) == sorted(map(str, rows(tmp_path / "whole.jsonl")))


def _same(one, other):
    assert one.table.equals(other.table)
    assert one.strata.equals(other.strata)


def test_uniform_trials_are_those_of_assess(net, data, tmp_path):
    faults = fp.BitErrorRate([5e-3])
    found = fp.estimate_rates(
        net, data, faults=faults, of="accuracy", margin=0.1, sampling="uniform", seed=5, journal=tmp_path / "r.jsonl"
    )
    trials = int(found.table["trials"].iloc[0])
    records = fp.assess(net, data, faults=faults, trials=trials, seed=5).records
    expected = {(r.point, r.trial): (r.digest, r.outcomes, r.metrics["accuracy"]) for r in records}
    ours = {
        (r["stratum"], r["trial"]): (r["digest"], r["outcomes"], r["metrics"]["accuracy"])
        for r in rows(tmp_path / "r.jsonl")
    }
    assert ours == expected
    assert found.table["accuracy"].iloc[0] == pytest.approx(np.mean([r.metrics["accuracy"] for r in records]))


def test_both_samplings_say_the_same_of_a_sweep(net, data):
    setup = {"faults": fp.BitErrorRate([2e-3, 1e-2], exact=False), "of": "accuracy", "margin": 0.05}
    ours = fp.estimate_rates(net, data, **setup).table
    uniform = fp.estimate_rates(net, data, **setup, sampling="uniform", seed=1).table
    for name in ("accuracy", "critical_total", "masked", "due"):
        assert (ours[f"{name}_low"] <= uniform[f"{name}_high"]).all()
        assert (uniform[f"{name}_low"] <= ours[f"{name}_high"]).all()


def test_a_rate_without_flips_takes_one_trial(net, data):
    with pytest.warns(FlipproofWarning, match="no bit at all"):
        found = fp.estimate_rates(net, data, faults=fp.BitErrorRate(1e-9), of="accuracy").table.iloc[0]
    assert found["trials"] == 1
    assert found["accuracy_low"] == found["accuracy"] == found["accuracy_high"] == pytest.approx(9 / 12)
    assert found["masked"] == 1.0


def test_what_a_code_repairs_takes_no_trials(net, data):
    found = fp.estimate_rates(net, data, faults=fp.RandomBits(1), format=fp.TripleMSB(fp.Affine(bits=8)), margin=0.05)
    known = found.strata[found.strata["name"] == "changes nothing"].iloc[0]
    assert known["share"] > 0.1
    assert known["trials"] == 0
    assert known["mean"] == 0.0


def test_neurons_against_a_campaign(net, data):
    found = fp.estimate_rates(net, data, faults=fp.RandomBits(1), where=fp.Neurons(), margin=0.03).table.iloc[0]
    plain = fp.assess(net, data, faults=fp.RandomBits(1), where=fp.Neurons(), trials=400).summary.iloc[0]
    assert found["critical_total_low"] <= plain["critical_total_high"]
    assert plain["critical_total_low"] <= found["critical_total_high"]
    one = fp.estimate_rates(net, data, faults=fp.BitPosition([30]), where=fp.Neurons(), margin=0.05)
    assert set(one.strata["name"]) == {"0, bit 30", "2, bit 30"}


def test_the_model_is_given_back(net, data):
    before = [p.detach().clone() for p in net.parameters()]
    fp.estimate_rates(net, data, faults=fp.RandomBits(1), format=fp.Float16(), margin=0.1)
    assert all(torch.equal(p, was) for p, was in zip(net.parameters(), before, strict=True))


class Silent(nn.Module):
    """Huge values move its offset where no version counter sees it."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.register_buffer("offset", torch.zeros(3))

    def forward(self, x):
        found = self.inside(x) + self.offset
        if float(found.abs().max()) > 1e3:
            self.offset.data += 1
        return found


def test_a_failed_audit_stops_it_and_the_shortcut_is_off_when_it_is_resumed(net, data, tmp_path):
    setup = {"faults": fp.RandomBits(1), "margin": 0.1, "journal": tmp_path / "rates.jsonl"}
    with pytest.raises(AuditError, match="no version counter"):
        fp.estimate_rates(Silent(net), data, **setup)
    found = fp.estimate_rates(Silent(net), data, **setup)
    assert bool(found.table["met"].iloc[0])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"of": "loss"}, "critical_total"),
        ({"of": 3}, "name of an outcome"),
        ({"margin": 0}, "margin"),
        ({"margin": None}, "margin"),
        ({"sampling": "random"}, "stratified"),
        ({"images": 0}, "images"),
        ({"faults": "RandomBits(1)"}, "fault model"),
        ({"faults": fp.StuckAt(1e-3, value=1)}, "sampling='uniform'"),
        ({"faults": fp.BitErrorRate(1e-3, spread="layers")}, "sampling='uniform'"),
        ({"metrics": {"loss": lambda outputs, targets: 0.0}, "of": "loss"}, "no bounds"),
        ({"metrics": "auroc", "faults": fp.RandomBits(1)}, "mean over samples"),
        ({"confidence": 1.0}, "estimate_rates"),
        ({"workers": 0}, "workers"),
    ],
)
def test_bad_input_is_refused(net, data, given, says):
    with pytest.raises(FlipproofError, match=says):
        fp.estimate_rates(net, data, **{"faults": fp.RandomBits(1), **given})


def test_another_estimate_is_told_apart(net, data, tmp_path):
    setup = {"faults": fp.RandomBits(1), "margin": 0.1, "journal": tmp_path / "r.jsonl"}
    fp.estimate_rates(net, data, **setup)
    with pytest.raises(JournalError, match="margin"):
        fp.estimate_rates(net, data, **{**setup, "margin": 0.05})
    with pytest.raises(JournalError, match="rate estimate"):
        fp.assess(net, data, faults=fp.RandomBits(1), journal=tmp_path / "r.jsonl")
    with pytest.raises(ConfigError):
        fp.estimate_rates(net, data, **{**setup, "journal": 3})


def test_samples_that_cannot_be_divided(net):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, scale):
            return self.layer(x) * scale

    model = nn.Sequential(nn.Linear(3, 3))
    shared = [({"input": torch.randn(4, 3)}, torch.zeros(4))]
    fp.estimate_rates(model, shared, faults=fp.RandomBits(1), margin=0.1)
    with pytest.raises(FlipproofError, match="cannot be divided"):
        fp.estimate_rates(Two(), [((torch.randn(4, 3), torch.ones(1)), torch.zeros(4))], faults=fp.RandomBits(1))
