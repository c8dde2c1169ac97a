"""Whatever a model stores is hit or left out with a reason; simulated storage is the really packed model."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import flipproof as fp
from flipproof.errors import ConfigError, FaultModelError, FaultSpaceError, FlipproofWarning, FormatError
from flipproof.faults import TrialGenerator
from flipproof.formats import Float64, Integer
from flipproof.spaces.contract import Faults, Upsets
from flipproof.spaces.neurons import NeuronSpace
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Site

WEIGHTS = fp.Parameters(kinds=("weight",))


class Conv1D(nn.Module):
    """As Hugging Face's GPT-2 has it: a Linear whose weight lies the other way round."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.3)
        self.bias = nn.Parameter(torch.randn(outputs) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class GPT2(nn.Module):
    """Embeddings, Conv1D projections, LayerNorm, and a head of few weights: the classifier that was measured on 48."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(80, 24), nn.Embedding(10, 24)
        self.ln_1, self.ln_2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.c_attn, self.c_proj = Conv1D(24, 72), Conv1D(24, 24)
        self.c_fc, self.c_out = Conv1D(24, 48), Conv1D(48, 24)
        self.score = nn.Linear(24, 2, bias=False)
        self.register_buffer("mask", torch.tril(torch.ones(10, 10, dtype=torch.bool)), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        q, k, v = self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        scores = (q @ k.transpose(1, 2) / 24**0.5).masked_fill(~self.mask, float("-inf"))
        x = x + self.c_proj(torch.softmax(scores, dim=-1) @ v)
        x = x + self.c_out(torch.relu(self.c_fc(self.ln_2(x))))
        return self.score(x[:, -1])


class Block(nn.Module):
    """A residual block of ResNet-20's kind."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.skip(x))


class Mixed(nn.Module):
    """Recurrent layers, attention and a bilinear layer: weights of every kind, biases between them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.cell = nn.GRUCell(12, 5)
        self.pair = nn.Bilinear(5, 12, 3)
        self.slope = nn.PReLU(3)
        self.bag = nn.EmbeddingBag(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lstm(x + self.bag(torch.arange(6).reshape(3, 2))[:1])[0]
        x = self.attention(x, x, x, need_weights=False)[0][:, -1]
        return self.slope(self.pair(self.cell(x), x))


def resnet() -> nn.Module:
    net = nn.Sequential(Block(2, 6), Block(6, 8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return net


NETS = {
    "resnet": (resnet, lambda: torch.randn(9, 2, 6, 6)),
    "gpt2": (GPT2, lambda: torch.randint(0, 80, (9, 10))),
    "mixed": (Mixed, lambda: torch.randn(9, 5, 4)),
}
FORMATS = [fp.Affine(8), fp.TripleMSB(fp.Affine(3)), fp.SECDED(fp.Affine(4), block=24), fp.Float16()]


def build(name: str, seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(seed)
    make, inputs = NETS[name]
    net, x = make().eval(), inputs()
    with torch.no_grad():
        return net, [(x, net(x).argmax(dim=1))]


def every_tensor(net: nn.Module) -> set[str]:
    return {name for name, _ in (*net.named_parameters(), *net.named_buffers())}


# ---- a format alone, and a mapping


def test_a_quantising_format_alone_takes_the_weights_of_every_layer_and_leaves_nothing_out():
    net, _ = build("gpt2")
    space = FaultSpace(net, format=fp.Affine(8))
    formats = {site.name: site.format for site in space.sites}
    weights = {name for name, p in net.named_parameters() if "weight" in name and p.dim() > 1}
    assert len(weights) == 7
    assert {name for name, format in formats.items() if format == fp.Affine(8)} == weights
    assert {name for name, format in formats.items() if format == fp.Float32()} == set(formats) - weights
    assert set(formats) == {name for name, _ in net.named_parameters()}
    assert sum(site.values for site in space.sites) == sum(p.numel() for p in net.parameters()) == 7080
    assert space.left_out == {"mask": "is torch.bool, which has no Format"}
    expected = sum(p.numel() * (8 if name in weights else 32) for name, p in net.named_parameters())
    assert space.bits == expected
    assert space.left_out_bits == 100 * 8
    assert space.coverage == expected / (expected + 800)


def test_the_table_in_the_documentation():
    net, _ = build("gpt2")
    text = (Path(__file__).resolve().parents[2] / "docs" / "storage.md").read_text()
    for choice, where in (
        (None, None),
        (fp.Affine(8), None),
        ({"*": fp.Affine(8)}, None),
        ({"c_attn": fp.Affine(8)}, None),
        (fp.Affine(8), WEIGHTS),
    ):
        space = FaultSpace(net, format=choice, where=where)
        assert f"| {space.bits:,} | {100 * space.coverage:.1f} % |" in text


def test_weights_of_every_kind_of_layer():
    net, _ = build("mixed")
    formats = {site.name: site.format for site in FaultSpace(net, format=fp.Affine(8)).sites}
    quantised = {name for name, format in formats.items() if format == fp.Affine(8)}
    assert quantised == {name for name, p in net.named_parameters() if "weight" in name and p.dim() > 1}
    assert {"bag.weight", "attention.in_proj_weight", "cell.weight_hh", "pair.weight"} < quantised
    assert formats["slope.weight"] == fp.Float32()  # one dimension


@pytest.mark.parametrize("name", NETS)
def test_a_mapping_means_exactly_what_it_says(name):
    net, _ = build(name)
    everything = FaultSpace(net, format={"*": fp.Affine(8)})
    assert {site.format for site in everything.sites} == {fp.Affine(8)}
    assert everything.bits == 8 * sum(p.numel() for p in net.parameters())
    first = next(iter(dict(net.named_parameters())))
    part = FaultSpace(net, format={first: fp.Affine(3)})
    assert {site.format for site in part.sites if site.name != first} == {fp.Float32()}
    assert part.bits == sum(p.numel() * (3 if n == first else 32) for n, p in net.named_parameters())


def test_patterns_that_fit_nothing_are_said():
    net = nn.Linear(2, 2)
    with pytest.warns(FlipproofWarning, match=r"pattern 'wieght' of format= fits nothing that this model stores"):
        FaultSpace(net, format={"wieght": fp.Affine(8), "bias": fp.Float16()})
    FaultSpace(net, format={"weight": fp.Affine(8)}, where=fp.Parameters(include="bias"))  # it fits, and is not asked


def test_patterns_whose_format_stores_no_such_tensor_are_said():
    net = nn.Linear(2, 2)
    net.codes = nn.Parameter(torch.arange(4, dtype=torch.int8), requires_grad=False)
    with pytest.warns(FlipproofWarning, match=r"'codes' of format= fits only tensors of torch.int8, which Float16"):
        space = FaultSpace(net, format={"codes": fp.Float16(), "weight": fp.Float16()})
    assert {site.name: site.width for site in space.sites} == {"weight": 16, "bias": 32, "codes": 8}
    FaultSpace(net, format={"*": fp.Float16()})  # it stores the others


def test_fortunes_view_is_asked_for():
    net, _ = build("resnet")
    space = FaultSpace(net, where=WEIGHTS, format=fp.Affine(8))
    convolutions = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert space.bits == 8 * sum(m.weight.numel() for m in convolutions)
    assert space.shortfall() is None  # on purpose
    assert space.left_out["4.bias"] == "not selected by where="


# ---- simulated and packed


@pytest.mark.parametrize("format", FORMATS, ids=repr)
@pytest.mark.parametrize("name", NETS)
def test_a_simulated_format_is_the_packed_model_bit_by_bit(name, format):
    """The same space, bit numbers, draws and outcomes: 0.903 for 0.750 cannot come again."""
    net, data = build(name)
    if not format.weights_only:
        format = {{"mixed": "*weight*", "resnet": "*conv?.weight", "gpt2": "c_*.weight"}[name]: format}
    packed = fp.pack_(copy.deepcopy(net), format)
    simulated, real = FaultSpace(net, format=format), FaultSpace(packed)
    assert [_what(site) for site in real.sites] == [_what(site) for site in simulated.sites]
    assert (real.bits, real.left_out_bits, real.coverage) == (
        simulated.bits, simulated.left_out_bits, simulated.coverage,
    )  # fmt: skip
    setup = {"data": data, "faults": fp.BitErrorRate(3e-3), "trials": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlipproofWarning)  # small nets: a mask, statistics
        ours, theirs = fp.assess(net, format=format, **setup), fp.assess(packed, **setup)
    columns = [column for column in ours.trials if column != "seconds"]
    assert ours.trials[columns].equals(theirs.trials[columns])
    assert ours.golden == theirs.golden
    assert ours.coverage == theirs.coverage
    assert ours.trials["masked"].sum() < ours.trials["samples"].sum()


def _what(site: Site) -> tuple[object, ...]:
    return site.name, site.offset, site.bits, site.format, site.kind, site.layer


def test_bits_that_a_format_does_not_store_are_hit():
    """The records of a campaign, counted site by site: biases and norms get their share."""
    net, _ = build("resnet")
    space = FaultSpace(net, format=fp.Affine(8))
    draws = [fp.BitErrorRate(0.01).draw(space, TrialGenerator(0, "p", trial)) for trial in range(200)]
    hit = [name for draw in draws for name, _, _ in space.places(draw)]
    shares = space.table().set_index("name")["share"]
    for name in ("0.bn1.weight", "4.bias", "0.conv2.weight"):
        assert hit.count(name) / len(hit) == pytest.approx(shares[name], rel=0.25)


# ---- everything is somewhere


class Quantised(nn.Module):
    """A checkpoint in int8: weights in buffers under both names people use, zero points, a table, a mask, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (6, 8), dtype=torch.int8))
        self.register_buffer("weight_int8", torch.randint(-127, 128, (3, 6), dtype=torch.int8))
        self.register_buffer("zero_point", torch.tensor([3], dtype=torch.int32), persistent=False)
        self.register_buffer("index", torch.arange(6), persistent=False)
        self.register_buffer("mask", torch.ones(6, dtype=torch.bool))
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.tensor([0.01, 0.02]))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ (self.weight.float() * self.scale[0]).t()
        x = torch.relu(self.norm(x[:, self.index] * self.mask))
        return x @ ((self.weight_int8.float() - self.zero_point) * self.scale[1]).t()


def test_integer_buffers_are_hit_in_their_own_type_on_request():
    net = Quantised().eval()
    space = FaultSpace(net, where=fp.Parameters(buffers=True))
    formats = {site.name: site.format for site in space.sites}
    assert formats["weight"] == formats["weight_int8"] == Integer(8)
    assert (formats["zero_point"], formats["index"]) == (Integer(32), Integer(64))
    assert space.left_out == {
        "mask": "is torch.bool, which has no Format",
        "norm.num_batches_tracked": "a counter that inference never reads",
    }
    assert set(formats) | set(space.left_out) == every_tensor(net)
    assert space.bits == 8 * (48 + 18) + 32 + 6 * 64 + 32 * (4 * 6 + 2)
    assert space.left_out_bits == 6 * 8
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    for name, bit, change in (
        ("weight", 7, -128),
        ("weight_int8", 0, 1),
        ("zero_point", 31, -(2**31)),
        ("index", 1, 2),
    ):
        with space.corrupted(space.faults([(name, 0, bit)])) as changed:
            word = (int(before[name].view(-1)[0]) ^ change, int(net.get_buffer(name).view(-1)[0]))
            assert changed == 1
            assert word[0] == word[1]
    everything = fp.RandomBits(space.bits).draw(space, TrialGenerator(0, "p", 0))
    with space.corrupted(everything) as changed:
        assert changed == space.bits
        assert torch.equal(net.weight, ~before["weight"])
    assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())


def test_integer_buffers_of_another_layout_take_the_coded_path():
    net = nn.Module()
    net.register_buffer("weight", torch.randint(-127, 128, (3, 4), dtype=torch.int8).t())
    space = FaultSpace(net, where=fp.Parameters(buffers=True))
    before = net.weight.clone()
    with space.corrupted(space.faults([("weight", 5, 7), ("weight", 11, 0)], stuck=1)) as changed:
        differing = (net.weight != before).reshape(-1)
        assert int(differing.sum()) == changed
    assert torch.equal(net.weight, before)


def test_an_int8_model_is_measured_on_its_words_without_being_asked():
    torch.manual_seed(0)
    net = Quantised().eval()
    kinds = {site.name: site.kind for site in FaultSpace(net).sites}
    assert kinds == {
        "weight": "weight",
        "weight_int8": "weight",
        "zero_point": "zero_point",
        "scale": "scale",
        "norm.weight": "norm",
        "norm.bias": "norm",
    }
    x = torch.randn(10, 8)
    with torch.no_grad():
        data = [(x, net(x).argmax(dim=1))]
    setup = {"data": data, "faults": fp.BitErrorRate(1e-2), "trials": 4}
    message = r"only .* % of the model's stored bits.*index, norm.running_mean.*fp\.Parameters\(buffers=True\)"
    with pytest.warns(FlipproofWarning, match=message):
        found = fp.assess(net, **setup)
    assert found.coverage < 0.7
    assert found.summary.columns[-1] == "coverage"
    assert found.summary["coverage"].tolist() == [found.coverage]
    assert found.left_out["index"] == "a buffer: fp.Parameters(buffers=True) takes it"
    with pytest.warns(FlipproofWarning, match="mask"):  # 48 bits of some 1,900
        whole = fp.assess(net, **setup, where=fp.Parameters(buffers=True))
    assert whole.coverage > 0.97
    fp.assess(net, **setup, where=fp.Parameters(exclude=["mask", "index"], buffers=True))  # asked for: nothing is said
    loaded = fp.Assessment(replace(found.header, coverage=math.nan), found.records)
    assert loaded.coverage != loaded.coverage  # an old journal says nothing


def test_coverage_of_statistics_follows_from_sizes():
    net, _ = build("resnet")
    parameters = 32 * sum(p.numel() for p in net.parameters())
    statistics = 32 * 2 * 2 * (6 + 8)
    space = FaultSpace(net)
    assert space.coverage == parameters / (parameters + statistics)
    assert space.left_out_bits == statistics
    assert FaultSpace(net, where=fp.Parameters(buffers=True)).coverage == 1
    assert {name for name in space.left_out if name.endswith("num_batches_tracked")} < set(space.left_out)
    assert set(space.left_out) | {site.name for site in space.sites} == every_tensor(net)


def test_memory_is_counted_once():
    """A buffer that is a view of a weight, a second name, and the words of a packed weight."""
    net = nn.Linear(4, 3)
    net.register_buffer("row", net.weight.detach()[1])
    net.register_buffer("same", net.weight.detach())
    net.register_buffer("other", torch.zeros(2))
    space = FaultSpace(net)
    assert space.sites[0].aliases == ("same",)
    assert space.left_out.keys() == {"row", "other"}
    assert space.left_out_bits == 2 * 32  # the row's bits are the weight's
    with pytest.raises(FaultSpaceError, match="row and weight overlap"):
        FaultSpace(net, where=fp.Parameters(buffers=True))
    packed = fp.pack_(nn.Linear(4, 3), fp.Affine(5))
    whole = FaultSpace(packed)
    assert (whole.bits, whole.left_out_bits) == (12 * 5 + 3 * 32, 0)
    assert all("protected memory" in why for why in whole.left_out.values())
    assert len(whole.left_out) == 2
    without = FaultSpace(packed, where=fp.Parameters(exclude="weight"))
    assert (without.bits, without.left_out_bits) == (3 * 32, 12 * 5)


def test_pruned_weights_count_their_mask():
    net = nn.Linear(4, 3)
    prune.l1_unstructured(net, "weight", amount=5)
    space = FaultSpace(net)
    assert space.left_out.keys() == {"weight_mask"}
    assert space.coverage == (12 + 3) / (12 + 3 + 12)


def test_the_words_of_a_wrapper_are_hit_where_they_lie():
    net = nn.Linear(3, 2)
    net.weight = nn.Parameter(Wrapped(net.weight.detach()), requires_grad=False)
    space = FaultSpace(net)
    assert [(site.name, site.kind, site.format) for site in space.sites] == [
        ("weight.words", "weight", Integer(8)),
        ("bias", "bias", fp.Float32()),
    ]
    assert space.coverage == 1
    with space.corrupted(space.faults([("weight.words", 4, 7)])):
        assert net.weight.words.tolist() == [[0, 0, 0], [0, -128, 0]]
    assert not net.weight.words.any()


class Wrapped(Tensor):
    """int8 words and a scale in a tensor subclass, as torchao has it."""

    @staticmethod
    def __new__(cls, x: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    def __init__(self, x: Tensor) -> None:
        self.words = torch.zeros(x.shape, dtype=torch.int8)

    def __tensor_flatten__(self):
        return ["words"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Wrapped(inner["words"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return args[0] if function is torch.ops.aten.detach.default else NotImplemented


class Made(Tensor):
    """A wrapper that makes its words whenever it is asked for them."""

    @staticmethod
    def __new__(cls, x: Tensor) -> Made:
        return Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    def __init__(self, x: Tensor) -> None:
        self.float = x

    @property
    def words(self) -> Tensor:
        return self.float.to(torch.int8)

    def __tensor_flatten__(self):
        return ["words"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Made(inner["words"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return args[0] if function is torch.ops.aten.detach.default else NotImplemented


def test_wrappers_that_make_their_words_anew_are_refused_by_name():
    net = nn.Linear(3, 2)
    net.weight = nn.Parameter(Made(net.weight.detach()), requires_grad=False)
    with pytest.raises(FaultSpaceError, match=r"weight: is a Made, which makes its words anew"):
        FaultSpace(net)
    space = FaultSpace(net, where=fp.Parameters(exclude="weight"))
    assert (space.bits, space.left_out_bits) == (64, 48)


def test_float64_and_eight_bit_floats_have_a_format_of_their_own():
    net = nn.Linear(3, 2).double()
    with pytest.raises(FaultSpaceError, match=r"weight is torch\.float64: pass format=.*fp\.formats\.Float64\(\)"):
        FaultSpace(net)
    space = FaultSpace(net, format=Float64())
    value = net.weight[0, 0].item()
    with space.corrupted(space.faults([("weight", 0, 63)])):
        assert net.weight[0, 0].item() == -value
    assert net.weight[0, 0].item() == value
    quantised = FaultSpace(net, format=fp.Affine(4))
    assert [(site.format, site.bits) for site in quantised.sites] == [(fp.Affine(4), 24), (Float64(), 128)]
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(3, dtype=torch.float8_e4m3fn), requires_grad=False)
    assert FaultSpace(net).sites[0].format == fp.Float8E4M3()


# ---- neurons


def test_neuron_coverage_is_a_share_of_what_layers_compute():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rnn, self.fc = nn.Conv1d(4, 8, 1), nn.RNN(8, 5, batch_first=True), nn.Linear(5, 3)
            self.unused = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.rnn(self.conv(x).transpose(1, 2))[0][:, -1])

    net, x = Net(), torch.randn(7, 4, 6)
    run = [(lambda: net(x[:4]), 4), (lambda: net(x[4:]), 3)]
    conv, rnn, fc = (32 * count for count in (8 * 6, 5 * 6, 3))
    space = NeuronSpace(net, run)
    assert space.left_out_bits == rnn
    assert space.coverage == (conv + fc) / (conv + rnn + fc)
    assert space.left_out["rnn"] == "fp.Neurons() takes Conv, Linear, LSTM and GRU layers"
    assert "rnn (960 bits" in str(space.shortfall())
    only = NeuronSpace(net, run, where=fp.Neurons("fc"))
    assert only.coverage == fc / (conv + rnn + fc)
    assert only.shortfall() is None
    half = NeuronSpace(net, run, where=fp.Neurons(exclude="rnn"), format={"fc": fp.Float16()})
    assert {site.name: site.width for site in half.sites} == {"conv": 32, "fc": 16}
    assert half.coverage == (conv + fc / 2) / (conv + fc / 2 + rnn)
    with pytest.warns(FlipproofWarning, match="that layers compute for a sample can be hit"):
        found = fp.assess(net, data=[(x, torch.arange(7) % 3)], faults=fp.RandomBits(1), where=fp.Neurons(), trials=2)
    assert found.coverage == space.coverage
    assert not any(module._forward_hooks for module in net.modules())


# ---- draws


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([40, 3, 40, 700], "must ascend, each bit once, got 3 behind 40"),
        ([3, 40, 40, 700], "got 40 behind 40"),
        ([-1, 3], "count from 0, got -1"),
        ([0.5, 3.0], r"whole numbers in one dimension, got float64 of shape \(2,\)"),
        ([True, False], "got bool"),
        ([[1, 2]], r"of shape \(1, 2\)"),
        ([2**63], "are int64"),
    ],
)
def test_faults_are_distinct_ascending_places(positions, message):
    import numpy as np

    with pytest.raises(FaultModelError, match=message):
        Faults(np.array(positions))
    if positions[0] == 40:
        assert len(Upsets(np.array(positions))) == 4  # upsets come in the order of the samples
    else:
        Faults(np.array([1, 5], np.int32))


def test_faults_may_be_empty_or_another_integer_type():
    import numpy as np

    assert len(Faults([])) == 0
    assert Faults(np.array([1, 5], np.uint8)).positions.dtype == np.int64
    assert Faults([1, 5]).digest == Faults(np.array([1, 5], np.int32)).digest
    with pytest.raises(FaultModelError, match="stuck must be None, 0 or 1, got 2"):
        Faults([1], stuck=2)
    with pytest.raises(FaultModelError, match="Upsets: positions count from 0, got -3"):
        Upsets(np.array([5, -3]))


def test_each_space_takes_its_own_kind_of_draw():
    import numpy as np

    net = nn.Linear(3, 2)
    space = FaultSpace(net)
    with pytest.raises(FaultSpaceError, match="takes Faults, got Upsets"), space.corrupted(Upsets(np.array([1]))):
        pass
    x = torch.zeros(2, 3)
    neurons = NeuronSpace(net, [(lambda: net(x), 2)])
    for draw, message in (
        (Faults([1, 2]), "takes Upsets, one a sample, got Faults"),
        (Upsets(np.array([1])), "1 upsets for 2 samples"),
        (Upsets(np.array([1, 64])), "outside the space of 64 bits: 64"),
    ):
        with pytest.raises(FaultSpaceError, match=message), neurons.corrupted(draw):
            pass


# ---- arguments that are none


def refusals():
    net = nn.Linear(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        traced = torch.jit.trace(net, torch.zeros(1, 4))
    data = [(torch.zeros(2, 4), torch.tensor([0, 1]))]
    run = {"data": data, "faults": fp.RandomBits(1), "trials": 2}
    where, neurons = r"where= takes fp\.Parameters\(include='weight'\), got 'weight'", "are computed values, not stored"
    format = r"format= takes a Format such as fp\.Float32\(\).*got 'Float32'; write fp\.Float32\(\)"
    script = "is a TorchScript module.*pass the eager module"
    return [
        (FaultSpaceError, where, lambda: FaultSpace(net, where="weight")),
        (FaultSpaceError, where, lambda: fp.assess(net, where="weight", **run)),
        (FaultSpaceError, where, lambda: fp.pack_(net, fp.Affine(8), where="weight")),
        (FormatError, format, lambda: FaultSpace(net, format="Float32")),
        (FormatError, format, lambda: fp.assess(net, format="Float32", **run)),
        (FormatError, format, lambda: fp.assess(net, format="Float32", where=fp.Neurons(), **run)),
        (FormatError, format, lambda: fp.pack_(net, "Float32")),
        (FormatError, r"got the class Float32; write fp\.Float32\(\)", lambda: FaultSpace(net, format=fp.Float32)),
        (FormatError, r"maps patterns.*got '\*': 'Float32'", lambda: FaultSpace(net, format={"*": "Float32"})),
        (FaultSpaceError, neurons, lambda: FaultSpace(net, where=fp.Neurons())),
        (FaultSpaceError, neurons, lambda: fp.pack_(net, fp.Affine(8), where=fp.Neurons())),
        (
            ConfigError,
            r"takes where=fp\.Parameters",
            lambda: fp.propagation(net, data, faults=fp.RandomBits(1), where=fp.Neurons()),
        ),
        (FaultSpaceError, "a neuron space takes", lambda: NeuronSpace(net, [], where=fp.Parameters())),
        (FaultSpaceError, script, lambda: FaultSpace(traced)),
        (FaultSpaceError, script, lambda: fp.assess(nn.Sequential(traced), **run)),
        (FaultSpaceError, "made of a torch.nn.Module, got str", lambda: FaultSpace("model")),
    ]


@pytest.mark.parametrize("case", range(16))
def test_other_arguments_are_refused_in_a_sentence(case):
    error, message, call = refusals()[case]
    with pytest.raises(error, match=message):
        call()


def test_what_cannot_be_hit_can_be_excluded():
    net = nn.Linear(2, 2)
    net.angle = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(FaultSpaceError, match=r"angle: is torch\.complex64.*\n.*exclude=\['angle'\]"):
        FaultSpace(net)
    space = FaultSpace(net, where=fp.Parameters(exclude="angle"))
    assert (space.bits, space.left_out_bits) == (6 * 32, 128)
    net.register_buffer("turn", torch.zeros(3, dtype=torch.complex64))
    assert "complex64" in FaultSpace(net, where=fp.Parameters(exclude="angle", buffers=True)).left_out["turn"]
