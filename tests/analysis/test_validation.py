"""What `validate` promises: by class, over inputs, for the output that was analysed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import flipproof as fp
from flipproof.analysis.validation import clustered_interval
from flipproof.campaigns.statistics import wilson_interval


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))


def batch(seed: int, count: int = 40) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return [(x, torch.zeros(count))]


def simulated(scenario: str, inputs: int, runs: int, interval) -> float:
    """How often an interval holds the true share; flips into one input are alike."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(runs):
        asked = rng.poisson(20, inputs)
        p, truth = {
            "all alike": (np.full(inputs, 0.99), 0.99),
            "inputs differ": (rng.beta(1.3, 0.7, inputs), 0.65),
            "few inputs are bad": (np.where(rng.random(inputs) < 0.05, 0.5, 1.0), 0.975),
        }[scenario]
        low, high = interval(rng.binomial(asked, p), asked)
        inside += low <= truth <= high
    return inside / runs


@pytest.mark.parametrize("inputs", [10, 32, 100])
@pytest.mark.parametrize("scenario", ["all alike", "inputs differ", "few inputs are bad"])
def test_intervals_over_inputs_hold_what_they_promise(scenario, inputs):
    assert simulated(scenario, inputs, 400, clustered_interval) >= 0.925


@pytest.mark.parametrize(("scenario", "inputs"), [("inputs differ", 32), ("few inputs are bad", 100)])
def test_flips_taken_as_independent_promise_too_much(scenario, inputs):
    def plain(right, asked):
        return wilson_interval(int(right.sum()), int(asked.sum()))

    assert simulated(scenario, inputs, 200, plain) < 0.65


def test_few_inputs_that_agree_leave_room_and_none_says_nothing():
    alike = [clustered_interval([1000] * n, [1000] * n)[0] for n in (5, 20, 80)]
    assert alike == sorted(alike)
    assert alike[0] < 0.7
    assert alike[2] > 0.97
    assert np.isnan(clustered_interval([0], [0])).all()
    assert clustered_interval([9], [9]) == (0.0, 1.0)


def test_flips_are_judged_by_the_range_of_their_class():
    """Against a loop in numpy over the very same ranges, on data that were not analysed."""
    model, unseen = net(), batch(2)
    found = fp.analyze(model, batch(1), fp.DeepVigor(holes=0))
    table = found.validate(unseen, injections=600).set_index("layer")
    assert (table["data"] == "other").all()
    assert (found.validate(batch(1), injections=50)["data"] == "analysed").all()
    by_class, overall = table["called_semi_vulnerable"].sum(), table["overall_called_semi_vulnerable"].sum()
    assert by_class < overall  # an intersection over classes decides less
    names = [f"called_{name}" for name in ("non_vulnerable", "semi_vulnerable", "vulnerable")]
    assert (table[names].sum(axis=1) == 600).all()
    assert (table[[f"overall_{name}" for name in names]].sum(axis=1) == 600).all()
    for column in ("true_non_critical", "true_critical", "overall_true_non_critical", "critical_rate"):
        known = table[table[column].notna()]
        assert (known[f"{column}_low"] <= known[column]).all()
        assert (known[column] <= known[f"{column}_high"]).all()
        assert (known[f"{column}_high"] - known[f"{column}_low"] > 0.005).all()
    expected = judged(found, model, unseen[0][0], 600)
    for layer, counts in expected.items():
        assert [int(table.loc[layer, name]) for name in names] == counts


def judged(found: fp.VulnerabilityMap, model: nn.Module, x: Tensor, count: int) -> dict[str, list[int]]:
    """The same draws, judged one by one with `classify`."""
    from flipproof.faults.sampling import TrialGenerator

    with torch.no_grad():
        golden = model(x).argmax(1).tolist()
        values = {"0": model[0](x), "2": model(x)}
    result = {}
    for layer in found.layers_found:
        size = layer.total * 32
        hits = TrialGenerator(0, f"validate {layer.name}", 0).below(size * len(x), count)
        counts = dict.fromkeys(("non_vulnerable", "semi_vulnerable", "vulnerable"), 0)
        for hit in hits.tolist():
            sample, neuron, bit = hit // size, hit // 32 % layer.total, hit % 32
            value = values[layer.name][sample, neuron].numpy()
            faulty = (value.view(np.int32) ^ np.array(1 << bit, np.uint32).view(np.int32)).view(np.float32)
            label = golden[sample] if layer.seen(golden[sample]) else None
            counts[found.classify(layer.name, neuron, float(faulty) - float(value), label=label)] += 1
        result[layer.name] = list(counts.values())
    return result


def test_inputs_of_a_class_never_analysed_are_judged_by_all():
    model, x = net(), batch(1)[0][0]
    with torch.no_grad():
        golden = model(x).argmax(1)
    some = golden != int(golden.mode().values)
    found = fp.analyze(model, [(x[some], golden[some])], fp.DeepVigor(holes=0))
    table = found.validate([(x, golden)], injections=600)
    share = float((~some).double().mean())
    assert (table["without_class"] / 600 - share).abs().max() < 0.1


class Answers(nn.Module):
    """Two heads that disagree, as a dictionary, a tuple, or what a function picks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.kind = net(), kind

    def forward(self, x: Tensor) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
        out = self.body(x)
        return {"noise": -out, "logits": out} if self.kind == "dict" else (-out, out)


def second(raw: tuple[Tensor, Tensor]) -> Tensor:
    return raw[1]


@pytest.mark.parametrize(("kind", "output"), [("dict", "logits"), ("tuple", 1), ("tuple", second)])
def test_a_loaded_map_judges_the_output_that_was_analysed(tmp_path, kind, output):
    model, data = Answers(kind), batch(1)
    found = fp.analyze(model, data, fp.DeepVigor(holes=0), output=output)
    first = found.validate(data, injections=300)
    path = found.save(tmp_path / "map.safetensors")
    loaded = fp.VulnerabilityMap.load(path)
    if callable(output):
        with pytest.raises(fp.FlipproofError, match=r"test_validation\.second.*pass it again as output="):
            loaded.validate(data, model=model, injections=300)
        again = loaded.validate(data, model=model, output=second, injections=300)
        whole = fp.VulnerabilityMap.load(path, model=model, output=second)
        assert whole.validate(data, injections=300).equals(first)
        with pytest.raises(fp.FlipproofError, match="other golden classes"):
            loaded.validate(data, model=model, output=lambda raw: raw[0])
        with pytest.raises(fp.FlipproofError, match=r"made with output=.*second, got output=0"):
            loaded.validate(data, model=model, output=0)
    else:
        again = loaded.validate(data, model=model, injections=300)
        with pytest.raises(fp.FlipproofError, match="made with output="):
            loaded.validate(data, model=model, output=second)
    assert again.equals(first)
    assert (first["true_critical"].dropna() > 0.9).all()


def test_maps_of_other_outputs_do_not_merge():
    model = Answers("tuple")
    one, other = (fp.analyze(model, batch(n), fp.DeepVigor(holes=0, ranges=False), output=n) for n in (0, 1))
    with pytest.raises(fp.FlipproofError, match="judge different outputs"):
        one.merge(other)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("0.critical", torch.zeros(12, 31, dtype=torch.int32)),
        ("0.ranges", torch.zeros(1, 12, 4)),
        ("1.neurons", torch.tensor([0, 1, 2, 4])),
        ("1.labels", torch.tensor([9])),
    ],
)
def test_sums_that_do_not_fit_together_are_refused(tmp_path, name, value):
    path = fp.analyze(net(), batch(1, 1), fp.DeepVigor(holes=0, ranges=False)).save(tmp_path / "map.safetensors")
    with safe_open(path, "pt") as file:
        meta, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file({**tensors, name: value}, path, metadata=meta)
    with pytest.raises(fp.FlipproofError, match=rf"cannot read a vulnerability map.*: {'02'[int(name[0])]}: "):
        fp.VulnerabilityMap.load(path)


@pytest.mark.parametrize("broken", [{"output": None}, {"output": {"key": [1], "function": None}}, {"layers": [{}]}])
def test_a_broken_file_is_refused_in_one_sentence(tmp_path, broken):
    path = fp.analyze(net(), batch(1), fp.DeepVigor(holes=0, ranges=False)).save(tmp_path / "map.safetensors")
    with safe_open(path, "pt") as file:
        meta, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    meta["map"] = json.dumps({**json.loads(meta["map"]), **broken})
    save_file(tensors, path, metadata=meta)
    with pytest.raises(fp.FlipproofError, match="cannot read a vulnerability map"):
        fp.VulnerabilityMap.load(path)
