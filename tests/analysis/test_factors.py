"""Estimated factors against exact ones; the paper's gradient test; ranges as a figure; memory."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.analysis._drawn_inputs import drawn
from flipproof.analysis._two_phase import CRITICAL, HARMLESS, correction, counted, distances, signed
from flipproof.analysis.layer_vulnerability import VERDICTS
from flipproof.errors import FlipproofWarning
from flipproof.reports.vulnerability import range_figure
from flipproof.running.data import read_batches


def tiny() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    return net, [(torch.randn(9, 5), torch.zeros(9)), (torch.randn(7, 5), torch.zeros(7))]


class Bounded(nn.Module):
    """Gives zero for what is too large: the largest errors do least, so a search that starts there stops at once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.abs() <= 1e5, x, torch.zeros_like(x))


def holed(inputs: int, seed: int = 0) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(6, 12), Bounded(), nn.Linear(12, 4))
    torch.manual_seed(seed)
    return net, [(torch.randn(inputs, 6), torch.zeros(inputs))]


EXACT = fp.DeepVigor(factors="exhaustive", ranges=False)
FIRST = fp.Neurons("0")


@pytest.mark.parametrize("where", [fp.Neurons(), fp.Parameters("*weight")], ids=str)
def test_intervals_cover_the_exact_factors_and_keep_to_the_margin(where):
    torch.manual_seed(3)
    net, x = tiny()[0], torch.randn(150, 5)
    data = [(x[:100], torch.zeros(100)), (x[100:], torch.zeros(50))]
    truth = fp.analyze(net, data, EXACT, where=where).layers["lvf"].to_numpy()
    tables = [fp.estimate_factors(net, data, where=where, margin=0.03, seed=seed) for seed in range(5)]
    for ends in ("factor", "given"):
        low = np.array([table[f"{ends}_low"] for table in tables])
        high = np.array([table[f"{ends}_high"] for table in tables])
        assert (high - low <= 0.06).all()
        assert ((low <= truth) & (truth <= high)).mean() > 0.85
    mean = np.array([table["factor"] for table in tables]).mean(axis=0)
    assert np.abs(mean - truth).max() < 0.015
    assert (tables[0]["audited"] > 0).tolist() == [True, True, False]  # behind the last layer every flip is compared


def test_holes_are_found_and_the_estimate_is_unbiased():
    net, data = holed(100)
    truth = float(fp.analyze(net, data, EXACT, where=FIRST).layers["lvf"].item())
    tables = [fp.estimate_factors(net, data, where=FIRST, margin=0.015, seed=seed) for seed in range(12)]
    found = np.array([table[["searched", "factor", "factor_low", "factor_high"]].iloc[0] for table in tables])
    error = found[:, 1].std(ddof=1) / len(tables) ** 0.5
    assert abs(found[:, 1].mean() - truth) < 3 * error
    assert found[:, 0].mean() < truth - 3 * error  # what the search alone says
    assert ((found[:, 2] <= truth) & (truth <= found[:, 3])).mean() > 0.9


def test_a_map_says_what_holes_do_to_its_factors():
    net, data = holed(150)
    exact = fp.analyze(net, data, EXACT, where=FIRST)
    found = fp.analyze(net, data, fp.DeepVigor(ranges=False, fallback=9), where=FIRST)
    row, truth = found.layers.iloc[0], exact.layers.iloc[0]
    assert row["hole_rate"] > 0
    assert row["searched"] < row["lvf"]
    # the same inputs, so that what is left is the audit: the interval over inputs alone is narrower
    assert row["lvf_low"] < truth["lvf"] < row["lvf_high"]
    assert row["lvf_high"] - row["lvf"] > truth["lvf_high"] - truth["lvf"]
    bits, right = found.bits, exact.bits
    assert ((bits["bvf_low"] <= right["bvf"]) & (right["bvf"] <= bits["bvf_high"])).all()
    neurons = found.neurons
    assert neurons["nvf"].mean() == pytest.approx(row["lvf"], rel=0.05)
    assert ((neurons["nvf_low"] <= exact.neurons["nvf"]) & (exact.neurons["nvf"] <= neurons["nvf_high"])).all()
    # by default such a layer is asked flip by flip
    again = fp.analyze(net, data, fp.DeepVigor(ranges=False), where=FIRST)
    assert again.layers["exhaustive"].item()
    assert torch.equal(again.layers_found[0].critical, exact.layers_found[0].critical)
    assert again.layers_found[0].probes > exact.layers_found[0].probes
    # and without an audit the interval holds whatever was not tried
    blind = fp.analyze(net, data, fp.DeepVigor(ranges=False, holes=0), where=FIRST).layers.iloc[0]
    assert blind["lvf_high"] - blind["lvf_low"] > 0.5


def test_ranges_leave_holes_between_harmless_and_critical():
    net, data = holed(20)
    found = fp.analyze(net, data, fp.DeepVigor(factors="exhaustive"), where=FIRST)
    hidden = net[0](data[0][0]).detach()
    golden = net(data[0][0]).argmax(dim=1)
    said = {"non_vulnerable": 0, "vulnerable": 0}
    for neuron in range(12):
        for delta in (*(10.0 ** np.arange(-3, 12)), *(-(10.0 ** np.arange(-3, 12)))):
            changed = hidden.clone()
            changed[:, neuron] += delta
            critical = net[2](net[1](changed)).argmax(dim=1) != golden
            verdict = found.classify("0", neuron, float(delta))
            if verdict in said:
                said[verdict] += 1
                assert critical.any() == (verdict == "vulnerable"), (neuron, delta)
    assert said["non_vulnerable"] > 50


def test_intervals_of_a_map_are_over_the_population_of_inputs():
    """Maps of 24 inputs each, against the factor over 1,000; exact maps had no width at all before."""
    net, data = holed(1000, seed=5)
    x = data[0][0]
    whole = fp.analyze(net, data, EXACT, where=FIRST)
    truth, by_bit = float(whole.layers["lvf"].item()), whole.bits["bvf"].to_numpy()
    draw = torch.Generator().manual_seed(0)
    covered, bits = [], []
    for _ in range(40):
        some = torch.randint(0, 1000, (24,), generator=draw)
        found = fp.analyze(net, [(x[some], torch.zeros(24))], EXACT, where=FIRST)
        row = found.layers.iloc[0]
        covered.append(row["lvf_low"] <= truth <= row["lvf_high"])
        bits.append(((found.bits["bvf_low"] <= by_bit) & (by_bit <= found.bits["bvf_high"]))[by_bit > 0.05].mean())
    assert np.mean(covered) > 0.85
    assert np.mean(bits) > 0.85


def test_too_few_inputs_are_said_to_be_too_few():
    net, _ = tiny()
    x = torch.randn(6, 5)
    with pytest.warns(
        FlipproofWarning, match=r"6 inputs do not say more about their population than ± 0\..* About \d+"
    ):
        table = fp.estimate_factors(net, [(x, torch.zeros(6))], where=FIRST, margin=0.02)
    row = table.iloc[0]
    assert row["factor_high"] - row["factor_low"] > 0.04
    assert row["given_high"] - row["given_low"] <= 0.04
    assert row["factor_low"] <= row["given_low"] <= row["factor"] <= row["given_high"] <= row["factor_high"]
    with pytest.warns(FlipproofWarning, match="1 inputs do not say"):
        one = fp.estimate_factors(net, [(x[:1], torch.zeros(1))], where=FIRST, margin=0.05).iloc[0]
    assert (one["factor_low"], one["factor_high"]) == (0, 1)


def test_nothing_is_computed_about_inputs_that_are_not_drawn():
    """A long test set in one batch costs what a short one does."""
    net, _ = tiny()
    torch.manual_seed(8)
    x = torch.randn(6000, 5)
    rows: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows.append(len(x))
            return x

    counting = nn.Sequential(Counting(), *net)
    ran, said = [], []
    for many in (500, 6000):
        rows.clear()
        table = fp.estimate_factors(counting, [(x[:many], torch.zeros(many))], where=fp.Neurons("1"), margin=0.03)
        ran.append(sum(rows))
        said.append(float(table["forwards"].item()))
    assert ran[1] < 1.5 * ran[0]
    assert said[1] < 1.5 * said[0]
    assert ran[1] < 1700  # a batch once more to see which axis counts samples


@pytest.mark.parametrize("kind", ["one tensor", "pair", "other shapes", "not by row"])
def test_drawn_inputs_are_those_given(kind):
    torch.manual_seed(0)
    parts = [torch.randn(n, 3) for n in (5, 7, 4)]
    inputs = {
        "one tensor": parts,
        "pair": [(x, x + 1) for x in parts],
        "other shapes": [torch.cat([x] * (i + 1), dim=1) for i, x in enumerate(parts)],
        "not by row": [{"x": x, "scale": 2.0} for x in parts],
    }[kind]
    targets = [torch.arange(len(x)) + 10 * i for i, x in enumerate(parts)]
    given = read_batches(list(zip(inputs, targets, strict=True)), torch.device("cpu"))
    made, order = drawn(given, 6, seed=1)
    assert order.numel() == 6 == len(set(order.tolist()))
    for place in order.tolist():
        batch = next(i for i in range(len(made.sizes)) if made.part(i).start <= place < made.part(i).stop)
        row = place - made.part(batch).start
        leaf = made.inputs[batch]
        leaf = leaf["x"] if isinstance(leaf, dict) else leaf[0] if isinstance(leaf, tuple) else leaf
        target = int(made.targets[place])
        assert torch.equal(leaf[row][:3], parts[target // 10][target % 10])
    if kind != "not by row":
        assert made.samples == 6


def test_the_correction_is_unbiased_and_its_bounds_cover_whatever_the_holes_are():
    rng = np.random.default_rng(0)
    for wrong_h, wrong_c in ((0.0, 0.0), (0.002, 0.3), (0.05, 0.01), (0.4, 0.0)):
        left = torch.from_numpy(np.where(rng.random((300, 8)) < 0.8, HARMLESS, CRITICAL)).to(torch.int8)
        rate = torch.where(left == HARMLESS, wrong_h, wrong_c).numpy() * np.linspace(0, 2, 8)
        truth = torch.from_numpy(rng.random((300, 8)) < rate)
        really = float((truth & (left == HARMLESS)).sum() - (truth & (left == CRITICAL)).sum())
        found, covered, weighed = [], [], []
        for _ in range(120):
            asked = torch.from_numpy(rng.random((300, 8)) < 0.1)
            counts = counted(left, asked, truth & asked)
            found.append(float(correction(counts).sum()))
            below, above = distances(counts)
            covered.append(found[-1] - below - 1e-6 <= really <= found[-1] + above + 1e-6)
            weighed.append(float(signed(left, truth & asked, 0.1).sum()))
        for values in (found, weighed):
            assert abs(np.mean(values) - really) <= 4 * np.std(values) / 120**0.5 + 1e-9
        assert np.mean(covered) >= 0.9
    everything = torch.ones(300, 8, dtype=torch.bool)
    assert distances(counted(left, everything, truth)) == (0.0, 0.0)
    assert float(correction(counted(left, everything, truth)).sum()) == really


def test_the_same_seed_draws_the_same_and_another_margin_more():
    net, data = holed(300)
    one, two = (fp.estimate_factors(net, data, where=FIRST, seed=4) for _ in range(2))
    assert one.equals(two)
    assert (fp.estimate_factors(net, data, where=FIRST, seed=4, margin=0.03)["pairs"] < one["pairs"]).all()
    with pytest.raises(fp.FlipproofError, match="margin and confidence"):
        fp.estimate_factors(net, data, margin=0)


def test_gradient_skips_what_it_calls_harmless_and_holes_tell_where_it_is_wrong():
    net, data = tiny()
    plain = fp.analyze(net, data, fp.DeepVigor(holes=400))
    quick = fp.analyze(net, data, fp.DeepVigor(gradient=True, holes=400))
    first, same = quick.layers_found[0], plain.layers_found[0]
    x = torch.cat([x for x, _ in data])
    silent = net[0](x) <= 0  # nothing flows back through a ReLU that is closed
    assert first.probes < same.probes
    assert int(first.critical.sum()) < int(same.critical.sum())
    assert first.holes > same.holes
    # skipped in every input: nothing finite is critical for it
    never = silent.all(dim=0)
    assert bool((~silent).any())
    assert int(first.critical[never].sum()) == int(first.nans[never, 1].sum())
    # where gradients flow the answers are the same
    always = (~silent).all(dim=0)
    assert torch.equal(first.critical[always], same.critical[always])
    assert torch.equal(quick.layers_found[1].critical, plain.layers_found[1].critical)
    for wrong in ({"factors": "exhaustive"},):
        with pytest.raises(fp.FlipproofError, match="choose one"):
            fp.DeepVigor(gradient=True, **wrong)
    with pytest.raises(fp.FlipproofError, match="about neurons"):
        fp.analyze(net, data, fp.DeepVigor(gradient=True), where=fp.Parameters())


def test_the_gradient_is_that_of_finite_differences():
    from flipproof.analysis.opened_model import opened

    net, data = tiny()
    exact = copy.deepcopy(net).double()
    with opened(net, data, fp.Neurons(), None, None, 2**24) as prober, torch.no_grad():
        layer = prober.at(prober.sites[1].name, 0)
        found = layer.gradient().double()
        values, step = layer.values.double(), 1e-6

        def loss(hidden: torch.Tensor) -> torch.Tensor:
            scores = exact[4](torch.tanh(hidden))
            golden = layer.classes[:, None]
            return (scores.gather(1, golden) - scores).sigmoid().sum(dim=1)

        for neuron in range(8):
            up, down = values.clone(), values.clone()
            up[:, neuron] += step
            down[:, neuron] -= step
            expected = (loss(up) - loss(down)) / (2 * step)
            assert torch.allclose(found[:, neuron], expected, atol=1e-6)


def test_range_figure_shows_what_classify_says():
    net, data = tiny()
    found = fp.analyze(net, data)
    figure = range_figure(found, "2", neurons=5)
    (axes,) = figure.axes
    labels = [int(label.get_text()) for label in axes.get_yticklabels()]
    assert len(labels) == 5
    names = {"harmless to all": VERDICTS[0], "critical for all": VERDICTS[2]}
    checked = 0
    for container in axes.containers:
        if container.get_label() in names:
            for neuron, bar in zip(labels, container, strict=True):
                if bar.get_width() > 0:
                    middle = bar.get_x() + bar.get_width() / 2
                    assert found.classify("2", neuron, middle) == names[container.get_label()]
                    checked += 1
    assert checked >= 5
    with pytest.raises(fp.FlipproofError, match="at least one"):
        range_figure(found, "2", neurons=0)


def test_working_memory_is_bounded():
    """Less than one tensor of neurons × inputs × bits is ever taken; a dozen of them would be alive without a bound."""
    code = """
import resource, torch, flipproof as fp
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 2))
data = [(torch.randn(32, 8), torch.zeros(32))]
method = fp.DeepVigor(ranges=False, holes=0, max_bytes=2**21, neurons=64)
fp.analyze(net, data, method, where=fp.Neurons("0"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fp.analyze(net, data, fp.DeepVigor(ranges=False, holes=0, max_bytes=2**21), where=fp.Neurons("0"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) < 32 * 4096 * 32 * 8
