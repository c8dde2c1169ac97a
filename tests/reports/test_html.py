from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

import flipproof as fp
from flipproof.errors import ConfigError
from flipproof.reports.tables import findings


@pytest.fixture
def assess(mlp, blobs):
    def assess(**change):
        setup = {"data": blobs, "faults": fp.BitErrorRate([1e-2, 5e-2]), "trials": 20, **change}
        return fp.assess(mlp, **setup)

    return assess


class Page(HTMLParser):
    """Rows of cells, text outside scripts, and whatever a page would have to fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.text = ""
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.fetched += [f"{tag} {value}" for name, value in attrs if name in ("src", "href") and value]
        if tag == "tr":
            self.rows.append([])
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        if not {"script", "style"} & set(self.open):
            self.text += data


def test_every_number_of_the_tables_is_on_the_page(assess, tmp_path):
    base, half = assess(metrics=("accuracy", "auroc")), assess(metrics=("accuracy", "auroc"), format=fp.Float16())
    path = fp.report(tmp_path / "new" / "report.html", base=base, half=half)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    cells = {cell for row in page.rows for cell in row}
    for result in (base, half):
        for sentence in findings(result):
            assert sentence in page.text
        for _, row in result.summary.iterrows():
            for name in ("accuracy", "auroc", "masked", "due"):
                shown = " ".join(
                    f"{100 * row[key]:.1f}".replace("-0.0", "0.0") for key in (name, f"{name}_low", f"{name}_high")
                )
                mean, low, high = shown.split()
                assert f"{mean} [{low}, {high}]" in cells
    table = fp.compare(base=base, half=half)
    gain = table.iloc[2]
    value, low, high = (100 * gain[f"auroc_gain{end}"] for end in ("", "_low", "_high"))
    assert f"{value:+.1f} [{low:.1f}, {high:.1f}]" in cells
    low, high = 100 * gain["accuracy_gain_both_low"], 100 * gain["accuracy_gain_both_high"]
    assert f"[{low:.1f}, {high:.1f}]".replace("-0.0", "0.0") in cells
    for heading in ("accuracy % [over trials]", "accuracy [over trials and samples]", "accuracy tail"):
        assert heading in cells
    assert "0.500 ×" in cells


def numbers(array: dict[str, str] | list[float]) -> list[float]:
    """Plotly writes arrays as base64."""
    if isinstance(array, list):
        return array
    return np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"]).tolist()


def test_the_plots_draw_the_summary(assess, tmp_path):
    base = assess()
    text = fp.report(tmp_path / "report.html", base=base).read_text(encoding="utf-8")
    calls = re.findall(r"Plotly\.newPlot\(\s*\"[^\"]+\",\s*(\[.*?\]),\s*\{\"template", text, re.DOTALL)
    (line,), outcomes = (json.loads(call) for call in calls)
    assert numbers(line["x"]) == pytest.approx(base.summary["ber"].tolist())
    assert numbers(line["y"]) == pytest.approx(base.summary["accuracy"].tolist())
    assert [trace["name"] for trace in outcomes] == ["masked", "non-critical SDC", "critical SDC", "DUE"]
    assert numbers(outcomes[3]["y"]) == pytest.approx(base.summary["due"].tolist())


def test_the_page_needs_nothing_else_and_names_are_escaped(assess, tmp_path):
    page = Page(fp.report(tmp_path / "r.html", **{"<b>&me": assess()}).read_text(encoding="utf-8"))
    assert page.fetched == []
    assert "<b>&me" in page.text


def test_nothing_to_report_leaves_the_old_page(assess, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    full = assess()
    with pytest.raises(ConfigError, match="at least one assessment"):
        fp.report(path)
    with pytest.raises(ConfigError, match="empty has no trial yet"):
        fp.report(path, full=full, empty=fp.Assessment(full.header, []))
    with pytest.raises(ConfigError, match="cannot be compared"):
        fp.report(path, a=full, b=assess(metrics=("auroc",)))
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("name", ["<b>bold</b>", "$x_1$", "[bold]x", "</script>"])
def test_names_are_text(assess, tmp_path, name):
    base = assess()
    content = fp.report(tmp_path / "report.html", **{name: base, "other": assess(seed=3)}).read_text(encoding="utf-8")
    page = Page(content)
    assert page.open == []
    assert name in {cell for row in page.rows for cell in row}
    assert "<b>bold" not in content
