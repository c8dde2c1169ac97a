"""The chain from networks to tables, on networks that take seconds; the published numbers against the paper's text."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from torch import nn

import flipproof as fp
from flipproof.datasets import digits
from flipproof.errors import ConfigError, DataError
from flipproof.reports.bounds import distribution_figure
from flipproof.reproduce import proact, proact_distances, proact_memory, proact_published

PAPER = Path(__file__).resolve().parents[3] / "shared" / "papers" / "proact.txt"


def tiny() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 12), nn.ReLU()),
            nn.Linear(12, 10),
        )


def run(out: Path) -> tuple[pd.DataFrame, str]:
    console = Console(file=io.StringIO(), width=200)
    summary = proact.reproduce(scale="smoke", data_root=Path("nowhere"), out=out, workers=1, console=console)
    return summary, console.file.getvalue()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("proact")
    methods = {
        "none": None,
        "Ranger (layer)": fp.Ranger(replace="zero"),
        "Guard": fp.Guard(),
        "FT-ClipAct": fp.FTClipAct(points=2, rounds=1, trials=1, bers=(1e-3,)),
        "FitAct": fp.FitAct(epochs=1, held_out=0.5),
        "ProAct": fp.ProAct(epochs=1, epochs_last=1, held_out=0.5),
    }
    test = digits("test", batch_size=60)[:1]
    subject = proact.Subject("Tiny CIFAR-10", tiny, test, digits("train", batch_size=60)[:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proact, "_setting", lambda scale: proact.Setting(3, methods))
        patch.setattr(proact, "_subjects", lambda scale, root: [subject])
        patch.setattr(proact, "RATES", (1e-3, 1e-2))
        patch.setattr(proact, "memory_table", lambda: pd.DataFrame({"network": ["x"], "memory_percent": [1.0]}))
        patch.setattr(proact_distances, "LAYER_WISE", 1e-2)
        first = run(out)
        before = {path: path.read_bytes() for path in sorted((out / "journals").glob("*.jsonl"))}
        again = run(out)
        after = {path: path.read_bytes() for path in sorted((out / "journals").glob("*.jsonl"))}
    return out, first, again, before, after


def test_tables_say_what_the_journals_say(results):
    out, (summary, _), _, _, _ = results
    assert len(summary) == 6 * 2
    for row in summary.itertuples():
        name = proact.slug(row.method)
        journal = fp.Assessment.load(out / "journals" / f"tiny-cifar-10-{name}.jsonl")
        point = journal.summary[journal.summary["ber"] == row.ber].iloc[0]
        assert row.accuracy == pytest.approx(point["accuracy"])
        base = fp.Assessment.load(out / "journals" / "tiny-cifar-10-none.jsonl").golden["accuracy"]
        assert row.accuracy_drop == pytest.approx(base - point["accuracy"])
        assert row.clean_drop == pytest.approx(base - journal.golden["accuracy"])


def test_everything_is_written(results):
    out, (_, text), _, _, _ = results
    for number in range(1, 7):
        assert (out / f"table-{number}.csv").exists()
        assert (out / f"table-{number}.md").read_text().startswith("# ")
    for name in ("figure-3", "figure-5", "figure-6"):
        assert (out / f"{name}-tiny-cifar-10.png").stat().st_size > 1000
    assert (out / "history-tiny-cifar-10-proact.png").exists()
    assert "ProAct ≥ FitAct" in text
    assert "Guard ≥ ProAct" in (out / "claims.md").read_text()
    costs = pd.read_csv(out / "table-5.csv")
    assert costs["l2"].notna().sum() == 2  # FitAct and ProAct, as in the paper


def test_published_rows_stand_beside_ours(results):
    table = pd.read_csv(results[0] / "table-2.csv")
    assert len(table) == 6 + len(
        proact_published.table_2()
    )  # ours is another network: nothing coincides, nothing is lost
    assert table["published"].notna().sum() == len(proact_published.table_2())


def test_gains_over_proact_are_paired(results):
    table = pd.read_csv(results[0] / "table-6.csv")
    assert table["paired"].all()
    assert set(table["campaign"]) == {"fitact", "guard"}
    one, two = (
        fp.Assessment.load(results[0] / "journals" / f"tiny-cifar-10-{name}-paired.jsonl").summary["accuracy"]
        for name in ("guard", "proact")
    )
    np.testing.assert_allclose(table[table["campaign"] == "guard"]["accuracy_gain"], one - two)


def test_a_second_run_resumes(results):
    _, (first, _), (second, _), before, after = results
    pd.testing.assert_frame_equal(first, second)
    assert before == after


def test_memory_of_the_papers_networks_by_formula():
    neurons, parameters = proact_memory._neurons(fp.models.vgg16(10), 10)
    assert (sum(neurons), len(neurons), parameters) == (276_480, 13, 14_719_818)
    assert 100 * (len(neurons) - 1 + neurons[-1]) / parameters == pytest.approx(0.0140, abs=5e-5)


@pytest.mark.skipif(not PAPER.exists(), reason="needs the paper's text beside the repository")
def test_published_numbers_are_those_of_the_paper():
    text = PAPER.read_text(encoding="utf-8")
    for drop in proact_published.table_4()["accuracy_drop"]:
        assert f"{100 * drop:.2f}%" in text
    for drop in proact_published.table_2()["clean_drop"]:
        assert f"{100 * drop:.2f}%" in text.replace("4.68%", "4.69%")
    for accuracy in proact_published.table_1()["accuracy"]:
        assert f"{100 * accuracy:.2f}%" in text
    assert all(str(value) in text for value in proact_published.table_5()["l2"])


def test_claims_weigh_their_intervals():
    def rows(method, accuracy, half):
        return [
            {"network": "N", "method": method, "ber": ber, "accuracy": accuracy, "accuracy_low": accuracy - half,
             "accuracy_high": accuracy + half, "clean_drop": 0.0}
            for ber in (1e-7, 3e-6, 1e-5)
        ]  # fmt: skip

    accuracy = {"ProAct": 0.8, "FitAct": 0.7, "FT-ClipAct": 0.71, "Ranger (layer)": 0.75, "none": 0.1, "Guard": 0.8}
    table = pd.DataFrame([row for name, value in accuracy.items() for row in rows(name, value, 0.02)])
    said = proact._claims(table)
    verdicts = [sentence.split(": ")[1] for sentence in said][:6]
    assert verdicts[0] == "ProAct ≥ FitAct holds"
    assert verdicts[1] == "FitAct ≥ FT-ClipAct cannot be told"
    assert verdicts[2] == "FT-ClipAct ≥ Ranger (layer) does not hold"
    assert verdicts[4] == "Guard ≥ ProAct cannot be told"
    half = (2 * 2 * 0.02**2) ** 0.5 / 2  # two rates, two intervals each
    assert f"[{100 * (0.1 - half):.1f}, {100 * (0.1 + half):.1f}]" in said[0]


def test_histograms_draw_first_middle_and_last():
    layers = [f"layer{i}" for i in range(5)]
    edges = np.linspace(0, 1, 4)
    parts = [
        pd.DataFrame({"layer": n, "low": edges[:-1], "high": edges[1:], "golden": 1 / 3, "faulty": 1 / 3})
        for n in layers
    ]
    figure = distribution_figure(pd.concat(parts))
    assert [axes.get_title() for axes in figure.axes] == ["layer0", "layer2", "layer4"]


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match="scale is 'smoke' or 'paper', got 'huge'"):
        proact.reproduce(scale="huge", data_root=tmp_path, out=tmp_path, workers=1, console=Console())
    pytest.importorskip("torchvision")
    with pytest.raises(DataError, match="no CIFAR10 in"):
        proact.reproduce(scale="smoke", data_root=tmp_path, out=tmp_path / "out", workers=1, console=Console())
    assert not (tmp_path / "out").exists()
