"""A search or training that is interrupted resumes at its layer, to the same thresholds."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import flipproof as fp
from flipproof.errors import JournalError, JournalMismatch
from flipproof.hardening.fitting.work import Work
from flipproof.hardening.methods.base import Hardening
from flipproof.hardening.report import hardening_report

Data = list[tuple[Tensor, Tensor]]
METHODS: list[Hardening] = [
    fp.FTClipAct(points=2, rounds=2, trials=2, bers=(1e-3, 1e-2)),
    fp.FitAct(epochs=3, held_out=0.5, lr=0.05, budget=0.2),
    fp.ProAct(epochs=2, epochs_last=3, held_out=0.5, lr=0.05, budget=0.2),
]

METHOD = fp.FTClipAct(points=2, rounds=1, trials=1, bers=(1e-2,))


@pytest.fixture
def model(mlp: nn.Module) -> nn.Module:
    return nn.Sequential(*mlp, nn.ReLU(), nn.Linear(3, 3))


def thresholds(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "threshold" in name}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("finished", [0, 1])
def test_interrupted_and_resumed(method, finished, model, blobs, tmp_path, monkeypatch):
    whole = fp.harden(model, method, data=blobs)
    real, done = Work.stage, []

    def interrupted(self, name, *args, **kwargs):
        if len(done) == finished:
            raise KeyboardInterrupt
        rows = real(self, name, *args, **kwargs)
        done.append(name)
        return rows

    monkeypatch.setattr(Work, "stage", interrupted)
    if finished or not isinstance(method, fp.FitAct):
        expected = finished if not isinstance(method, fp.FitAct) else 1
        with suppress(KeyboardInterrupt):  # FitAct has one stage and is done after it
            fp.harden(model, method, data=blobs, journal=tmp_path / "stages.jsonl")
        assert len((tmp_path / "stages.jsonl").read_bytes().splitlines()) == 1 + expected
    monkeypatch.setattr(Work, "stage", real)
    resumed = fp.harden(model, method, data=blobs, journal=tmp_path / "stages.jsonl")
    assert thresholds(resumed).keys() == thresholds(whole).keys()
    assert all(torch.equal(value, thresholds(whole)[name]) for name, value in thresholds(resumed).items())
    pd.testing.assert_frame_equal(hardening_report(resumed).history, hardening_report(whole).history)
    assert hardening_report(resumed).forwards == pytest.approx(hardening_report(whole).forwards)


def test_workers_give_the_same_thresholds(model, blobs):
    one, two = (fp.harden(model, METHODS[0], data=blobs, workers=workers) for workers in (1, 2))
    assert all(torch.equal(value, thresholds(one)[name]) for name, value in thresholds(two).items())


def test_a_finished_run_trains_nothing_again(model, blobs, tmp_path, monkeypatch):
    method = METHODS[2]
    first = fp.harden(model, method, data=blobs, journal=tmp_path / "stages.jsonl")

    def trains(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("flipproof.hardening.fitting.training.train_thresholds", trains)
    again = fp.harden(model, method, data=blobs, journal=tmp_path / "stages.jsonl")
    assert all(torch.equal(value, thresholds(first)[name]) for name, value in thresholds(again).items())


def test_another_hardening_is_refused_with_what_differs(model, blobs, tmp_path):
    fp.harden(model, METHOD, data=blobs, journal=tmp_path / "stages.jsonl")
    before = (tmp_path / "stages.jsonl").read_bytes()
    with pytest.raises(JournalMismatch, match=r"method: .FTClipAct\(points=2.* → .FTClipAct\(points=3"):
        fp.harden(model, replace(METHOD, points=3), data=blobs, journal=tmp_path / "stages.jsonl")
    with pytest.raises(JournalMismatch, match="data: "):
        fp.harden(model, METHOD, data=blobs[:1] * 2, journal=tmp_path / "stages.jsonl")
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(JournalMismatch, match="weights: "):
        fp.harden(model, METHOD, data=blobs, journal=tmp_path / "stages.jsonl")
    assert (tmp_path / "stages.jsonl").read_bytes() == before


def test_foreign_and_damaged_files_are_refused(model, blobs, tmp_path):
    journal = tmp_path / "stages.jsonl"
    journal.write_bytes(b"not a stage\n")
    with pytest.raises(JournalError, match=r"stages\.jsonl is not a flipproof journal"):
        fp.harden(model, METHOD, data=blobs, journal=journal)
    assert journal.read_bytes() == b"not a stage\n"
    journal.unlink()
    fp.harden(model, METHOD, data=blobs, journal=journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    for damage in (
        b"{}\n",
        lines[1].replace(b'"dtype":"float32"', b'"dtype":"object"'),
        lines[1].replace(b'"stage":1', b'"stage":0'),
    ):
        journal.write_bytes(lines[0] + damage)
        with pytest.raises(JournalError, match="line 2: not a record of a hardening"):
            fp.harden(model, METHOD, data=blobs, journal=journal)
    journal.write_bytes(lines[0] + lines[1][:-9])  # torn by a kill: the stage is done again
    fp.harden(model, METHOD, data=blobs, journal=journal)
    assert len(journal.read_bytes().splitlines()) == len(lines)
    fp.assess(model, blobs, faults=fp.RandomBits(1), trials=2, journal=tmp_path / "campaign.jsonl")
    with pytest.raises(JournalError, match="is the journal of a campaign, expected that of a hardening"):
        fp.harden(model, METHOD, data=blobs, journal=tmp_path / "campaign.jsonl")


def test_a_folder_that_cannot_be_made(model, blobs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot write"):
        fp.harden(model, METHOD, data=blobs, journal=tmp_path / "file" / "stages.jsonl")
