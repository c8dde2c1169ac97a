import io
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import flipproof as fp
from flipproof.cli import app
from flipproof.reports.front import front_figure

MODULE = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))


def batches():
    torch.manual_seed(1)
    x = torch.randn(200, 16)
    with torch.no_grad():
        return [(x, build()(x).argmax(dim=1))]
"""


@pytest.fixture
def module(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path / "mine.py"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_newcomers_command_writes_words_verdict_and_figure(module, tmp_path):
    out = tmp_path / "safe"
    arguments = (
        *("protect", f"{module}:build", "--data", f"{module}:batches", "--ber", "1e-2", "--memory", "0.0"),
        *("--trials", "5", "--front", "60", "--rivals", "eight=Affine(bits=8)", "--out", out),
    )
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "Met: at a bit error rate of 0.01" in " ".join(done.output.split())
    for name in (
        "words.safetensors",
        "table.csv",
        "evidence.csv",
        "front.csv",
        "front.png",
        "verdict.txt",
        "protect.toml",
    ):
        assert (out / name).stat().st_size > 50
    assert pd.read_csv(out / "evidence.csv")["form"].tolist() == ["as it came", "protected", "eight"]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))
    words = fp.load_packed(net, out / "words.safetensors")
    assert fp.packed_bytes(words) < fp.packed_bytes(net) * 1.3  # constants in 64 bits each are in the buffers
    written = (out / "evidence.csv").read_text()
    again = run("protect", "--config", out / "protect.toml", f"{module}:build", "--out", out)
    assert again.exit_code == 0, again.output
    drop = pd.read_csv(out / "evidence.csv").drop(columns="time")
    pd.testing.assert_frame_equal(drop, pd.read_csv(io.StringIO(written)).drop(columns="time"))


def test_what_does_not_fit_says_what_is_needed(module, tmp_path):
    done = run(
        *("protect", f"{module}:build", "--data", f"{module}:batches", "--ber", "0.2", "--memory", "-0.9"),
        *("--out", tmp_path / "safe"),
    )
    assert done.exit_code != 0
    assert re.search(r"memory=-0.9 .*(needed|no code)", str(done.exception))


def test_codes_are_listed_as_text_that_can_be_copied():
    done = run("list", "--codes")
    assert done.exit_code == 0
    texts = re.findall(r"(BCH\(.*\))\s*$", done.output, re.MULTILINE)
    assert len(texts) > 30
    for text in texts:
        fp.formats.parse_format(text)


def test_a_front_without_rows_is_refused_and_one_with_them_is_drawn():
    with pytest.raises(fp.FlipproofError, match="front="):
        front_figure(pd.DataFrame())
    front = pd.DataFrame(
        {
            "form": ["as it came", "protect, memory +0 %", "$rival_{x}$", "MSET", "CEP"],
            "ours": [False, True, False, False, False],
            "memory": [0.0, -0.01, -0.5, 0.004, 0.004],
            "ber": [1e-6, 5e-2, 0.0, 1e-4, 1e-4],
            "limit": [np.nan, 0.2, np.nan, np.nan, np.nan],
        }
    )
    figure = front_figure(front, kept=0.9)
    ours, limit, others = figure.axes[0].lines
    assert ours.get_xydata().tolist() == [[-0.01, 5e-2]]
    assert limit.get_xydata().tolist() == [[-0.01, 0.2]]
    assert others.get_xydata().tolist() == [[0.0, 1e-6], [0.004, 1e-4], [0.004, 1e-4]]
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["1", "3, 4"]  # two at one place share a label
    listed = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text for text in listed if text[0].isdigit()] == [
        "1  as it came",
        r"2  \$rival_{x}\$: at no rate",
        "3  MSET",
        "4  CEP",
    ]
