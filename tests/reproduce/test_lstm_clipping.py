"""The chain from networks to tables, on networks that take seconds; the published numbers against the paper's text."""

from __future__ import annotations

import io
import math
import re
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

import flipproof as fp
from flipproof.datasets.ehr import synthetic_ehr
from flipproof.errors import ConfigError
from flipproof.models.stagenet import StageNet
from flipproof.reproduce import lstm_clipping, lstm_published

PAPER = Path(__file__).resolve().parents[3] / "shared" / "papers" / "lstm-clipping.txt"


def tiny(kernel):
    torch.manual_seed(0)
    return StageNet(6, 2, kernel, 2)


def run(out: Path) -> tuple[pd.DataFrame, str]:
    console = Console(file=io.StringIO(), width=200)
    summary = lstm_clipping.reproduce(scale="smoke", data_root=Path("nowhere"), out=out, workers=1, console=console)
    return summary, console.file.getvalue()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("lstm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(lstm_clipping, "clinical", lambda root: ("made-up stays", synthetic_ehr(40, hours=8)))
        patch.setattr(lstm_clipping, "BUILD", tuple(partial(tiny, kernel) for kernel in (3, 2, None, None)))
        patch.setattr(lstm_clipping, "SCALES", {"smoke": (4, 8)})
        first = run(out)
        before = {path: path.read_bytes() for path in sorted((out / "journals").glob("*.jsonl"))}
        again = run(out)
        after = {path: path.read_bytes() for path in sorted((out / "journals").glob("*.jsonl"))}
    return out, first, again, before, after


def test_tables_say_what_the_journals_say(results):
    out, (summary, _), _, _, _ = results
    assert len(summary) == 4 * 4 * 5
    for row in summary.itertuples():
        journal = fp.Assessment.load(out / "journals" / f"{row.network}-{row.method.replace(' ', '')}.jsonl")
        point = journal.summary[journal.summary["ber"] == row.ber].iloc[0]
        assert row.auroc_drop == pytest.approx(point["auroc_drop"])
        assert row.critical_total == pytest.approx(point["critical_total"])
        assert ("Clipped" in str(journal.header.stored)) == ("WBC" in row.method)
        assert not any("bias" in stored.name for stored in journal.header.stored)


def test_avc_leaves_no_due_and_everything_is_written(results):
    out, (summary, text), _, _, _ = results
    assert summary[summary["method"].str.contains("AVC")]["due"].max() == 0
    for number in (1, 2, 3):
        assert (out / f"table-{number}.md").exists()
    for name in ("2a", "2b", "4", "6a", "6b", "7a", "7b", "3-Stage-72", "5-Stage-384", "8-Stage-CONV-72"):
        assert (out / f"figure-{name}.png").stat().st_size > 5000
    claims = (out / "claims.md").read_text()
    assert "bit 30 is the critical bit" in claims
    assert "AVC removes every DUE: holds" in claims
    assert all(line[2:] in text for line in claims.splitlines())
    bits = pd.read_csv(out / "bits-Stage-72.csv")
    assert bits["bit"].tolist() == list(range(32))
    counts = pd.read_csv(out / "table-1.csv").set_index(["network", "quantity"])["published"]
    assert counts["Stage-CONV-72", "conv"] == 51840


def test_a_second_run_resumes_and_says_the_same(results):
    _, (first, _), (second, _), before, after = results
    assert before == after
    pd.testing.assert_frame_equal(first, second)


def test_claims_are_judged_by_intervals():
    rows = []
    for network in lstm_published.NETWORKS:
        for method, value in (("none", 0.5), ("WBC", 0.0), ("AVC", 0.1), ("WBC + AVC", 0.0)):
            drop = {"none": 0.3, "WBC": 0.02, "AVC": 0.1, "WBC + AVC": 0.02}[method]
            rows.append(
                {
                    **{"network": network, "method": method, "ber": 1e-2, "due": 0.1 if method == "none" else 0.0},
                    **{
                        "critical_total": value,
                        "critical_total_low": value - 0.01,
                        "critical_total_high": value + 0.01,
                    },
                    **{"auroc_drop": drop, "auroc_drop_low": drop - 0.01, "auroc_drop_high": drop + 0.01},
                }
            )
    chosen = dict.fromkeys(lstm_published.NETWORKS, "BitClipped(inner=Float32(), zeros=(30,), ones=())")
    said = "\n".join(lstm_clipping._claims(pd.DataFrame(rows), chosen))
    assert "chosen for 4 of 4" in said
    assert "WBC removes every DUE: holds" in said
    assert (
        "Stage-72: WBC loses less AUROC than AVC (published ratio of drops 0.88): holds, by +8.0 points [6.6, 9.4]"
        in said
    )
    assert "Stage-72: both together lose less than WBC: cannot be told" in said
    assert "WBC reduces critical SDC + DUE at 1e-2: Stage-CONV-384 to none" in said
    assert "AVC reduces critical SDC + DUE at 1e-2: Stage-CONV-384 5×" in said


def test_unknown_scales_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="scale"):
        lstm_clipping.reproduce(scale="huge", data_root=tmp_path, out=tmp_path, workers=1, console=Console())


def test_data_is_found_under_the_root(tmp_path):
    assert lstm_clipping.clinical(tmp_path)[0] == "made-up stays"


@pytest.mark.skipif(not PAPER.exists(), reason="needs the paper's text beside the repository")
def test_published_numbers_are_those_of_the_text():
    text = re.sub(r"\s+", " ", PAPER.read_text())
    for values in lstm_published.CRITICAL.values():
        assert all(f"{100 * value:.2f}%" in text for value in values)
    for value in lstm_published.REDUCTION.values():
        assert f"{value}x" in text
    for ratio in lstm_published.WBC_OVER_AVC:
        assert f"{max(ratio, 1 / ratio):.2f}x" in text.replace("×", "x")
    table = lstm_published.table_1()
    for row in table.itertuples():
        shown = f"{100 * row.value:.2f}%" if row.value < 1 and row.value else f"{row.value:.0f}"
        assert shown in text
    assert math.isclose(lstm_published.critical_totals()["critical_total"].max(), 0.9005)
