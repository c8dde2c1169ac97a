from __future__ import annotations

import io
import re

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

import flipproof as fp
import flipproof.demo
from flipproof.datasets import digits
from flipproof.demo import RATES, run_demo
from flipproof.models import digits_cnn


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo at a few trials, in a cache folder of its own."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        console = Console(file=io.StringIO(), width=100)
        found = run_demo(folder / "out", trials=4, console=console)
        first = console.file.getvalue()
        console.file = io.StringIO()
        again = run_demo(folder / "out", trials=4, console=console)
    return folder, found, again, first


def test_it_trains_a_good_network_and_says_how_good(demo):
    _, found, _, text = demo
    assert found["rates"].golden["accuracy"] > 0.95
    accuracy, (low, high) = found["rates"].golden["accuracy"], found["rates"].golden_interval("accuracy")
    assert low < accuracy < high
    assert re.search(rf"Without faults accuracy is {accuracy:.1%} .*over 360 samples", " ".join(text.split()))


def test_everything_promised_is_written(demo):
    folder, found, _, text = demo
    names = ("rates.jsonl", "bits.jsonl", "rates.csv", "rates-summary.csv", "bits-summary.csv")
    figures = ("accuracy.png", "outcomes.png", "bits.png", "before-after.png")
    for name in (*names, *figures):
        assert (folder / "out" / name).stat().st_size > 200
        assert name in text
    rates = pd.read_csv(folder / "out" / "rates.csv")
    assert rates.groupby("ber")["trial"].count().to_dict() == dict.fromkeys(RATES, 4)
    assert len(fp.Assessment.load(folder / "out" / "bits.jsonl").records) == 32
    assert len(found["bits"].summary) == 32


def test_protection_keeps_the_answers_where_float32_loses_them(demo):
    folder, found, again, text = demo
    before, after = (found[name].summary.set_index("ber")["accuracy"] for name in ("before", "after"))
    golden = found["before"].golden["accuracy"]
    assert before[1e-3] < 0.5 * golden
    assert after[3e-2] >= 0.99 * golden
    assert "Met: at a bit error rate of 0.03" in text
    assert again["after"].trials.equals(found["after"].trials)
    assert (folder / "out" / "protected" / "words.safetensors").exists()


def test_it_fits_100_columns_and_has_words(demo):
    text = demo[3]
    assert max(map(len, text.splitlines())) <= 100
    assert "The critical bit is 30" in text
    assert "…" not in text


def test_a_second_run_resumes(demo):
    _, found, again, _ = demo
    for name in ("rates", "bits"):
        assert again[name].trials.equals(found[name].trials)  # `seconds` included: nothing was run again


def test_the_bit_table_is_what_flipping_by_hand_gives(demo):
    """Independent of the campaign: XOR every float32 weight's bit with numpy and count."""
    folder, found, _, _ = demo
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        trained = flipproof.demo.trained_digits_cnn().state_dict()
    x, y = (torch.cat(parts) for parts in zip(*digits(), strict=True))
    summary = found["bits"].summary.set_index("bit")
    for bit in (0, 20, 23, 27, 30, 31):
        model = digits_cnn()
        flipped = {
            name: torch.from_numpy((value.numpy().view(np.uint32) ^ np.uint32(1 << bit)).view(np.float32))
            for name, value in trained.items()
        }
        model.load_state_dict(flipped)
        with torch.no_grad():
            logits = model(x)
        broken = logits.isnan().any(dim=1)
        right = (logits.argmax(dim=1) == y) & ~broken
        assert summary.loc[bit, "accuracy"] == pytest.approx(float(right.float().mean()))
        assert summary.loc[bit, "due"] == pytest.approx(float(broken.float().mean()))


def test_the_console_may_be_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flipproof.demo, "trained_digits_cnn", lambda: digits_cnn().eval())
    run_demo(tmp_path, trials=2)
    assert "flipproof demo" in capsys.readouterr().out
    assert isinstance(fp.Assessment.load(tmp_path / "rates.jsonl"), fp.Assessment)
