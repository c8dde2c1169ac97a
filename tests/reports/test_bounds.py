from __future__ import annotations

import numpy as np
import pytest

import flipproof as fp
from flipproof.errors import ConfigError
from flipproof.hardening.report import hardening_report
from flipproof.reports.bounds import history_figure


def test_history_of_a_training(mlp, blobs):
    safe = fp.harden(mlp, fp.ProAct(epochs=2, epochs_last=3, held_out=0.5), data=blobs)
    report = hardening_report(safe)
    left, right = history_figure(report).axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), report.history["mean_threshold"])
    np.testing.assert_allclose(right.lines[0].get_ydata(), report.history["held_out_accuracy"])


def test_history_of_a_search(mlp, blobs):
    safe = fp.harden(mlp, fp.FTClipAct(points=3, rounds=1, trials=1, bers=(1e-2,)), data=blobs)
    report = hardening_report(safe)
    left, _ = history_figure(report).axes
    ordered = report.history.sort_values("threshold")
    np.testing.assert_allclose(left.lines[0].get_xdata(), ordered["threshold"])
    np.testing.assert_allclose(left.lines[0].get_ydata(), ordered["area"])


@pytest.mark.filterwarnings("ignore:.*costs accuracy:flipproof.FlipproofWarning")
def test_history_of_a_search_along_a_line(mlp, blobs):
    safe = fp.harden(mlp, fp.ProAct(search="line", held_out=0.5, budget=0.5), data=blobs)
    report = hardening_report(safe)
    left, right = history_figure(report).axes
    ordered = report.history.sort_values("scale")
    np.testing.assert_allclose(left.lines[0].get_xdata(), ordered["scale"])
    np.testing.assert_allclose(left.lines[0].get_ydata(), ordered["loss"])
    np.testing.assert_allclose(right.lines[0].get_ydata(), report.history.loc[report.history["accepted"], "scale"])


def test_closed_forms_have_none(mlp, blobs):
    with pytest.raises(ConfigError, match="has no history"):
        history_figure(hardening_report(fp.harden(mlp, fp.Guard(), data=blobs)))
