"""Models that torch.ao quantised: the checkpoint's words, scales and zero points, packed again by torch.ao itself."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flipproof as fp
from flipproof.engine.cluster import packed
from flipproof.faults import TrialGenerator
from flipproof.formats import Float64, Integer
from flipproof.spaces import packed_params
from flipproof.spaces.contract import Faults, Space
from flipproof.spaces.parameters import FaultSpace
from flipproof.testing import SpaceContract

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


def images() -> Tensor:
    return torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def steps() -> Tensor:
    return torch.randn(12, 5, 4, generator=torch.Generator().manual_seed(1))


def rows() -> Tensor:
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(1))


def static() -> nn.Module:
    """As FX converts it: scales of the activations are buffers and attributes."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.manual_seed(0)
    prepared = prepare_fx(Convolutional().eval(), get_default_qconfig_mapping("x86"), (images(),))
    prepared(images())
    return convert_fx(prepared)


def eager() -> nn.Module:
    """As eager mode converts it, with a scale a tensor, and a transposed convolution."""
    torch.manual_seed(0)
    quantisation = torch.ao.quantization
    net = nn.Sequential(
        quantisation.QuantStub(),
        nn.Conv1d(1, 2, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 4),
        quantisation.DeQuantStub(),
    ).eval()
    observer = quantisation.default_per_channel_weight_observer
    weights = observer if False else quantisation.default_weight_observer
    net.qconfig = quantisation.QConfig(activation=quantisation.default_observer, weight=weights)
    quantisation.prepare(net, inplace=True)
    net(rows()[:, None])
    return quantisation.convert(net)


def dynamic() -> nn.Module:
    torch.manual_seed(0)
    return torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), {nn.Linear}
    ).eval()


def recurrent() -> nn.Module:
    torch.manual_seed(0)
    return torch.ao.quantization.quantize_dynamic(Recurrent().eval(), {nn.LSTM, nn.Linear})


def embedded() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.EmbeddingBag(11, 6, mode="sum"), nn.Linear(6, 3)).eval()
    net[0].qconfig = torch.ao.quantization.float_qparams_weight_only_qconfig
    torch.ao.quantization.prepare(net, inplace=True)
    return torch.ao.quantization.convert(net)


def tokens() -> Tensor:
    return torch.randint(0, 11, (12, 4), generator=torch.Generator().manual_seed(1))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "static": (static, images),
    "eager": (eager, lambda: rows()[:, None]),
    "dynamic": (dynamic, rows),
    "recurrent": (recurrent, steps),
    "embedded": (embedded, tokens),
}


def run(net: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return net(NETS[name][1]())


@pytest.fixture(autouse=True)
def quiet(one_thread: None) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that this kind of quantisation is to go
        yield


def flip(tensor: Tensor, value: int, bit: int) -> Tensor:
    """A copy with one bit changed, by NumPy alone."""
    found = np.atleast_1d(tensor.detach().contiguous().numpy().copy())
    memory = found.reshape(-1).view(np.uint8)
    memory[value * found.itemsize + bit // 8] ^= np.uint8(1 << bit % 8)
    return torch.from_numpy(found).reshape(tensor.shape)


def checkpoint_with(net: nn.Module, places: list[tuple[str, int, int]]) -> dict[str, Any]:
    """The state of a model of Linear and Conv layers, with bits changed: written without what is tested."""
    state = net.state_dict()  # with the versions of its layers
    for name, value, bit in places:
        layer, _, part = name.partition(".")
        if not part.startswith(("weight", "bias")):
            state[name] = flip(state[name], value, bit)
            continue
        linear = f"{layer}._packed_params._packed_params"
        weight, bias = state[linear] if linear in state else (state[f"{layer}.weight"], state[f"{layer}.bias"])
        words, whole = weight.int_repr(), weight.qscheme() == torch.per_tensor_affine
        scale = torch.tensor(weight.q_scale()).double() if whole else weight.q_per_channel_scales()
        zero = torch.tensor(weight.q_zero_point()) if whole else weight.q_per_channel_zero_points()
        if part == "bias":
            bias = flip(bias, value, bit)
        elif part == "weight":
            words = flip(words, value, bit)
        elif part == "weight.scale":
            scale = flip(scale, value, bit)
        else:
            zero = flip(zero, value, bit)
        if whole:
            weight = torch._make_per_tensor_quantized_tensor(words, float(scale), int(zero))
        else:
            weight = torch._make_per_channel_quantized_tensor(words, scale, zero, 0)
        if linear in state:
            state[linear] = (weight, bias)
        else:
            state[f"{layer}.weight"], state[f"{layer}.bias"] = weight, bias
    return state


@pytest.mark.parametrize("name", ["dynamic", "static", "eager"])
def test_answers_under_faults_are_those_of_a_checkpoint_that_was_changed(name):
    """`load_state_dict` of torch.ao packs what was changed in the file; the answers are the same, bit by bit."""
    net, other = NETS[name][0](), NETS[name][0]()
    space = FaultSpace(net)
    assert space.left_out == {}
    golden = run(net, name)
    differing, unlike = 0, 0
    for trial in range(150):
        bits = TrialGenerator(0, name, trial).distinct(1 if trial < 100 else 6, space.bits)
        places = space.places(Faults(bits))
        fresh = copy.deepcopy(other)
        try:
            fresh.load_state_dict(checkpoint_with(net, places))
            expected = run(fresh, name)
        except (RuntimeError, ValueError, OverflowError) as error:
            expected = error
        with space.corrupted(Faults(bits)) as changed:
            assert changed == len(bits)
            try:
                found = run(net, name)
            except (RuntimeError, ValueError, OverflowError, TypeError) as error:
                found = error
        assert isinstance(found, Tensor) == isinstance(expected, Tensor), (places, found, expected)
        if isinstance(found, Tensor):
            unlike += not torch.equal(found.view(torch.int32), expected.view(torch.int32))
            differing += not torch.equal(found, golden)
        assert torch.equal(run(net, name), golden)
    assert unlike == 0
    assert differing > 60


def test_dynamic_layers_by_hand():
    """The sums of a dynamic layer, written down: codes of the activations, words, scales and the zero point."""
    net, x = dynamic()[0], rows()
    space = FaultSpace(net)
    weight, bias = torch.ops.quantized.linear_unpack(net._packed_params._packed_params)
    with torch.no_grad():
        golden = net(x)
        for trial in range(100):
            value, bit = int(TrialGenerator(0, "v", trial).below(48, 1)[0]), trial % 8
            words = weight.int_repr().long()
            word = (int(words.view(-1)[value]) & 255) ^ (1 << bit)
            words.view(-1)[value] = word - 256 if word > 127 else word
            low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
            step = (high - low) / 127  # torch.ao leaves a bit of an activation unused where sums could overflow
            candidates = []
            for levels in (127, 255):
                step = (high - low) / levels
                zero = round(-low / step)
                codes = torch.clamp(torch.round(x / step) + zero, 0, levels) - zero
                candidates.append((codes.double() @ words.t().double() * step * weight.q_scale() + bias).float())
            with space.corrupted(space.faults([("weight", value, bit)])):
                found = net(x)
            assert any(torch.allclose(found, hand, atol=2e-2) for hand in candidates)
            assert not torch.equal(found, golden)


@pytest.mark.parametrize("name", NETS)
def test_sites_are_named_as_a_checkpoint_names_them(name):
    net = NETS[name][0]()
    space = FaultSpace(net)
    sites = {site.name: site for site in space.sites}
    assert space.coverage == 1
    if name == "static":
        assert {n: (s.kind, s.shape) for n, s in sites.items()} == {
            "conv.weight": ("weight", (3, 1, 3, 3)),
            "conv.weight.scale": ("scale", (3,)),
            "conv.weight.zero_point": ("zero_point", (3,)),
            "conv.bias": ("bias", (3,)),
            "conv.scale": ("scale", ()),
            "conv.zero_point": ("zero_point", ()),
            "fc.weight": ("weight", (5, 48)),
            "fc.weight.scale": ("scale", (5,)),
            "fc.weight.zero_point": ("zero_point", (5,)),
            "fc.bias": ("bias", (5,)),
            "fc.scale": ("scale", ()),
            "fc.zero_point": ("zero_point", ()),
            "conv_input_scale_0": ("scale", ()),
            "conv_input_zero_point_0": ("zero_point", ()),
            "_scale_0": ("scale", ()),
            "_zero_point_0": ("zero_point", ()),
        }
        assert sites["conv.weight"].format == sites["fc.weight"].format == Integer(8)
        assert sites["conv.weight.scale"].format == Float64()
        assert sites["conv.scale"].format == fp.Float32()
        assert {site.layer for site in space.sites} == {"", "conv", "fc"}
    if name == "recurrent":
        prefix = "rnn._all_weight_values.0.param"
        assert {n for n in sites if n.startswith("rnn")} == {
            f"{prefix}.{part}_{end}{of}"
            for end in ("ih", "hh")
            for part, ends in (("weight", ("", ".scale", ".zero_point")), ("bias", ("",)))
            for of in ends
        }
    if name == "embedded":
        assert sites["0.weight"].format == Integer(8, signed=False)
        assert sites["0.weight.scale"].format == sites["0.weight.zero_point"].format == fp.Float32()


@pytest.mark.parametrize("name", NETS)
def test_what_the_module_holds_comes_back_as_the_very_object(name):
    net = NETS[name][0]()
    before = [(m, k, v) for m in net.modules() for k, v in vars(m).items() if isinstance(v, torch.ScriptObject)]
    assert before
    golden = run(net, name)
    space = FaultSpace(net)
    with space.stored():
        assert torch.equal(run(net, name), golden)  # packed anew without a fault
        for trial in range(3):
            with space.corrupted(Faults(TrialGenerator(0, "back", trial).distinct(9, space.bits))):
                pass
            assert torch.equal(run(net, name), golden)
    with pytest.raises(ZeroDivisionError), space.corrupted(space.faults([(space.sites[0].name, 0, 7)])):
        raise ZeroDivisionError
    assert all(vars(m)[k] is v for m, k, v in before)
    assert torch.equal(run(net, name), golden)


@pytest.mark.parametrize("name", NETS)
def test_campaigns_are_audited_and_the_same_in_two_processes(name):
    net, x = NETS[name][0](), NETS[name][1]()
    batches = [(part, run_part(net, part).argmax(dim=1)) for part in x.split(6)]
    setup = {"faults": fp.RandomBits([1, 12]), "trials": 6, "seed": 3}
    found = fp.assess(net, batches, **setup, audit=1.0)
    assert found.trials["audited"].all()
    assert found.coverage == 1
    assert found.summary["masked"].iloc[1] < 1
    two = fp.assess(net, batches, **setup, workers=2)
    drop = ["seconds", "audited"]
    assert two.trials.drop(columns=drop).equals(found.trials.drop(columns=drop))


@pytest.mark.parametrize("name", ["eager", "dynamic", "recurrent", "embedded"])
def test_model_and_space_are_sent_to_other_machines(name):
    net = NETS[name][0]()
    space = FaultSpace(net, where=fp.Parameters(kinds=("weight", "bias")))
    there, space_there = torch.load(io.BytesIO(packed((net, space))), weights_only=False)
    for trial in range(5):
        draw = Faults(TrialGenerator(0, "sent", trial).distinct(9, space.bits))
        with space.corrupted(draw), space_there.corrupted(draw):
            assert torch.equal(run(there, name).view(torch.int32), run(net, name).view(torch.int32))
    assert torch.equal(run(there, name), run(net, name))


def run_part(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def test_one_object_is_packed_for_each_layer_that_is_hit(monkeypatch):
    net = static()
    space = FaultSpace(net)
    made = []
    plain = packed_params.Packing.install
    monkeypatch.setattr(packed_params.Packing, "install", lambda self: made.append(self.place) or plain(self))
    with space.stored():
        hit = [("fc.weight", i, 0) for i in range(20)] + [("fc.weight.scale", 1, 60), ("conv_input_scale_0", 0, 3)]
        with space.corrupted(space.faults(hit)):
            pass
    assert made == ["fc._packed_params._packed_params"]


def test_numbers_that_cannot_be_packed_are_detected_errors():
    net = static()
    with torch.no_grad():
        batches = [(images(), net(images()).argmax(dim=1))]
    # whatever torch.ao says to it, a campaign goes through, and the model is as it was
    found = fp.assess(net, batches, faults=fp.RandomBits(40), where=fp.Parameters(kinds="zero_point"), trials=10)
    assert found.summary["due"].iloc[0] + found.summary["critical_total"].iloc[0] > 0
    assert torch.equal(run(net, "static").argmax(dim=1), batches[0][1])


def test_codes_repair_words_before_they_are_packed():
    net = dynamic()
    golden = run(net, "dynamic")
    space = FaultSpace(net, format={"*.weight": fp.BCH(fp.Integer(8), t=1)}, where=fp.Parameters(kinds="weight"))
    assert {site.format for site in space.sites} == {fp.BCH(fp.Integer(8), t=1)}
    with space.stored():
        for trial in range(20):
            with space.corrupted(Faults(TrialGenerator(0, "bch", trial).distinct(1, space.bits))):
                assert space.word_outcomes == (1, 0, 0)
                assert torch.equal(run(net, "dynamic"), golden)


def test_other_words_are_another_campaign(tmp_path):
    net = dynamic()
    batches = [(rows(), run(net, "dynamic").argmax(dim=1))]
    setup = {"faults": fp.RandomBits(1), "trials": 2, "journal": tmp_path / "words.jsonl"}
    fp.assess(net, batches, **setup)
    space = FaultSpace(net)
    packing = space._packings[0]
    packing.parts[0].tensor[0, 0] ^= 1
    packing.install()
    with pytest.raises(fp.errors.JournalError, match="weights"):
        fp.assess(net, batches, **setup)


def test_what_does_not_give_its_words_away_is_left_out_by_name_with_its_bits():
    part = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear}, dtype=torch.float16)
    net = nn.Sequential(nn.Linear(4, 4), part)
    space = FaultSpace(net)
    assert space.left_out.keys() == {"1.0._packed_params._packed_params"}
    assert "packed by torch.ao as LinearPackedParamsBase" in space.left_out["1.0._packed_params._packed_params"]
    assert space.coverage < 1
    assert "1.0._packed_params._packed_params (" in str(space.shortfall())
    with pytest.raises(fp.errors.FaultSpaceError, match=r"no parameter is left.*\n.*packed by torch\.ao"):
        FaultSpace(part)


def test_what_writes_to_memory_itself_is_refused_in_a_sentence():
    """Nothing that is written to our copies elsewhere would reach the model."""
    net = dynamic()
    data = [(rows(), run(net, "dynamic").argmax(dim=1))]
    with pytest.raises(
        fp.errors.FormatError, match=r"scrub_ writes where parameters lie, and 0\.weight\.scale lies in"
    ):
        fp.scrub_(net, fp.BitClipped(fp.formats.Float64(), zeros=(62,)), where=fp.Parameters(kinds="scale"))
    with pytest.raises(
        fp.errors.FaultSpaceError, match=r"0\.bias lies in an object of torch\.ao, which takes no writes"
    ):
        fp.analyze(net, data, fp.DeepVigor(), where=fp.Parameters(kinds="bias"))
    with pytest.raises(
        fp.errors.FormatError, match=r"0\.bias is part of 0\._packed_params\._packed_params, which a library"
    ):
        fp.pack_(net, {"0.bias": fp.Float16()})


class Contract(SpaceContract):
    def space(self, network: nn.Module) -> Space:
        return FaultSpace(network)


class TestDynamic(Contract):
    def network(self) -> nn.Module:
        return dynamic()

    def run(self, network: nn.Module) -> Tensor:
        return network(rows())


class TestEager(Contract):
    travels = False  # by plain pickle

    def space(self, network: nn.Module) -> Space:  # torch.ao raises on most faults in scales and zero points
        return FaultSpace(network, where=fp.Parameters(kinds=("weight", "bias")))

    def network(self) -> nn.Module:
        return eager()

    def run(self, network: nn.Module) -> Tensor:
        return network(rows()[:, None])
