import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.errors import ConfigError, JournalMismatch
from flipproof.reports.tradeoff import tradeoff_figure
from flipproof.storage import explore as fortune

RATES = fp.BitErrorRate([1e-3, 1e-2])
WEIGHTS = fp.Parameters(kinds=("weight",))


@pytest.fixture
def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(100, 8)
    return net, [(x, net(x).argmax(dim=1))]


def run(network, **changes):
    net, data = network
    setup = {"accuracy": 0.8, "drop": 0.2, "faults": RATES, "trials": 10, "progress": False}
    return fp.explore(net, data, **{**setup, **changes})


@pytest.mark.parametrize("least", range(2, 10))
def test_bisection_finds_the_narrowest_feasible_width(least):
    tried = {}
    while (width := fortune._next_width(2, 8, tried, "bisection")) is not None:
        assert width not in tried
        tried[width] = width >= least
    assert len(tried) <= 3
    assert min((w for w, good in tried.items() if good), default=9) == least


def test_numbers_are_those_of_assess_and_closed_forms(network):
    net, data = network
    found = run(network, search="exhaustive", bits=(3, 5))
    assert found.candidates["width"].tolist() == [8, 5, 6, 7]
    weights = 8 * 32 + 32 * 4
    assert found.candidates["memory"].tolist() == [weights * w for w in (8, 5, 6, 7)]
    assert found.candidates["memory_ratio"].tolist() == [1.0, 0.625, 0.75, 0.875]
    for bits, row in zip((3, 4, 5), found.candidates.iloc[1:].itertuples(), strict=True):
        format = fp.TripleMSB(fp.Affine(bits=bits))
        alone = fp.assess(net, data=data, faults=RATES, format=format, where=WEIGHTS, trials=10)
        assert row.accuracy == alone.golden["accuracy"]
        assert row.drop == pytest.approx(alone.summary["accuracy_drop"].max())
        assert row.rap == pytest.approx(100 * row.drop * row.memory_ratio * row.time_ratio)
        own = found.rates[found.rates["format"] == repr(format)]
        assert own["accuracy_drop"].tolist() == alone.summary["accuracy_drop"].tolist()
        drops = 100 * own["accuracy_drop"].to_numpy()
        expected = (weights * format.width) ** 2 * own["ber"].to_numpy() * 1.33e-15
        assert np.allclose(own["p_drop"], expected * drops)
        assert np.allclose(own["p_drop_published"], expected * drops[-1])


def test_the_narrowest_that_meets_both_thresholds_is_chosen(network):
    table = run(network, search="exhaustive").candidates.iloc[1:]
    limit = float(table["drop"].median())
    exhaustive = run(network, search="exhaustive", drop=limit)
    good = exhaustive.candidates.iloc[1:]
    good = good[good["feasible"]]
    assert exhaustive.chosen == fp.TripleMSB(fp.Affine(bits=int(good["width"].min()) - 2))
    assert bool((good["drop"] <= limit).all())
    bisected = run(network)
    assert bisected.chosen == fp.TripleMSB(fp.Affine(bits=3))
    assert len(bisected.candidates) < len(table)


def test_widths_below_the_accuracy_are_reported_but_not_injected(network):
    found = run(network, accuracy=1.0, bits=(2, 3), search="exhaustive")
    assert found.chosen is None
    assert found.candidates["drop"].isna().tolist() == [False, True, True]
    assert not found.candidates["feasible"].any()
    assert "no width meets both" in str(found)
    assert set(found.rates["format"]) == {repr(fp.Affine(bits=8))}


def test_the_wide_mode_combines_formats_and_hardenings_and_marks_the_front(network):
    found = run(
        network, bits=(3, 3), formats=[fp.SECDED(fp.Affine(bits=8)), fp.Float32()],
        hardenings={"ranger": fp.Ranger()}, calibration=network[1],
    )  # fmt: skip
    table = found.candidates
    assert len(table) == 2 * 4
    assert set(table["hardening"]) == {"none", "ranger"}
    points = table[["accuracy", "drop", "memory"]].to_numpy()
    for i, row in enumerate(points):
        beaten = any(
            a >= row[0] and d <= row[1] and m <= row[2] and tuple(p) != tuple(row) for p in points for a, d, m in [p]
        )
        assert table["front"].iloc[i] == (not beaten)
    assert table["front"].any()
    labels = [text.get_text() for text in tradeoff_figure(found).axes[0].texts]
    assert "P-3" in labels


def test_memory_may_be_all_that_is_stored(network):
    found = run(network, bits=(3, 3), formats=[fp.Float32()], where=fp.Parameters())
    assert found.candidates["memory"].tolist() == [384 * width + 36 * 32 for width in (8, 5, 32)]
    assert found.candidates["coverage"].tolist() == [1, 1, 1]
    weights = run(network, bits=(3, 3), formats=[fp.Float32()]).candidates
    assert weights["memory"].tolist() == [384 * width for width in (8, 5, 32)]  # like for like
    assert weights["coverage"].tolist() == [384 * width / (384 * width + 36 * 32) for width in (8, 5, 32)]


def test_it_resumes_with_the_same_table_times_included(network, tmp_path):
    first = run(network, journal=tmp_path, hardenings={"ranger": fp.Ranger()}, calibration=network[1])
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert len(before) == len(first.assessments) + 1
    again = run(network, journal=tmp_path, hardenings={"ranger": fp.Ranger()}, calibration=network[1])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == before
    pd.testing.assert_frame_equal(first.candidates, again.candidates)
    pd.testing.assert_frame_equal(first.rates, again.rates)
    assert first.candidates["time_ratio"].notna().all()
    lines = (tmp_path / "forms.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "forms.jsonl").write_text("".join(lines[:3]))  # killed while it judged the third form
    third = run(network, journal=tmp_path, hardenings={"ranger": fp.Ranger()}, calibration=network[1])
    timed = ["time_ratio", "rap"]
    pd.testing.assert_frame_equal(third.candidates.iloc[:2], first.candidates.iloc[:2])
    pd.testing.assert_frame_equal(third.candidates.drop(columns=timed), first.candidates.drop(columns=timed))
    assert len((tmp_path / "forms.jsonl").read_text().splitlines()) == len(lines)


def test_another_network_or_other_data_is_not_resumed(network, tmp_path):
    net, data = network
    run(network, journal=tmp_path, bits=(3, 3))
    inputs, labels = data[0]
    with pytest.raises(JournalMismatch):
        run((net, [(inputs + 1, labels)]), journal=tmp_path, bits=(3, 3))
    with torch.no_grad():
        net[0].weight[0, 0] += 1
    with pytest.raises(JournalMismatch):
        run(network, journal=tmp_path, bits=(3, 3))


def test_a_form_that_was_too_inaccurate_is_injected_when_it_is_asked_for(network):
    protected = fp.TripleMSB(fp.Affine(bits=3))
    found = run(network, accuracy=1.0, bits=(3, 3), formats=[protected])
    assert found.candidates["format"].tolist() == [repr(fp.Affine(bits=8)), repr(protected)]
    assert found.candidates["drop"].notna().all()


def test_names_that_look_alike_have_journals_of_their_own():
    names = ["a b/Affine(bits=8)", "a-b/Affine(bits=8)", "A b/Affine(bits=8)", "x" * 300, "x" * 301, "é", "è"]
    files = [fortune.file_name(name) for name in names]
    assert len(set(files)) == len(names)
    assert all(len(file) < 120 and file.isascii() and "/" not in file for file in files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": 90}, "fractions"),
        ({"drop": -0.1}, "fractions"),
        ({"bits": (1, 8)}, "from 2 to 8"),
        ({"bits": (6, 4)}, "from 2 to 8"),
        ({"search": "random"}, "bisection"),
        ({"hardenings": {"r": fp.Ranger()}}, "calibration"),
    ],
)
def test_bad_arguments_are_refused(network, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(network, **changes)
