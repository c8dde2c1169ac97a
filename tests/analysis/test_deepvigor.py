"""DeepVigor against exhaustive injection: every neuron × bit × input of tiny networks, one hooked forward each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flipproof as fp

Data = list[tuple[Tensor, Tensor]]


class Residual(nn.Module):
    """Grouped and dilated convolutions, BatchNorm, a branch, functional ReLU and pool, an in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 2, 3, padding=1)
        self.b = nn.Conv2d(2, 2, 3, padding=2, dilation=2, groups=2)
        self.bn = nn.BatchNorm2d(2)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = self.relu(self.bn(self.b(x)) + x)
        return self.fc(x.flatten(1))


class Untraceable(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > -1e9 else -x)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(torch.tanh(self.fc(x)))))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=False)
        self.out = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x.transpose(0, 1))[0][-1])


class Pooled(nn.Module):
    """A pool that leaves a border out, and one with overlapping windows."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 2, 2)
        self.pool = nn.MaxPool2d(2)
        self.b = nn.Conv2d(2, 2, 1)
        self.fc = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.a(x)))
        return self.fc(F.max_pool2d(self.b(x).relu(), 2, 1).flatten(1))


NETS = {
    "residual": (Residual, (1, 4, 4)),
    "untraceable": (Untraceable, (1, 4, 4)),
    "shared": (Shared, (4,)),
    "lstm": (Lstm, (2, 2)),
    "pooled": (Pooled, (1, 6, 6)),
    "mlp, sigmoid": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)), (4,)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)), (1, 5)),
}


def inputs(shape: tuple[int, ...], count: int = 5) -> Data:
    x = torch.randn(count, *shape)
    y = torch.arange(count) % 3
    return [(x[:3], y[:3]), (x[3:], y[3:])]


def injected(net: nn.Module, data: Data, fmt: fp.Float32 | fp.Affine | None = None) -> dict[str, np.ndarray]:
    """Per layer (inputs, neurons, bits): does this flip change the class? One hooked forward of one input each."""
    net.eval()
    names = [n for n, m in net.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear, nn.LSTM))]
    fmt = fmt or fp.Float32()
    result: dict[str, list[np.ndarray]] = {}

    def run(x: Tensor, where: tuple[str, int] | None, neuron: int, bit: int, seen: dict[str, Tensor]) -> int:
        calls: dict[str, int] = {}
        handles = []

        def hook_for(name: str):
            def hook(module, args, out):
                raw = out[0] if isinstance(out, tuple) else out
                call = calls[name] = calls.get(name, -1) + 1
                axis = 1 if isinstance(module, nn.LSTM) else 0
                words = fmt.encode_values(raw, ())
                seen[f"{name}[{call}]" if call else name] = words.movedim(axis, 0)
                if where == (name, call):
                    flat = words.movedim(axis, 0).contiguous().reshape(-1)
                    bits = int(flat[neuron]) & (2**fmt.width - 1) ^ (1 << bit)
                    top = 2 ** (fmt.width - 1)
                    flat[neuron] = bits - 2**fmt.width if words.dtype != torch.uint8 and bits >= top else bits
                    shape = words.movedim(axis, 0).shape
                    words = flat.reshape(shape).movedim(0, axis)
                changed = fmt.decode_words(words, (), raw.dtype)
                return (changed, *out[1:]) if isinstance(out, tuple) else changed

            return hook

        for name in names:
            handles.append(net.get_submodule(name).register_forward_hook(hook_for(name)))
        with torch.no_grad():
            out = net(x)
        for handle in handles:
            handle.remove()
        return -1 if bool(out.isnan().any()) else int(out.argmax())

    for batch, _ in data:
        for x in batch.split(1):
            golden_words: dict[str, Tensor] = {}
            golden = run(x, None, 0, 0, golden_words)
            for key, words in golden_words.items():
                name, _, call = key.partition("[")
                where = (name, int(call[:-1]) if call else 0)
                table = np.array(
                    [[run(x, where, n, b, {}) != golden for b in range(fmt.width)] for n in range(words.numel())]
                )
                result.setdefault(key, []).append(table)
    return {name: np.stack(tables) for name, tables in result.items()}


def counts(found: fp.VulnerabilityMap) -> dict[str, np.ndarray]:
    return {layer.name: layer.critical.numpy() for layer in found.layers_found}


@pytest.mark.parametrize("name", NETS)
def test_exhaustive_factors_equal_injection_of_every_neuron_bit_and_input(name):
    build, shape = NETS[name]
    net, data = build(), inputs(shape)
    truth = injected(net, data)
    found = fp.analyze(net, data, fp.DeepVigor(factors="exhaustive", ranges=False))
    assert counts(found).keys() == truth.keys()
    for layer, table in truth.items():
        np.testing.assert_array_equal(counts(found)[layer], table.sum(axis=0), layer)
        row = found.layers.set_index("layer").loc[layer]
        assert row["lvf"] == pytest.approx(table.mean(), abs=1e-12)
        nvf = found.neurons[found.neurons["layer"] == layer]["nvf"]
        np.testing.assert_allclose(nvf, table.mean(axis=(0, 2)))
        np.testing.assert_allclose(found.bits[found.bits["layer"] == layer]["bvf"], table.mean(axis=(0, 1)))
        assert row["hole_injections"] == 0  # nothing was left untried


@pytest.mark.parametrize("fmt", [fp.Float16(), fp.BFloat16(), fp.FixedPoint(3, 4), fp.FixedPoint(7, 8)], ids=repr)
def test_formats(fmt):
    net, data = Residual(), inputs((1, 4, 4))
    truth = injected(net, data, fmt)
    found = fp.analyze(net, data, fp.DeepVigor(factors="exhaustive", ranges=False), format=fmt)
    for layer, table in truth.items():
        np.testing.assert_array_equal(counts(found)[layer], table.sum(axis=0), layer)


@pytest.mark.parametrize("name", NETS)
def test_search_differs_from_injection_only_by_holes(name):
    """Where the truth of a neuron, input and sign is monotone, the search is exact; elsewhere it is off by holes."""
    build, shape = NETS[name]
    net, data = build(), inputs(shape)
    truth = injected(net, data)
    found = fp.analyze(net, data, fp.DeepVigor(holes=10_000))
    wrong = sum(int(np.abs(counts(found)[layer] - table.sum(axis=0)).sum()) for layer, table in truth.items())
    total = sum(table.size for table in truth.values())
    assert wrong / total < 0.02
    measured = found.layers
    misses = (measured["hole_rate"].fillna(0) * measured["hole_injections"]).sum()
    if wrong:
        assert misses > 0, "holes that the map does not report"


@pytest.mark.parametrize("name", NETS)
def test_ranges_hold_for_every_flip_of_every_neuron_and_input(name):
    """`classify` against the exhaustive truth: at least 99.9 % each way, over all flips that it decides."""
    build, shape = NETS[name]
    net, data = build(), inputs(shape)
    truth = injected(net, data)
    found = fp.analyze(net, data, fp.DeepVigor(factors="exhaustive"))
    values = _golden_values(net, data, truth)
    said = {verdict: [] for verdict in ("non_vulnerable", "semi_vulnerable", "vulnerable")}
    for layer, table in truth.items():
        for i, n, b in np.ndindex(*table.shape):
            v = values[layer][i, n]
            faulty = (v.view(np.int32) ^ np.array(1 << b, np.uint32).view(np.int32)).view(np.float32)
            said[found.classify(layer, n, float(faulty) - float(v))].append(bool(table[i, n, b]))
    calm, critical = np.array(said["non_vulnerable"]), np.array(said["vulnerable"])
    assert calm.size > 100
    assert 1 - calm.mean() >= 0.999
    assert critical.size == 0 or critical.mean() >= 0.999


def _golden_values(net: nn.Module, data: Data, truth: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    values: dict[str, list[np.ndarray]] = {name: [] for name in truth}
    calls: dict[str, int] = {}

    def hook_for(name):
        def hook(module, args, out):
            raw = out[0].transpose(0, 1) if isinstance(out, tuple) else out
            call = calls[name] = calls.get(name, -1) + 1
            values[f"{name}[{call}]" if call else name].append(raw.reshape(raw.shape[0], -1).numpy().copy())

        return hook

    handles = [net.get_submodule(n).register_forward_hook(hook_for(n)) for n in truth if "[" not in n]
    with torch.no_grad():
        for x, _ in data:
            calls.clear()
            net(x)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in values.items()}


def test_last_layer_is_a_comparison_and_costs_no_forward():
    """Closed form: δ in logit j ≠ c is critical from E_c − E_j, δ in c below max E_j − E_c."""
    net, data = nn.Sequential(nn.Linear(3, 4)), inputs((3,))
    found = fp.analyze(net, data, fp.DeepVigor(tolerance=1e-3))
    assert found.layers["probes"].item() == 0
    logits = torch.cat([net(x).detach() for x, _ in data]).double()
    top = logits.argmax(1)
    for j in range(4):
        up = [float(row[c] - row[j]) for row, c in zip(logits, top, strict=True) if c != j]
        down = [float(row[torch.arange(4) != j].max() - row[j]) for row, c in zip(logits, top, strict=True) if c == j]
        row = found.ranges[(found.ranges["neuron"] == j) & (found.ranges["class"] == "all")].iloc[0]
        if up:
            assert row["safe_high"] <= min(up) * (1 + 1e-6)
            assert row["safe_high"] >= min(up) * (1 - 2e-3)
        else:
            assert row["safe_high"] > 1e30
        if down:
            assert row["safe_low"] >= max(down) * (1 + 1e-6)
            assert row["safe_low"] <= max(down) * (1 - 2e-3)
        else:
            assert row["safe_low"] < -1e30


def test_semi_vulnerable_lies_between_and_labels_narrow_it():
    net = nn.Linear(2, 2)
    net.weight.data.copy_(torch.eye(2))
    net.bias.data.zero_()
    data = [(torch.tensor([[3.0, 1.0], [9.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]))]
    found = fp.analyze(net, data, fp.DeepVigor(tolerance=1e-3))
    said = [found.classify("", 1, d, label=0) for d in (1.9, 2.1, 7.9, 8.1, float("nan"), float("inf"), -1e9)]
    assert said == [
        "non_vulnerable", "semi_vulnerable", "semi_vulnerable", "vulnerable", "vulnerable", "vulnerable",
        "non_vulnerable",
    ]  # fmt: skip
    assert found.classify("", 1, 8.1) == "semi_vulnerable"  # the third input has class 1 and stays there


def test_validate_counts_what_really_happened():
    net, data = Residual(), inputs((1, 4, 4), 9)
    found = fp.analyze(net, data)
    table = found.validate(data, injections=400)
    assert (table["injections"] == 400).all()
    called = table[["called_non_vulnerable", "called_semi_vulnerable", "called_vulnerable"]].sum(axis=1)
    assert (called == 400).all()
    assert (table["true_non_critical"] >= 0.99).all()
    truth = injected(net, data)
    for _, row in table.iterrows():
        assert abs(row["critical"] / 400 - truth[row["layer"]].mean()) < 0.1
    unseen = found.validate(inputs((1, 4, 4), 7), injections=200)
    assert unseen["true_non_critical"].between(0, 1).all()


def test_sampled_neurons_are_those_of_the_whole_map_and_the_interval_is_honest():
    net, data = Residual(), inputs((1, 4, 4))
    whole = fp.analyze(net, data, fp.DeepVigor(ranges=False))
    some = fp.analyze(net, data, fp.DeepVigor(ranges=False, neurons=5))
    for full, part in zip(whole.layers_found, some.layers_found, strict=True):
        assert part.neurons.numel() == min(5, full.total)
        assert torch.equal(part.critical, full.critical[part.neurons])
    row = some.layers.iloc[0]
    assert row["lvf_low"] < row["lvf"] < row["lvf_high"]
    missing = next(n for n in range(32) if n not in some.layers_found[0].neurons.tolist())
    with pytest.raises(fp.FlipproofError, match="not analysed"):
        some.classify("a", missing, 1.0)


def test_saved_loaded_and_merged_maps_are_the_map(tmp_path):
    net, data = Residual(), inputs((1, 4, 4))
    whole = fp.analyze(net, data, fp.DeepVigor(holes=0))
    shards = [fp.analyze(net, [batch], fp.DeepVigor(holes=0)) for batch in data]
    merged = shards[0].merge(shards[1])
    for one, other in zip(whole.layers_found, merged.layers_found, strict=True):
        assert torch.equal(one.critical, other.critical)
        assert torch.equal(one.ranges, other.ranges)
    with pytest.raises(fp.FlipproofError, match="twice"):
        shards[0].merge(shards[0])
    path = merged.save(tmp_path / "map.safetensors")
    loaded = fp.VulnerabilityMap.load(path, model=net)
    for table in ("layers", "neurons", "bits", "ranges"):
        assert getattr(loaded, table).equals(getattr(merged, table))
    assert loaded.validate(data, injections=50).equals(merged.validate(data, injections=50))
    with pytest.raises(fp.FlipproofError, match="model="):
        fp.VulnerabilityMap.load(path).validate(data)
    (tmp_path / "x").write_bytes(b"no map")
    with pytest.raises(fp.FlipproofError, match="cannot read"):
        fp.VulnerabilityMap.load(tmp_path / "x")


@pytest.mark.parametrize("max_bytes", [2**20, 2**28])
def test_memory_bound_changes_nothing(max_bytes):
    net, data = Residual(), inputs((1, 4, 4))
    base = fp.analyze(net, data, fp.DeepVigor(holes=0))
    other = fp.analyze(net, data, fp.DeepVigor(holes=0, max_bytes=max_bytes))
    for one, two in zip(base.layers_found, other.layers_found, strict=True):
        assert torch.equal(one.critical, two.critical)


def test_the_model_comes_back_as_it_was():
    net, data = Residual().train(), inputs((1, 4, 4))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fp.analyze(net, data)
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("unit", ["bits", "neurons", "layers"])
def test_select_covers_what_it_says(unit):
    net, data = Residual(), inputs((1, 4, 4))
    found = fp.analyze(net, data, fp.DeepVigor(factors="exhaustive", ranges=False))
    chosen = fp.select_bits(found, budget=0.5, unit=unit)
    everything = sum(layer.total * layer.width for layer in found.layers_found)
    assert 0 < chosen.table["added"].sum() <= 0.5 * everything  # a budget is the memory that protection adds
    counts_of = {layer.name: layer.critical for layer in found.layers_found}
    covered = 0
    for _, row in chosen.table.iterrows():
        table = counts_of[row["layer"]]
        part = table if unit == "layers" else table[:, row["bit"]] if unit == "bits" else table[row["neuron"]]
        covered += int(part.sum())
    assert chosen.table["covered"].iloc[-1] == pytest.approx(covered / sum(int(t.sum()) for t in counts_of.values()))
    with pytest.raises(fp.FlipproofError, match="budget"):
        fp.select_bits(found, budget=-1)
    for wrong in ("a", True):
        with pytest.raises(fp.FlipproofError, match="budget in"):
            fp.select_bits(found, budget=wrong)


def test_protection_pays_where_the_map_says_so():
    """The share of critical injections that a selection corrects is the share it covers; all schemes are paired."""
    net, data = Residual(), inputs((1, 4, 4), 9)
    found = fp.analyze(net, data, fp.DeepVigor(factors="exhaustive", ranges=False))
    chosen = fp.select_bits(found, budget=0.05)
    table = fp.measure_protection(found, chosen, data, injections=4000).set_index("protected")
    total = sum(layer.total * layer.width for layer in found.layers_found)
    rate = sum(int(layer.critical.sum()) for layer in found.layers_found) / (total * found.samples)
    assert table.loc["nothing", "critical_low"] <= rate <= table.loc["nothing", "critical_high"]
    expected = rate * (1 - chosen.table["covered"].iloc[-1])
    assert table.loc["selected", "critical"] == pytest.approx(expected, abs=0.01)
    assert table.loc["everything", "critical"] == 0
    assert table.loc["selected", "gain_over_random_low"] > 0
    assert table.loc["random", "bits"] == table.loc["selected", "bits"] <= 0.05
    assert table.loc["selected", "gain"] == table.loc["nothing", "critical"] - table.loc["selected", "critical"]


class Counts(nn.Module):
    """Takes the number of samples from its inputs, as torchvision's ViT does: other rows do not fit what it cuts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(16, 3)

    def forward(self, x):
        n, _, high, wide = x.shape
        return self.head(self.conv(x).reshape(n, 4, (high - 2) * (wide - 2)).permute(0, 2, 1).flatten(1))


def test_a_suffix_that_takes_no_other_rows_is_left_without_a_word(capfd):
    net, x = Counts().eval(), torch.randn(4, 1, 4, 4)
    found = fp.analyze(net, [(x, torch.zeros(4))], fp.DeepVigor(factors="exhaustive", neurons=2))
    assert list(found.layers["layer"]) == ["conv", "head"]
    assert "FX-traced" not in capfd.readouterr().err
