"""Every bit of ResNet-20: what is done again by hand agrees, a wrong table is found, a page says what is done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console
from torch import nn

import flipproof as fp
from flipproof.errors import ConfigError, DataError
from flipproof.reproduce import exhaustive

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def small(_: object) -> tuple[nn.Module, exhaustive.Batches]:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(2, 2, 2, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    x = torch.randn(9, 2, 3, 3).to(memory_format=torch.channels_last)
    return net.eval().to(memory_format=torch.channels_last), [(x, torch.arange(9) % 3)]


@pytest.fixture
def done(tmp_path, monkeypatch) -> fp.BitTable:
    monkeypatch.setattr(exhaustive, "subject", small)
    exhaustive.run_shards(tmp_path, tmp_path / "journal.jsonl", range(1, 3), of=2)
    return fp.BitTable.load(tmp_path / "journal.jsonl")


def test_what_is_done_again_by_hand_agrees_and_a_wrong_table_is_found(done, tmp_path):
    assert done.done == 1
    checked, differing = exhaustive.check_by_hand(done, tmp_path, 480)
    assert checked == (3 + 2 + 2 + 3 + 3) * 32  # the norms have two words
    assert differing.empty
    wrong = [record.flips.copy() for record in done]
    for flips in wrong:
        flips[::5, 2] += 1 - 2 * (flips[::5, 2] > 0)
    other = fp.BitTable(done.header, [replace(r, flips=f) for r, f in zip(done, wrong, strict=True)])
    _, differing = exhaustive.check_by_hand(other, tmp_path, 480)
    assert 50 < len(differing) < 200


def test_the_page_says_what_is_done(done, tmp_path):
    part = fp.BitTable(done.header, [record for record in done if record.chunk < 2])
    said = exhaustive.write_page(part, tmp_path / "page", 12, pd.DataFrame())
    assert f"{part.tried:,} of {done.of:,} flips" in said
    assert "done again by hand: 12, of which 0 differ" in said
    files = {path.name for path in (tmp_path / "page").iterdir()}
    assert files == {"table.csv", "sites.csv", "bits.csv", "bits.md", "table.png", "numbers.md"}
    assert len(pd.read_csv(tmp_path / "page" / "table.csv")) == len(done.table)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(DataError, match=r"no resnet20-\*.th under"):
        exhaustive.subject(tmp_path)
    with pytest.raises(ConfigError, match="scale is 'smoke' or 'paper', got 'huge'"):
        exhaustive.reproduce(scale="huge", data_root=tmp_path, out=tmp_path, workers=1, console=Console())


@pytest.mark.skipif(not SHARED.exists(), reason="needs the checkpoints and CIFAR-10 beside the repository")
def test_resnet_20_s_last_layers(tmp_path):
    """Flips that little runs behind, and a BatchNorm's; all of the machinery is in it."""
    model, images = exhaustive.subject(SHARED)
    where = fp.Parameters(["layer3.2.conv2", "layer3.2.bn2.bias", "linear.bias"])
    found = fp.inject_all(model, images, where=where, shard="1/5000")
    assert all(record.shared for record in found)
    flips = found.flips.sample(40, random_state=1)
    ours = flips[["site", "word", "bit", "masked", "non_critical_sdc", "critical_sdc", "due"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(exhaustive.by_hand(model, images, flips), ours)
