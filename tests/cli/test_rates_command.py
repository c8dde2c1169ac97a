import pandas as pd
import pytest
from typer.testing import CliRunner

from flipproof.cli import app

MODULE = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def batches():
    torch.manual_seed(1)
    x = torch.randn(20, 4)
    with torch.no_grad():
        return [(x, build()(x).argmax(dim=1))]
"""


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def given(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    return ("estimate-rates", f"{tmp_path}/mine.py:build", "--data", f"{tmp_path}/mine.py:batches")


def test_rates_are_printed_written_and_resumed(given, tmp_path):
    arguments = (*given, "--faults", "RandomBits(1)", "--margin", "0.1", "--out", tmp_path / "out")
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "for the 20 samples given; of 100 %" in " ".join(done.output.split())
    table = pd.read_csv(tmp_path / "out" / "rates.csv")
    assert table["critical_total_high"].iloc[0] - table["critical_total_low"].iloc[0] <= 0.2
    strata = pd.read_csv(tmp_path / "out" / "strata.csv")
    assert strata["trials"].sum() == table["trials"].iloc[0]
    before = (tmp_path / "out" / "rates.jsonl").read_bytes()
    assert run(*arguments).output == done.output
    assert (tmp_path / "out" / "rates.jsonl").read_bytes() == before


def test_rates_of_a_sweep(given, tmp_path):
    done = run(
        *given,
        "--faults",
        "BitErrorRate([1e-3, 1e-2])",
        "--of",
        "accuracy",
        "--margin",
        "0.2",
        "--out",
        tmp_path / "out",
    )
    assert done.exit_code == 0, done.output
    assert "accuracy_low" in done.output
    assert len(pd.read_csv(tmp_path / "out" / "rates.csv")) == 2


def test_another_sampling_is_refused(given, tmp_path):
    done = run(*given, "--faults", "RandomBits(1)", "--sampling", "lucky", "--out", tmp_path / "out")
    assert done.exit_code != 0
    assert "stratified or uniform" in str(done.exception) + done.output
