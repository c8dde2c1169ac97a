"""The chain from networks to tables on networks that take seconds."""

from __future__ import annotations

import io

import pandas as pd
import pytest
import torch
from rich.console import Console

import flipproof as fp
from flipproof.datasets.ehr import synthetic_ehr
from flipproof.errors import ConfigError, DataError
from flipproof.models.training import risk_loss
from flipproof.reproduce import lstm_beyond
from flipproof.reproduce.lstm_beyond import GRURisk, SentenceEncoder, Subject


def subjects(root, judged):
    data = synthetic_ehr(40, hours=8)
    words = torch.randint(2, 50, (64, 6), generator=torch.Generator().manual_seed(0))
    words[:, 4:] = 0
    sentences = [(words, (words[:, 0] > 25).long())]
    return [
        Subject(
            *("GRU", lambda: GRURisk(4), data.train.batches(8), data.validation.batches(4), data.test.batches(8)),
            *("auroc", 1, risk_loss),
        ),
        Subject("Transformer", lambda: SentenceEncoder(50, 6, 8), sentences, sentences, sentences, "accuracy", 20),
    ]


def test_tables_figures_and_resuming(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lstm_beyond, "_subjects", subjects)
    monkeypatch.setattr(lstm_beyond, "SCALES", {"smoke": (3, 8)})
    monkeypatch.setattr(lstm_beyond, "RATES", (1e-3, 1e-2))
    console = Console(file=io.StringIO(), width=200)

    def run():
        return lstm_beyond.reproduce(scale="smoke", data_root=tmp_path, out=tmp_path, workers=1, console=console)

    summary, journals = run(), sorted((tmp_path / "journals").glob("*.jsonl"))
    before = [path.read_bytes() for path in journals]
    assert len(summary) == 2 * 4 * 2
    pd.testing.assert_frame_equal(run(), summary)
    assert [path.read_bytes() for path in journals] == before
    for row in summary.itertuples():
        journal = fp.Assessment.load(tmp_path / "journals" / f"{row.network}-{row.method.replace(' ', '')}.jsonl")
        point = journal.summary[journal.summary["ber"] == row.ber].iloc[0]
        assert row.drop == pytest.approx(point[f"{row.metric}_drop"])
    for name in ("GRU.png", "Transformer.png", "bits.png", "table.md", "protection.md"):
        assert (tmp_path / name).stat().st_size > 200
    protection = pd.read_csv(tmp_path / "protection.csv").set_index("network")
    assert protection.loc["GRU", "activations clamped"] == 4  # three gates and the risk
    assert protection.loc["Transformer", "activations clamped"] == 2


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ConfigError, match="scale"):
        lstm_beyond.reproduce(scale="huge", data_root=tmp_path, out=tmp_path, workers=1, console=Console())
    with pytest.raises(DataError):
        lstm_beyond.reproduce(scale="smoke", data_root=tmp_path, out=tmp_path, workers=1, console=Console())
