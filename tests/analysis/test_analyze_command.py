"""The verb and the paper's experiments, at the smallest size that runs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

import flipproof as fp
from flipproof.cli import app
from flipproof.models import lenet5
from flipproof.reproduce.deepvigor import PUBLISHED, Study, run, studies


def test_analyze_writes_what_the_function_finds(tmp_path: Path):
    source = tmp_path / "given.py"
    source.write_text(
        "import torch\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))\n"
        "def data():\n"
        "    torch.manual_seed(1)\n"
        "    return [(torch.randn(6, 4), torch.arange(6) % 3)]\n"
    )
    out = tmp_path / "out"
    arguments = [
        "analyze",
        f"{source}:net",
        "--data",
        f"{source}:data",
        "--validate",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    torch.manual_seed(1)
    expected = fp.analyze(net, [(torch.randn(6, 4), torch.arange(6) % 3)])
    pd.testing.assert_series_equal(pd.read_csv(out / "layers.csv")["lvf"], expected.layers["lvf"])
    assert fp.VulnerabilityMap.load(out / "map.safetensors").bits.equals(expected.bits)
    assert (out / "bits.png").stat().st_size > 1000
    assert set(pd.read_csv(out / "validation.csv")["layer"]) == {0, 2}
    assert "The map speaks of 100 % of the multiplications of a forward." in result.output
    assert pd.read_csv(out / "left_out.csv").empty


def test_the_command_says_what_it_leaves_out_and_validates_on_unseen_data(tmp_path: Path):
    source = tmp_path / "given.py"
    source.write_text(
        "import torch\n"
        "from torch.nn import functional as F\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b, self.c = torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)\n"
        "    def forward(self, x):\n"
        "        x = torch.relu(F.linear(torch.relu(self.a(x)), self.b.weight))\n"
        "        return {'noise': x, 'logits': self.c(x)}\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    return Net()\n"
        "def batches(seed):\n"
        "    return [(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(8) % 3)]\n"
        "def data():\n"
        "    return batches(1)\n"
        "def other():\n"
        "    return batches(2)\n"
    )
    out = tmp_path / "out"
    arguments = ["analyze", f"{source}:net", "--data", f"{source}:data", "--output", "logits", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--validate", "--unseen", f"{source}:other"])
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "The map speaks of 46.67 % of the multiplications of a forward." in shown  # (4·8 + 8·3) / (… + 8·8)
    assert "Of all single bit flips in the analysed layers, not of the network," in shown
    assert "Left out: b: the forward never calls it as a module" in shown
    assert "of the critical flips of the analysed layers" in shown
    held = pd.read_csv(out / "validation.csv")
    assert held["data"].tolist() == ["analysed", "analysed", "other", "other"]
    assert (held["true_non_critical_low"] < held["true_non_critical_high"]).all()
    page = (out / "map.html").read_text(encoding="utf-8")
    for words in (
        "not of the network",
        "the forward never calls it as a module",
        "46.67 %",
        "critical as said",
        "other",
    ):
        assert words in page
    result = CliRunner().invoke(app, ["estimate-factors", *arguments[1:], "--margin", "0.2"])
    assert "These factors speak of 46.67 % of what there is." in " ".join(result.output.split())


def test_weights_from_the_command_line_to_a_protected_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("given.py").write_text(
        "import torch\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3))\n"
        "def data():\n"
        "    torch.manual_seed(1)\n"
        "    x = torch.randn(64, 4)\n"
        "    return [(x, net()(x).argmax(dim=1))]\n"
    )
    given = ["given.py:net", "--data", "given.py:data"]

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    shown = run("analyze", *given, "--where", "Parameters()", "--out", "found")
    assert "0.weight" in shown
    assert "of the bits of parameters hold" in shown
    formats = json.loads(Path("found/formats.json").read_text())
    assert list(formats) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    campaign = ["--faults", "BitErrorRate([1e-2])", "--trials", "40"]
    run("assess", *given, *campaign, "--out", "plain")
    run("assess", *given, *campaign, "--format", "found/formats.json", "--out", "safe")
    critical = [pd.read_csv(f"{name}/summary.csv")["critical_total"][0] for name in ("safe", "plain")]
    assert critical[0] < 0.8 * critical[1]
    run("estimate-factors", *given, "--margin", "0.03", "--out", "found")
    table = pd.read_csv("found/factors.csv")
    assert (table["factor_high"] - table["factor_low"] <= 0.06).all()
    for wrong in (["analyze", *given, "--where", "Bits()"], ["assess", *given, *campaign, "--format", "missing.json"]):
        result = CliRunner().invoke(app, wrong)
        assert result.exit_code != 0


def test_reproduce_runs_on_made_up_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def images(root: Path, split: str, *, limit: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(int(split == "test"))
        x = torch.randn(limit, 1, 28, 28, generator=generator)
        return list(zip(x.split(batch_size), (torch.arange(limit) % 10).split(batch_size), strict=True))

    study = Study("LeNet-mnist", partial(lenet5), images, train=20, epochs=1, inputs=3, neurons=4)
    made = {"data_root": tmp_path, "workers": 1, "console": Console(quiet=True), "trials": 3}
    maps = run([study], out=tmp_path / "out", **made)
    assert list(maps) == ["LeNet-mnist"]
    table = pd.read_csv(tmp_path / "out" / "tables-1-2-true_non_critical.csv")
    assert len(table) == len(PUBLISHED)
    ours = table[table["network"] == "LeNet-mnist"]
    assert ours["true_non_critical"].between(90, 100).all()
    assert ours["published"].tolist() == [99.992, 99.992]
    for name in ("fig5-LeNet-mnist.png", "fig6.png", "cost.md", "fig5.csv", "validation.md"):
        assert (tmp_path / "out" / name).stat().st_size > 100


def test_reproduce_holds_factors_against_injection_and_shows_what_they_buy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def images(root: Path, split: str, *, limit: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        x = torch.randn(limit, 6, generator=torch.Generator().manual_seed(int(split == "test")))
        return list(zip(x.split(batch_size), x[:, :3].argmax(dim=1).split(batch_size), strict=True))

    def build() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3))

    study = Study("tiny", build, images, train=400, epochs=5, inputs=16)
    console = Console(quiet=True)
    few = {"trials": 2, "injections": 800, "bers": (1e-3, 1e-2)}
    run([study], out=tmp_path, data_root=tmp_path, workers=1, console=console, **few)
    factors = pd.read_csv(tmp_path / "factors.csv")
    assert factors["layer"].astype(str).tolist() == ["0", "2", "0.weight", "0.bias", "2.weight", "2.bias"]
    assert factors["error"].max() < 0.03
    evidence = pd.read_csv(tmp_path / "evidence.csv")
    assert evidence["campaign"].unique().tolist() == ["nothing", "selected", "random", "everything"]
    memory = evidence.drop_duplicates("campaign").set_index("campaign")["memory"]
    assert memory["nothing"] == 1
    assert memory["everything"] == pytest.approx(39 / 32)
    assert 1 < memory["random"] <= memory["selected"] <= 1.1
    critical = evidence[evidence["ber"] == 1e-2].set_index("campaign")["critical_total"]
    assert critical["selected"] <= critical["nothing"]
    assert (tmp_path / "fig4-tiny.png").stat().st_size > 1000


def test_the_paper_scale_holds_the_papers_networks():
    assert [study.name for study in studies("paper")][:5] == list(PUBLISHED["network"].unique()[:5])
