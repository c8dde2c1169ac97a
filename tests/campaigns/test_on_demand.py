"""Trials on demand are those of a whole campaign."""

import copy

import pytest
import torch

import flipproof as fp
from flipproof.campaigns.assess import on_demand
from flipproof.errors import AuditError, FlipproofWarning, JournalError

RATES = fp.BitErrorRate((1e-3, 1e-2, 5e-2), exact=False)


def bare(trial):
    return {name: value for name, value in trial.to_json().items() if name not in ("seconds", "audited")}


def test_they_are_those_of_a_whole_campaign_in_whatever_order(mlp, blobs):
    whole = {(r.point, r.trial): bare(r) for r in fp.assess(mlp, blobs, faults=RATES, trials=4, seed=3).records}
    before = copy.deepcopy(mlp.state_dict())
    mlp.train()
    with on_demand(mlp, blobs, faults=RATES, trials=4, seed=3) as ask:
        assert [bare(t) for t in ask(2, 2)] == [whole[2, 0], whole[2, 1]]
        assert [bare(t) for t in ask(0, 4)] == [whole[0, t] for t in range(4)]
        assert [bare(t) for t in ask(2, 9)] == [whole[2, t] for t in range(4)]
    assert mlp.training
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


def test_what_ran_is_read_from_the_journal(mlp, blobs, tmp_path):
    journal = tmp_path / "journal.jsonl"
    with on_demand(mlp, blobs, faults=RATES, trials=4, journal=journal) as ask:
        first = ask(1, 2)
    with on_demand(mlp, blobs, faults=RATES, trials=4, journal=journal) as ask:
        again = ask(1, 3)
    assert again[:2] == first  # seconds included: they did not run again
    assert len(fp.Assessment.load(journal).records) == 3
    whole = fp.assess(mlp, blobs, faults=RATES, trials=4, journal=journal)
    assert len(whole.records) == 12
    with torch.no_grad():
        mlp[0].weight += 1
    with pytest.raises(JournalError), on_demand(mlp, blobs, faults=RATES, trials=4, journal=journal):
        raise AssertionError("another model's journal was opened")


def test_the_model_is_given_back_after_an_error(mlp, blobs):
    before = copy.deepcopy(mlp.state_dict())

    def fails():
        with on_demand(mlp, blobs, faults=RATES, trials=4, format=fp.Affine(3)) as ask:
            ask(0, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


def test_warnings_point_at_the_line_of_the_caller(blobs):
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)).eval()
    with pytest.warns(FlipproofWarning, match="stored bits") as seen:
        fp.assess(net, blobs, faults=RATES, trials=1)
    assert seen[0].filename == __file__


class Silent(torch.nn.Module):
    """Huge values move its offset where no version counter sees it, and without faults there are none."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.register_buffer("offset", torch.zeros(3))

    def forward(self, x):
        found = self.inside(x) + self.offset
        if float(found.abs().max()) > 1e3:
            self.offset.data += 1
        return found


def test_trials_that_a_silent_write_may_have_spoilt_are_done_again(mlp, blobs, tmp_path):
    model = Silent(mlp)
    setup = {"faults": fp.BitPosition([30], share=0.02), "trials": 40}
    with pytest.raises(AuditError, match="no version counter"):
        fp.assess(model, blobs, **setup, journal=tmp_path / "whole.jsonl")
    truth = [bare(t) for t in fp.assess(model, blobs, **setup, journal=tmp_path / "whole.jsonl").records]
    journal = tmp_path / "asked.jsonl"
    with (
        pytest.raises(AuditError, match="no version counter"),
        on_demand(model, blobs, **setup, journal=journal) as ask,
    ):
        ask(0, 40)
    assert fp.Assessment.load(journal).records == []
    with on_demand(model, blobs, **setup, journal=journal) as ask:
        assert [bare(t) for t in ask(0, 40)] == truth
