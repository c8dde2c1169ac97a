"""The chain from networks to tables, on a network that takes seconds."""

from __future__ import annotations

import io

import pandas as pd
import pytest
import torch
from rich.console import Console
from torch import nn

import flipproof as fp
from flipproof.datasets import digits
from flipproof.errors import ConfigError
from flipproof.reproduce import fortune


def tiny():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)).eval()


def test_tables_figures_and_resuming(tmp_path, monkeypatch):
    subject = fortune.Subject("VGG11", tiny, digits("test", batch_size=60)[:1], digits("train", batch_size=30)[:1])
    monkeypatch.setattr(fortune, "_subjects", lambda scale, root: [subject])
    monkeypatch.setattr(fortune, "RATES", {"smoke": (3e-4, 3e-2)})
    monkeypatch.setattr(fortune, "TRIALS", {"smoke": 4})

    def run():
        console = Console(file=io.StringIO(), width=200)
        found = fortune.reproduce(scale="smoke", data_root=tmp_path, out=tmp_path, workers=1, console=console)
        return found, console.file.getvalue()

    summary, text = run()
    before = {path: path.read_bytes() for path in tmp_path.glob("journals/*/*.jsonl")}
    again, _ = run()
    pd.testing.assert_frame_equal(summary, again)  # times too: they are in the journal
    assert {path: path.read_bytes() for path in tmp_path.glob("journals/*/*.jsonl")} == before
    assert len([path for path in before if path.parent.name == "vgg11"]) == 9 + 1  # a campaign a form, and forms.jsonl
    types = [
        "8-bit",
        "P-3-bit",
        "P-4-bit",
        "P-5-bit",
        "5-bit",
        "4-bit",
        "3-bit",
        "SECDED(Affine(bits=8))",
        "SECDED(Affine(bits=8), block=64)",
    ]
    assert list(dict.fromkeys(summary["type"])) == types
    weights = 64 * 20 + 20 * 10
    memory = summary.drop_duplicates("type").set_index("type")["memory"]
    assert memory.to_dict() == {t: weights * w for t, w in zip(types, (8, 5, 6, 7, 5, 4, 3, 13, 9), strict=True)}
    alone = fp.assess(
        tiny(),
        data=subject.test,
        faults=fp.BitErrorRate([3e-4, 3e-2]),
        trials=4,
        format=fp.TripleMSB(fp.Affine(bits=3)),
        where=fp.Parameters(kinds=("weight",)),
    )
    own = summary[summary["type"] == "P-3-bit"]
    assert own["drop"].tolist() == pytest.approx((100 * alone.summary["accuracy_drop"]).tolist())
    mixed = pd.read_csv(tmp_path / "table-3.csv")
    assert mixed["widths"].tolist() == ["uniform"] * 2 + ["mixed"] * 2
    assert (mixed["memory"] <= weights * 5).all()
    published = pd.read_csv(tmp_path / "table-2.csv")
    row = published[(published["type"] == "P-3-bit") & (published["ber"] == 3e-4) & (published["network"] == "VGG11")]
    assert row["published"].tolist() == [67.13]
    assert "takes 37.5 % less memory than 8-bit" in text
    for name in ("table-1.md", "claims.md", "figure-5-vgg11.png", "figure-6-vgg11.png", "figure-7-vgg11.png"):
        assert (tmp_path / name).stat().st_size > 100


def test_unknown_scales_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="scale"):
        fortune.reproduce(scale="huge", data_root=tmp_path, out=tmp_path, workers=1, console=Console())
