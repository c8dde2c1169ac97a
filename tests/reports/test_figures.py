"""What the figures draw is what the tables say."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import cbook
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.ticker import PercentFormatter

import flipproof as fp
from flipproof.errors import ConfigError
from flipproof.reports.figures import bit_figure, metric_figure, outcome_figure, save
from flipproof.running.scales import OUTCOMES


@pytest.fixture
def sweep(mlp, blobs):
    return fp.assess(
        mlp, data=blobs, faults=fp.BitErrorRate([1e-3, 1e-2, 1e-1]), trials=20, metrics=("accuracy", "auroc")
    )


@pytest.mark.parametrize("metric", ["accuracy", "auroc"])
def test_lines_are_means_bands_are_intervals_dashes_are_golden(sweep, metric):
    (axes,) = metric_figure({"a": sweep, "b": sweep}, metric=metric).axes
    line, dashed = axes.lines[:2]
    np.testing.assert_allclose(line.get_xdata(), sweep.summary["ber"])
    np.testing.assert_allclose(line.get_ydata(), sweep.summary[metric])
    assert set(dashed.get_ydata()) == {sweep.golden[metric]}
    band = next(c for c in axes.collections if isinstance(c, FillBetweenPolyCollection))
    corners = band.get_paths()[0].vertices[:, 1]
    assert {*sweep.summary[f"{metric}_low"], *sweep.summary[f"{metric}_high"]} <= set(corners)
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_stacked_outcomes_add_up_to_one(sweep):
    (axes,) = outcome_figure(sweep).axes
    heights = np.array([[bar.get_height() for bar in group] for group in axes.containers])
    np.testing.assert_allclose(heights, sweep.summary[list(OUTCOMES)].to_numpy().T)
    tops = [bar.get_y() + bar.get_height() for bar in axes.containers[-1]]
    np.testing.assert_allclose(tops, 1)


def test_bits_are_drawn_where_they_are(mlp, blobs):
    bits = fp.assess(mlp, data=blobs, faults=fp.BitPosition(range(32)))
    (axes,) = bit_figure(bits).axes
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.containers[0]}
    assert heights == pytest.approx(dict(zip(bits.summary["bit"], bits.summary["accuracy_drop"], strict=True)))
    assert axes.xaxis_inverted()  # the most significant bit is on the left, as it is written


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_saved_into_new_folders(sweep, tmp_path, suffix):
    path = save(metric_figure({"a": sweep}), tmp_path / "new" / f"figure.{suffix}")
    assert path.read_bytes()[:4] in (b"\x89PNG", b"%PDF", b"<?xm")


def test_nothing_to_draw_is_refused(sweep, mlp, blobs):
    with pytest.raises(ConfigError, match="at least one assessment"):
        metric_figure({})
    with pytest.raises(ConfigError, match="BitPosition"):
        bit_figure(sweep)
    with pytest.raises(ConfigError, match="no trial yet"):
        outcome_figure(fp.Assessment(sweep.header, []))


def test_many_campaigns_stay_apart(sweep):
    figure = metric_figure({str(i): sweep for i in range(9)})
    lines = figure.axes[0].lines[::2]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == 9
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [str(i) for i in range(9)]


@pytest.mark.parametrize("name", ["$x_1$", "_base", "<b>", "[bold]x", "100 $"])
def test_names_are_drawn_as_they_are(sweep, tmp_path, name):
    figure = metric_figure({name: sweep, "other": sweep})
    texts = figure.axes[0].get_legend().get_texts()
    assert len(texts) == 2
    assert texts[0].get_text().replace("\\$", "$").strip() == name
    assert cbook.is_math_text(texts[0].get_text()) is False
    assert save(figure, tmp_path / "figure.png").exists()


def test_only_shares_are_percent(mlp, blobs):
    def margin(outputs, targets):
        return outputs.max()

    result = fp.assess(mlp, data=blobs, faults=fp.BitErrorRate([1e-3, 1e-2]), trials=5, metrics=[margin, "accuracy"])
    (own,), (share,) = (metric_figure({"a": result}, metric=name).axes for name in ("margin", "accuracy"))
    assert not isinstance(own.yaxis.get_major_formatter(), PercentFormatter)
    assert isinstance(share.yaxis.get_major_formatter(), PercentFormatter)
    assert "over trials" in share.get_title(loc="left")
