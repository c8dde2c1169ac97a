"""Vulnerability of weights against exhaustive injection: every bit of tiny networks, in the model's own memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import flipproof as fp
from flipproof.analysis.opened_model import opened

Data = list[tuple[Tensor, Tensor]]
EXACT = fp.DeepVigor(factors="exhaustive", ranges=False, holes=0)


class Convs(nn.Module):
    """Strides, groups, dilation, padding of every kind, BatchNorm, a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.b = nn.Conv2d(4, 4, (3, 1), padding=(2, 0), dilation=2, groups=2, padding_mode="reflect")
        self.c = nn.Conv2d(4, 2, 3, padding="same", bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.bn(self.b(x)) + x)
        return self.fc(self.c(x).flatten(1))


class Tokens(nn.Module):
    """A Linear over tokens, a Conv1d, and an output that is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.conv = nn.Conv1d(4, 4, 3, dilation=1)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.tanh(self.embed(x)).transpose(1, 2)
        return {"logits": self.out(torch.tanh(self.conv(x)).mean(dim=2))}


class Memory(nn.Module):
    """Weights that no line describes: an LSTM, an embedding tied to the output layer, a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.lstm = nn.LSTM(3, 3, batch_first=True)
        self.norm = nn.LayerNorm(3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.lstm(self.embedding(x))[0][:, -1]))


def made(kind: type[nn.Module], seed: int = 0) -> tuple[nn.Module, Data]:
    torch.manual_seed(seed)
    net = kind().eval()
    if kind is Memory:
        x = torch.randint(0, 5, (5, 3))
    else:
        x = torch.randn(5, 2, 8, 8) if kind is Convs else torch.randn(5, 6, 3)
    return net, [(x[:3], torch.zeros(3).long()), (x[3:], torch.zeros(2).long())]


def injected(net: nn.Module, data: Data, format: object, name: str, value: int) -> list[int]:
    """How many inputs each bit of a value is critical for."""
    space = fp.FaultSpace(net, format=format)
    found = []
    with torch.no_grad(), space.stored():
        outputs = [net(x) for x, _ in data]
        pick = (lambda y: y["logits"]) if isinstance(outputs[0], dict) else (lambda y: y)
        golden = torch.cat([pick(y) for y in outputs]).argmax(dim=1)
        width = next(site.width for site in space.sites if site.name == name)
        for bit in range(width):
            with space.corrupted(space.faults([(name, value, bit)])):
                faulty = torch.cat([pick(net(x)) for x, _ in data])
            found.append(int(((faulty.argmax(dim=1) != golden) | faulty.isnan().any(dim=1)).sum()))
    return found


@pytest.mark.parametrize(
    ("kind", "format", "step"),
    [
        (Convs, None, 5),
        (Convs, fp.Affine(bits=4, axis=0), 1),
        (Convs, fp.TripleMSB(fp.Affine(bits=3)), 3),
        (Tokens, None, 3),
        (Tokens, {"*": fp.Float16()}, 2),
        (Memory, None, 7),
    ],
    ids=str,
)
def test_factors_are_those_of_exhaustive_injection(kind, format, step):
    net, data = made(kind)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    output = (lambda y: y["logits"]) if kind is Tokens else None
    found = fp.analyze(net, data, EXACT, where=fp.Parameters(), format=format, output=output)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert found.of == "parameters"
    assert [layer.name for layer in found.layers_found] == [
        site.name for site in fp.FaultSpace(net, format=format).sites
    ]
    for layer in found.layers_found:
        for value in range(0, layer.total, step):
            assert layer.critical[value].tolist() == injected(net, data, format, layer.name, value), (layer.name, value)
    assert int(sum(layer.critical.sum() for layer in found.layers_found)) > 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_bit_of_weights_in_half_precision_is_that_of_injection(dtype):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    x = torch.randn(60, 4).to(dtype)
    data = [(x[:40], torch.zeros(40)), (x[40:], torch.zeros(20))]
    found = fp.analyze(net, data, EXACT, where=fp.Parameters())
    for layer in found.layers_found:
        for value in range(layer.total):
            assert layer.critical[value].tolist() == injected(net, data, None, layer.name, value), (layer.name, value)


def test_a_weight_and_its_bias_share_what_was_recorded():
    """The layer's input, what lies behind it, and the check of that: once a layer, not once a parameter."""
    net, data = made(Convs)
    recorded = []
    for where in (fp.Parameters("b.weight"), fp.Parameters("b.*")):
        with opened(net, data, where, None, None, 2**24) as prober:
            for site in prober.sites:
                for batch in range(2):
                    prober.at(site.name, batch)
            recorded.append((prober.costs.preparing, prober.costs.checking))
    assert recorded[0] == recorded[1] > (0, 0)
    both = fp.analyze(net, data, EXACT, where=fp.Parameters("b.*"))
    alone = fp.analyze(net, data, EXACT, where=fp.Parameters("b.bias"))
    assert torch.equal(both.layer("b.bias").critical, alone.layer("b.bias").critical)


def test_search_finds_what_exhaustive_asking_finds_and_validation_agrees():
    net, data = made(Convs)
    exact = fp.analyze(net, data, EXACT, where=fp.Parameters(exclude="bn"))
    found = fp.analyze(net, data, where=fp.Parameters(exclude="bn"))
    for mine, truth in zip(found.layers_found, exact.layers_found, strict=True):
        assert (mine.critical != truth.critical).double().mean() < 0.005  # larger errors stay critical, nearly always
        assert mine.probes < truth.probes or mine.closed_form or mine.exhaustive
    held = found.validate(data, injections=400)
    assert held["true_non_critical"].min() > 0.995
    assert held["true_critical"].fillna(1.0).min() > 0.995
    assert held["layer"].tolist() == ["a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "fc.weight", "fc.bias"]
    asked = found.layers.set_index("layer")
    assert asked.loc["fc.weight", "forwards"] == 0
    assert asked.loc["a.weight", "forwards_per_neuron"] < 20


def test_ranges_say_what_an_error_of_a_weight_does():
    net = nn.Linear(2, 2, bias=False)
    net.weight.data.copy_(torch.eye(2))
    found = fp.analyze(net, [(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))], where=fp.Parameters())
    # scores 3 + 3δ and 1: the first weight may lose up to 2/3
    assert found.classify("weight", 0, -0.6) == "non_vulnerable"
    assert found.classify("weight", 0, -0.75) == "vulnerable"
    assert found.classify("weight", 0, 1e9) == "non_vulnerable"


def test_maps_of_weights_are_kept_and_do_not_merge_with_those_of_neurons(tmp_path):
    net, data = made(Tokens)
    output = "logits"
    weights = fp.analyze(net, data[:1], where=fp.Parameters(), output=lambda y: y[output])
    other = fp.analyze(net, data[1:], where=fp.Parameters(), output=lambda y: y[output])
    assert weights.merge(other).samples == 5
    again = fp.VulnerabilityMap.load(weights.save(tmp_path / "map.safetensors"))
    assert again.of == "parameters"
    assert again.bits.equals(weights.bits)
    neurons = fp.analyze(net, data[1:], output=lambda y: y[output])
    with pytest.raises(fp.FlipproofError, match="maps of parameters by"):
        weights.merge(neurons)


def test_sampling_and_small_memory_change_nothing_about_the_sampled():
    net, data = made(Convs)
    where = fp.Parameters("a.weight")
    whole = fp.analyze(net, data, EXACT, where=where).layers_found[0]
    few = fp.analyze(
        net, data, fp.DeepVigor(factors="exhaustive", ranges=False, holes=0, neurons=20, max_bytes=2**20), where=where
    ).layers_found[0]
    assert few.neurons.numel() == 20
    assert torch.equal(few.critical, whole.critical[few.neurons])


def test_a_selection_of_bits_becomes_formats_and_a_campaign_shows_what_it_buys():
    net, data = made(Convs, seed=1)
    x = torch.randn(100, 2, 8, 8)
    test = [(x, net(x).argmax(dim=1))]
    found = fp.analyze(net, data, where=fp.Parameters())
    chosen = fp.select_bits(found, budget=0.1)
    formats = chosen.formats()
    assert set(formats) == {layer.name for layer in found.layers_found}
    assert formats["a.weight"].protect[0] == 30
    setup = {"data": test, "faults": fp.BitErrorRate(1e-3), "trials": 60}
    plain = fp.assess(net, **setup)
    safe = fp.assess(net, format=formats, **setup)
    assert safe.golden == plain.golden
    assert safe.summary["critical_total"][0] < 0.3 * plain.summary["critical_total"][0]
    stored = fp.pack_(copy.deepcopy(net), formats)
    assert (stored(x).argmax(dim=1) == test[0][1]).all()
    layers = fp.select_bits(found, budget=0.5, unit="layers").formats()
    assert {repr(type(format)) for format in layers.values()} == {repr(fp.SECDED), repr(fp.Float32)}
    assert all(
        isinstance(format, fp.SECDED) for format in fp.select_bits(found, budget=None, unit="layers").formats().values()
    )
    bought = fp.measure_protection(found, chosen, test, injections=600).set_index("protected")
    assert bought.loc["selected", "gain_over_random_low"] > 0
    with pytest.raises(fp.FlipproofError, match="a format stores a whole layer"):
        fp.select_bits(found, budget=0.1, unit="neurons").formats()


@pytest.mark.parametrize(("unit", "budget"), [("bits", 0.05), ("bits", 0.5), ("layers", 0.17)])
@pytest.mark.parametrize("format", [fp.Float32(), fp.Affine(bits=8)], ids=repr)
def test_the_budget_is_the_memory_that_is_really_added(unit, budget, format):
    """Bits of the packed words of the whole model, check bits and copies included."""
    net, data = made(Convs, seed=1)
    where = fp.Parameters("*.weight", exclude="bn.*")
    found = fp.analyze(net, data, fp.DeepVigor(ranges=False, neurons=20), where=where, format=format)
    chosen = fp.select_bits(found, budget=budget, unit=unit)

    def packed(formats: dict[str, fp.Format]) -> int:
        stored = fp.pack_(copy.deepcopy(net), formats)
        return 8 * sum(buffer.nbytes for name, buffer in stored.named_buffers() if name.endswith("original0"))

    padding = 8 * len(found.layers_found)  # each tensor ends with up to 7 bits that hold nothing
    plain = sum(layer.total * layer.width for layer in found.layers_found)
    everything = fp.select_bits(found, budget=None, unit="layers").formats()
    grown = packed(chosen.formats())
    assert abs(grown - plain - chosen.table["added"].sum()) <= padding
    assert grown / plain - 1 <= budget + padding / plain
    assert chosen.table["memory"].to_list() == pytest.approx((chosen.table["added"].cumsum() / plain).to_list())
    bought = fp.measure_protection(found, chosen, data, injections=20).set_index("protected")
    assert bought.loc["selected", "memory"] == pytest.approx(grown / plain - 1, abs=padding / plain)
    assert bought.loc["everything", "memory"] == pytest.approx(packed(everything) / plain - 1, abs=padding / plain)


def test_a_selection_of_neuron_bits_becomes_formats_too():
    net, data = made(Convs, seed=1)
    found = fp.analyze(net, data)
    formats = fp.select_bits(found, budget=0.05).formats()
    setup = {"data": data, "faults": fp.RandomBits(1), "trials": 40, "where": fp.Neurons()}
    plain, safe = fp.assess(net, **setup), fp.assess(net, format=formats, **setup)
    assert safe.summary["critical_total"][0] < plain.summary["critical_total"][0]


def test_a_selection_of_another_map_is_refused():
    net, data = made(Convs, seed=1)
    neurons, parameters = fp.analyze(net, data), fp.analyze(net, data, where=fp.Parameters())
    for mine, other in ((neurons, parameters), (parameters, neurons)):
        with pytest.raises(fp.FlipproofError, match="the selection is of another map"):
            fp.measure_protection(mine, fp.select_bits(other, budget=0.1), data)


def test_packed_models_are_refused_by_name():
    net, data = made(Tokens)
    packed = fp.pack_(net, {"conv.weight": fp.Affine(bits=4)})
    with pytest.raises(fp.FlipproofError, match=r"conv\.weight is stored as packed words or integers"):
        fp.analyze(packed, data, where=fp.Parameters(), output="logits")
